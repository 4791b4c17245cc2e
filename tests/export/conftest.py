"""The synthetic checkpoint that most of the export's tests read, and exports of a few bytes."""

import shutil

import numpy as np
import onnx_ir
import pytest

from export import bundling, network_weights
from export.checkpoints import NETWORK_ROLES, CheckpointRequest, load_checkpoint
from export.checkpoints.model import Checkpoint
from export.geometry import geometry_of
from export.network_weights import WeightGroup
from export.safetensors_writer import StoredTensor
from moma_rt.bundle.specs import Geometry
from tests.torchlib import read_once


@pytest.fixture(scope="session", autouse=True)
def torchlib_read_once() -> None:
    """Make exports faster."""
    read_once()


@pytest.fixture(scope="session")
def tiny_checkpoint() -> Checkpoint:
    return load_checkpoint(CheckpointRequest("tiny"))


@pytest.fixture(scope="session")
def tiny_geometry(tiny_checkpoint) -> Geometry:
    return geometry_of(tiny_checkpoint)


@pytest.fixture
def clip_folder(hub, tmp_path):
    """A copy of the golden base's tokenizer that a test may break."""
    return shutil.copytree(hub / "SG161222/Realistic_Vision_V4.0_noVAE/tokenizer", tmp_path / "tokenizer")


@pytest.fixture
def written(monkeypatch):
    """Replaces each group of weights by one tensor under the group's own key; returns the list of written groups."""
    done = []

    def groups(network, checkpoint, geometry, precision):
        names = ["unet", network.name] if "unet" in NETWORK_ROLES[network.name] else [network.name]

        def group(name):
            def read():
                done.append(name)
                return np.frombuffer(name.encode(), np.int8)

            tensors = (StoredTensor(f"{name}.weight", onnx_ir.DataType.INT8, (len(name),), read),)
            return WeightGroup(name, network_weights._key(name, network, checkpoint, tensors), tensors)

        return tuple(group(name) for name in names)

    monkeypatch.setattr(bundling, "weight_groups", groups)
    return done


@pytest.fixture
def exports(monkeypatch, written):
    """Replaces tracing by writing the hashes of a network's sources; returns the list of exported networks."""
    done = []

    def sources(name, checkpoint):
        return {c.role: c.sha256 for c in checkpoint.components if c.role in NETWORK_ROLES[name]}

    def export(request, folder):
        assert all(path.is_file() for path in request.weights.files), "tracing may fold them to constants"
        name = request.network.name
        (folder / "model.onnx").write_text(f"{name} {sources(name, request.checkpoint)} {request.weights.locations}")
        (folder / "lowered.onnx").write_text(f"{name} lowered")
        done.append(name)

    monkeypatch.setattr(bundling, "export_network", export)
    # Nothing large is freed here, and a collection would visit all of pytest's objects.
    monkeypatch.setattr("gc.collect", lambda: 0)
    return done
