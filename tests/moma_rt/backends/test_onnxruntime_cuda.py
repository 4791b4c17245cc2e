"""ONNX Runtime's CUDA provider on a fake GPU."""

import gc
import inspect
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest

from moma_rt.backends.onnxruntime_cuda import OnnxRuntimeCudaBackend
from moma_rt.memory.networks import run_once
from tests.moma_rt.backends.networks import (
    PAST,
    STEP,
    allocate,
    buffer_of,
    check_row_filling,
    check_two_bindings,
    save_graph,
)
from tests.moma_rt.fake_cuda import FakeCuda
from tests.moma_rt.fake_onnxruntime import CPU, FakeBinding, FakeOnnxRuntime, FakeSession


@pytest.fixture
def gpu(monkeypatch):
    cuda = FakeCuda(1 << 26)
    yield SimpleNamespace(cuda=cuda, ort=FakeOnnxRuntime.install(monkeypatch, cuda))
    assert cuda.wrong == []


@pytest.fixture
def load(gpu, tmp_path):
    """A backend, and a function that loads a network by its spec."""
    backend = OnnxRuntimeCudaBackend()
    return backend, lambda spec: backend.load(spec, save_graph(tmp_path / f"{spec.name}.onnx", spec))


def test_two_bindings_of_one_network_read_each_others_output(load):
    backend, network = load
    check_two_bindings(backend, network(STEP))


@pytest.mark.parametrize("count", [0, 1, 3, 4])
def test_the_beginning_of_a_row_is_filled(load, count):
    check_row_filling(load[0], count)


def test_runs_are_enqueued_and_not_waited_for(gpu, load):
    backend, network = load
    bound = network(STEP).bind(allocate(backend, STEP, batch=1))
    backend.synchronize()
    waits = gpu.cuda.waits
    for _ in range(5):
        bound.enqueue()
    assert len(gpu.cuda.queue) == 5
    assert gpu.cuda.waits == waits
    backend.synchronize()
    assert gpu.cuda.queue == []


def test_a_dimension_may_be_zero(load):
    backend, network = load
    loaded = network(PAST)
    for length in (0, 3):
        inputs = {"past": np.ones((2, length), np.float32), "new": np.ones((2, 2), np.float32)}
        assert run_once(backend, loaded, inputs)["total"] == 2 * (length + 2)


def test_an_input_in_host_memory_is_read_at_every_run(gpu, load):
    backend, network = load
    gpu.ort.on_host.add("ids")
    buffers = allocate(backend, STEP, batch=2)
    ids = buffer_of(backend, (3, 2, 3), "int32")
    bound = network(STEP).bind(buffers)
    backend.upload(ids, np.arange(18).reshape(3, 2, 3).astype(np.int32))
    for row in (2, 0, 1):
        # Copied within the device, so that the host has not waited for it.
        backend.copy_row(ids, row, buffers["ids"])
        bound.enqueue()
        expected = np.arange(18).reshape(3, 2, 3)[row]
        np.testing.assert_array_equal(backend.download(buffers["next_x"]), expected)


def test_enqueued_work_keeps_its_network_and_buffers_alive(gpu, load):
    backend, network = load
    result = buffer_of(backend, (2, 3), "float32")
    network(STEP).bind({**allocate(backend, STEP, batch=2), "next_x": result}).enqueue()
    gc.collect()
    np.testing.assert_array_equal(backend.download(result), np.zeros((2, 3)))
    assert len(gpu.cuda.memory) == 1, "the session and its memory were freed after the wait"


def test_an_input_in_host_memory_keeps_the_others_alive(gpu, load):
    backend, network = load
    gpu.ort.on_host.add("ids")
    result = buffer_of(backend, (2, 3), "float32")
    network(STEP).bind({**allocate(backend, STEP, batch=2), "next_x": result}).enqueue()
    gc.collect()
    np.testing.assert_array_equal(backend.download(result), np.zeros((2, 3)))


