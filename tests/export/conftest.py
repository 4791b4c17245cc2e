"""The synthetic checkpoint that most of the export's tests read."""

import pytest

from export.checkpoints import CheckpointRequest, load_checkpoint
from export.checkpoints.model import Checkpoint
from export.geometry import geometry_of
from moma_rt.specs import Geometry


@pytest.fixture(scope="session")
def tiny_checkpoint() -> Checkpoint:
    return load_checkpoint(CheckpointRequest("tiny"))


@pytest.fixture(scope="session")
def tiny_geometry(tiny_checkpoint) -> Geometry:
    return geometry_of(tiny_checkpoint)
