"""CUDA graphs of the inductor backend: size and failures on a fake `torch.cuda`, and real captures on a GPU."""

import contextlib
import gc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moma_rt.backends.device import local_device
from moma_rt.backends.inductor import InductorBackend
from moma_rt.bundle.engines import Device
from moma_rt.errors import BundleError, MomaError, OutOfMemory
from tests.moma_rt.backends.networks import STEP, allocate, buffer_of
from tests.moma_rt.backends.packages import save_package


class FakeCuda:
    """The parts of `torch.cuda` that a capture uses; `end` is the error that the end of a capture raises."""

    def __init__(self, monkeypatch):
        self.end = None
        self.free = 1000
        replaced = {
            "is_available": lambda: True,
            "Stream": lambda device: SimpleNamespace(device=device),
            "stream": lambda stream: contextlib.nullcontext(),
            "CUDAGraph": SimpleNamespace,
            "graph": self.graph,
            "empty_cache": lambda: None,
            "mem_get_info": lambda device: (self.free, 2000),
            "memory_stats": lambda device: {},
        }
        for name, value in replaced.items():
            monkeypatch.setattr(torch.cuda, name, value)

    @contextlib.contextmanager
    def graph(self, graph, **_):
        try:
            yield
        finally:
            self.free -= 300
            if self.end is not None:
                raise self.end


@pytest.fixture
def backend_and_cuda(monkeypatch):
    """A backend that captures graphs on a fake `torch.cuda`, and that fake."""
    cuda = FakeCuda(monkeypatch)
    return InductorBackend(Device("H100", 90)), cuda


def test_a_graph_knows_its_size_and_is_on_the_first_gpu(backend_and_cuda):
    backend, _ = backend_and_cuda
    assert backend._queue.stream.device == torch.device("cuda", 0)
    assert backend.capture(lambda: None).size == 300
    assert backend._queue.used is None


@pytest.mark.parametrize(
    ("inside", "end", "raised"),
    [
        (MomaError("not permitted"), None, None),
        (MomaError("not permitted"), RuntimeError("the capture is invalid"), None),
        (None, RuntimeError("operation not permitted"), None),
        (OutOfMemory("no memory left"), None, OutOfMemory),
        (OutOfMemory("no memory left"), RuntimeError("the capture is invalid"), OutOfMemory),
        (None, RuntimeError("CUDA error: out of memory"), OutOfMemory),
        (KeyboardInterrupt(), None, KeyboardInterrupt),
    ],
)
def test_failures_of_a_capture(backend_and_cuda, inside, end, raised):
    backend, cuda = backend_and_cuda
    cuda.end = end

    def enqueue():
        if inside is not None:
            raise inside

    if raised is None:
        assert backend.capture(enqueue) is None
    else:
        with pytest.raises(raised):
            backend.capture(enqueue)
    assert backend._queue.used is None, "later work belongs to no capture"


def test_a_gpus_package_runs_beside_any_cpu(backend_and_cuda):
    backend, _ = backend_and_cuda
    backend._check_machine(Path("engine.pt2"), {"AOTI_DEVICE_KEY": "cuda", "AOTI_CPU_ISA": "AVX9000 AMX"})
    with pytest.raises(BundleError, match="was compiled for cpu, and this backend runs on cuda"):
        backend._check_machine(Path("engine.pt2"), {"AOTI_DEVICE_KEY": "cpu", "AOTI_CPU_ISA": "AVX9000 AMX"})


@pytest.mark.gpu
def test_on_a_gpu_a_replay_repeats_the_captured_work(tmp_path):
    backend = InductorBackend(local_device())
    network = backend.load(STEP, save_package(tmp_path / "step.pt2", STEP, "cuda"))
    even = allocate(backend, STEP, batch=2)
    odd = {**even, "x": even["next_x"], "next_x": even["x"]}
    table = buffer_of(backend, (4, 1), "float32")
    backend.upload(table, np.array([[1], [10], [100], [1000]], np.float32))

    def steps_of(bounds):
        def run():
            for i in range(4):
                backend.copy_row(table, i, even["y"])
                bounds[i % 2].enqueue()

        return run

    run = steps_of([network.bind(even), network.bind(odd)])
    run()
    eager = backend.download(even["x"])
    backend.upload(even["x"], np.zeros((2, 3), np.float32))
    graph = backend.capture(run)
    assert graph is not None
    assert graph.is_valid
    assert not backend.download(even["x"]).any(), "a capture runs nothing"
    del run, network
    gc.collect()
    for times in (1, 2):
        graph.replay()
        np.testing.assert_array_equal(backend.download(even["x"]), times * eager)


@pytest.mark.gpu
def test_on_a_gpu_a_failed_capture_returns_none():
    backend = InductorBackend(local_device())
    buffer = buffer_of(backend, (3,), "float32")
    assert backend.capture(lambda: backend.download(buffer)) is None
    backend.upload(buffer, np.ones(3, np.float32))
    assert (backend.download(buffer) == 1).all()


def test_cudnn_benchmarks_convolutions_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    InductorBackend(None)
    assert not torch.backends.cudnn.benchmark, "a CPU has none"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    InductorBackend(Device("H100", 90))
    assert torch.backends.cudnn.benchmark