def test_deleting_a_busy_backend_waits_and_frees_everything(gpu, tmp_path):
    backend = OnnxRuntimeCudaBackend()
    network = backend.load(STEP, save_graph(tmp_path / "step.onnx", STEP))
    network.bind(allocate(backend, STEP, batch=2)).enqueue()
    assert gpu.cuda.queue
    # Without a garbage collection, though work on the stream refers to the stream.
    gc.disable()
    try:
        del backend, network
    finally:
        gc.enable()
    assert (gpu.cuda.queue, gpu.cuda.memory, gpu.cuda.streams) == ([], {}, 0)


def test_trimming_frees_the_arenas_of_networks(gpu, load):
    backend, network = load
    loaded = {spec.name: (network(spec), allocate(backend, spec, **sizes)) for spec, sizes in SIZES}
    backend.synchronize()
    before, runs = gpu.cuda.used, []
    for step, buffers in loaded.values():
        runs.append(step.bind(buffers))
        runs[-1].enqueue()
    assert gpu.cuda.used > before
    backend.trim()
    assert gpu.cuda.used == before
    assert gpu.ort.runs == ["step", "past"], "trimming runs nothing"
    for bound in runs:
        bound.enqueue()
    backend.synchronize()


SIZES = [(STEP, {"batch": 1000}), (PAST, {"past": 3, "s": 2})]


def test_out_of_memory_frees_the_arenas_of_other_networks(gpu, load):
    backend, network = load
    step, past = (network(spec).bind(allocate(backend, spec, **sizes)) for spec, sizes in SIZES)
    step.enqueue()
    backend.synchronize()
    gpu.cuda.capacity = gpu.cuda.used + 40
    past.enqueue()
    step.enqueue()
    backend.synchronize()
    assert gpu.ort.runs == ["step", "past", "step"]


def test_it_captures_no_graphs(load):
    backend, _ = load
    assert backend.supports_capture is False
    assert backend.capture(lambda: pytest.fail("it was run")) is None


def test_the_fake_has_only_what_the_real_one_has(tmp_path):
    for real, fake in (
        (onnxruntime.InferenceSession, FakeSession),
        (onnxruntime.IOBinding, FakeBinding),
        (onnxruntime, FakeOnnxRuntime),
    ):
        own = [
            name for name in vars(fake) if not name.startswith("_") and name not in ("install", "fail", "take", "work")
        ]
        assert len(own) > 1
        assert [name for name in own if not hasattr(real, name)] == []
    real = inspect.signature(onnxruntime.IOBinding.bind_input).parameters
    assert len(real) == len(inspect.signature(FakeBinding.bind_input).parameters)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    assert options.enable_mem_reuse
    session = onnxruntime.InferenceSession(save_graph(tmp_path / "step.onnx", STEP), options, providers=[CPU])
    assert {info.device_vendor_id for info in session.get_input_memory_infos()} == {0}
    subgraphs = session.get_provider_graph_assignment_info()
    assert {subgraph.ep_name for subgraph in subgraphs} == {CPU}
    assert {node.op_type for subgraph in subgraphs for node in subgraph.get_nodes()} == {"Add", "Cast"}


def test_a_terminated_run_ends_before_its_first_operator(tmp_path):
    session = onnxruntime.InferenceSession(save_graph(tmp_path / "step.onnx", STEP), providers=[CPU])
    binding, outputs = session.io_binding(), {}
    for tensor in STEP.inputs:
        binding.bind_cpu_input(tensor.name, np.ones(tensor.resolve(batch=1), tensor.dtype))
    for tensor in STEP.outputs:
        outputs[tensor.name] = array = np.full(tensor.resolve(batch=1), 7, tensor.dtype)
        binding.bind_output(tensor.name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
    options = onnxruntime.RunOptions()
    options.terminate = True
    with pytest.raises(RuntimeError, match="terminate flag"):
        session.run_with_iobinding(binding, options)
    assert all((array == 7).all() for array in outputs.values())
