"""Engines of the `tensorrt` flavour, built without a GPU: TensorRT's bindings with TensorRT-RTX's libraries."""

import dataclasses
import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from engines.tensorrt import ENGINE_NAME
from moma_rt.bundle.engines import RTX_CAPABILITIES, Flavour
from moma_rt.bundle.manifest import Bundle
from moma_rt.bundle.specs import Dim, NetworkSpec, TensorSpec

pytestmark = pytest.mark.tensorrt

BUILD_ONE = Path(__file__).parent / "build_one.py"
WIDTH, GRID = 32, 8
WEIGHT_OI = np.random.default_rng(0).standard_normal((WIDTH, WIDTH)).astype(np.float16)
FLAG_BYTES = 256
# What a target machine need not have.
NOT_NEEDED = {"torch", "onnx", "onnxscript", "onnxruntime", "diffusers", "transformers", "triton"}


@dataclass(frozen=True)
class Graph:
    path: Path
    weights_root: Path
    spec: NetworkSpec


def _write_graph(folder: Path, batch: int | Dim, last: str = "MatMul") -> Graph:
    """Write a convolution, a normalization and an attention of one head, in fp16 with fp32 inputs and outputs.

    As in a bundle, the weights are in another folder, and the graph names their file relative to that folder's parent.
    """
    shape = (batch, WIDTH, GRID, GRID)
    spec = NetworkSpec("small", (TensorSpec("x", "float32", shape),), (TensorSpec("y", "float32", shape),))
    onnx_shape = [d.name if isinstance(d, Dim) else d for d in shape]
    weights = {
        "kernel": WEIGHT_OI[..., None, None],
        "gamma": np.ones(WIDTH, np.float16),
        "beta": np.zeros(WIDTH, np.float16),
        "rows": np.array([0, WIDTH, -1], np.int64),
        "grid": np.array([0, WIDTH, GRID, GRID], np.int64),
    }
    nodes = [
        helper.make_node("Cast", ["x"], ["half"], to=TensorProto.FLOAT16),
        helper.make_node("Conv", ["half", "kernel"], ["convolved"]),
        helper.make_node("InstanceNormalization", ["convolved", "gamma", "beta"], ["normal"]),
        helper.make_node("Reshape", ["normal", "rows"], ["k_bcs"]),
        helper.make_node("Transpose", ["k_bcs"], ["q_bsc"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["q_bsc", "k_bcs"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["probabilities"], axis=-1),
        helper.make_node(last, ["k_bcs", "probabilities"], ["attended"]),
        helper.make_node("Reshape", ["attended", "grid"], ["out"]),
        helper.make_node("Cast", ["out"], ["y"], to=TensorProto.FLOAT),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, onnx_shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, onnx_shape)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    weights_root, location = folder / "weights", "small-0/weights.safetensors"
    (weights_root / "small-0").mkdir(parents=True)
    onnx.save(model, weights_root / "model.onnx", save_as_external_data=True, location=location, size_threshold=0)
    (folder / "networks").mkdir()
    (weights_root / "model.onnx").rename(folder / "networks" / "model.onnx")
    return Graph(folder / "networks" / "model.onnx", weights_root, spec)


def _run(bindings, graph: Graph, folder: Path, *timing_cache: Path) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    arguments = (BUILD_ONE, bindings.module, graph.path, graph.weights_root, folder, *timing_cache)
    return bindings.run(*arguments, stdin=json.dumps(graph.spec.to_json()))


def _build(bindings, graph: Graph, folder: Path, *timing_cache: Path) -> dict:
    done = _run(bindings, graph, folder, *timing_cache)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("batch", [Dim("batch", 1, 2, 4), 3], ids=["dynamic", "fixed"])
def test_both_flavours_build_the_same_engine(tmp_path, bindings_over_rtx, batch):
    graph = _write_graph(tmp_path, batch)
    results = {}
    for module in ("tensorrt", "tensorrt_rtx"):
        bindings = dataclasses.replace(bindings_over_rtx, module=module)
        result = results[module] = _build(bindings, graph, tmp_path / module)
        assert not NOT_NEEDED & set(result["modules"])
        assert result["facts"]["weight_bytes"] > 0
        assert result["facts"]["activation_bytes"] > 0
        assert any("1 of" in text for text in result["reported"])
    assert results["tensorrt"]["facts"] == results["tensorrt_rtx"]["facts"]
    engines = [(tmp_path / module / ENGINE_NAME).read_bytes() for module in results]
    # Only the `tensorrt_rtx` flavour sets REQUIRE_USER_ALLOCATION, which is stored in the engine.
    assert abs(len(engines[0]) - len(engines[1])) < FLAG_BYTES
    assert all(WEIGHT_OI.tobytes() in engine for engine in engines)


def test_the_timing_cache_is_written_and_read(tmp_path, bindings_over_rtx):
    graph = _write_graph(tmp_path, Dim("batch", 1, 2, 4))
    timing_cache = tmp_path / "timing.cache"
    _build(bindings_over_rtx, graph, tmp_path / "first", timing_cache)
    written = timing_cache.read_bytes()
    assert written
    _build(bindings_over_rtx, graph, tmp_path / "second", timing_cache)
    assert timing_cache.read_bytes() == written
    engines = [(tmp_path / name / ENGINE_NAME).read_bytes() for name in ("first", "second")]
    assert engines[0] == engines[1]


def test_an_unknown_operator_is_named_in_one_line(tmp_path, bindings_over_rtx):
    done = _run(bindings_over_rtx, _write_graph(tmp_path, 1, last="Unheard"), tmp_path / "out")
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"moma_rt.errors.BundleError: small: tensorrt {bindings_over_rtx.version} cannot parse it: ")
    assert "Unheard" in last
    assert list((tmp_path / "out").iterdir()) == []


def test_the_command_finishes_a_bundle_on_its_device(tmp_path, tiny_bundle, bindings_over_rtx):
    root = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    names = ["text_encoder", "context_projector"]
    command = ("-m", "engines.build", root, "--target", "local", "--only", ",".join(names))
    for expected in ("built for tensorrt sm90", "kept for tensorrt sm90"):
        done = bindings_over_rtx.run(*command)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count(expected) == len(names)
    bundle = Bundle.open(root)
    bundle.verify(engine.file for engine in bundle.manifest.engines)
    built = [
        (engine.network, engine.flavour, engine.version, engine.capabilities) for engine in bundle.manifest.engines
    ]
    assert built == [(name, Flavour.TENSORRT, bindings_over_rtx.version, (90,)) for name in names]


def test_tensorrt_rtx_has_a_name_for_every_capability(load_bindings):
    source = "import json, tensorrt_rtx as trt; print(json.dumps(list(trt.ComputeCapability.__members__)))"
    known = set(json.loads(load_bindings("tensorrt_rtx").run("-c", source).stdout))
    assert {f"SM{capability}" for capability in RTX_CAPABILITIES} <= known
