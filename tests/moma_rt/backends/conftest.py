"""A TensorRT backend on a fake GPU."""

import pytest

from moma_rt import backends
from tests.moma_rt.backends.networks import PAST, STEP, past, step
from tests.moma_rt.fake_gpu import FakeGpu


@pytest.fixture
def gpu(monkeypatch):
    """A fake GPU; the test fails if the GPU noticed misuse."""
    installed = FakeGpu.install(monkeypatch, {b"step": (STEP, step), b"past": (PAST, past)})
    yield installed
    assert installed.cuda.wrong == []


@pytest.fixture
def load(gpu, tmp_path):
    """A backend, and a function that loads a network by its spec."""
    backend = backends.create("tensorrt")

    def network(spec):
        path = tmp_path / "engine.trt"
        path.write_bytes(spec.name.encode())
        return backend.load(spec, path)

    return backend, network
