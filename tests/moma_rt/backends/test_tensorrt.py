"""The TensorRT backends on a fake GPU."""

import gc
import itertools

import numpy as np
import pytest

from moma_rt.backends.tensorrt import TensorRtBackend
from moma_rt.bundle.engines import Flavour
from tests.moma_rt.backends.networks import PAST, STEP, allocate, buffer_of, check_row_filling, check_two_bindings


def test_two_bindings_of_one_network_read_each_others_output(load):
    backend, network = load
    check_two_bindings(backend, network(STEP))


def test_a_run_is_enqueued_and_not_waited_for(gpu, load):
    backend, network = load
    buffers = allocate(backend, STEP, batch=1)
    bound = network(STEP).bind(buffers)
    backend.synchronize()
    bound.enqueue()
    assert len(gpu.cuda.queue) == 1
    backend.synchronize()
    assert gpu.cuda.queue == []


def test_an_upload_copies_the_array_before_it_returns(gpu, load):
    backend, _ = load
    rows = [buffer_of(backend, (64,), "float32") for _ in range(8)]
    for value, row in enumerate(rows):
        array = np.full(64, value, np.float32)
        backend.upload(row, array)
        array.fill(np.nan)
        del array
    assert len(gpu.cuda.queue) == 16
    assert [backend.download(row).tolist() for row in rows] == [[value] * 64 for value in range(8)]


def test_an_upload_keeps_its_buffer_alive(gpu, load):
    backend, _ = load
    buffer = buffer_of(backend, (64,), "float32")
    backend.synchronize()
    backend.upload(buffer, np.ones(64, np.float32))
    del buffer
    assert len(gpu.cuda.memory) == 1
    backend.synchronize()
    assert gpu.cuda.memory == {}


def test_buffers_allocated_together_share_one_allocation(gpu, load):
    backend, _ = load
    wanted = {1: ((3, 5), "uint8"), "none": ((0, 7), "float32"), "rows": ((2, 63), "float16"), "number": ((), "int64")}
    buffers = backend.allocate(wanted)
    assert len(gpu.cuda.memory) == 1
    assert {key: (buffer.shape, buffer.dtype.name) for key, buffer in buffers.items()} == wanted
    places = sorted((buffer.memory.address, buffer.memory.size) for buffer in buffers.values())
    assert all(address % 256 == 0 for address, _ in places)
    assert len(dict(places)) == len(places), "an empty buffer has an address of its own"
    assert all(end <= start for (a, size), (start, _) in itertools.pairwise(places) for end in [a + size])
    for value, buffer in enumerate(buffers.values(), 1):
        backend.upload(buffer, np.full(buffer.shape, value, buffer.dtype))
    for value, buffer in enumerate(buffers.values(), 1):
        assert (backend.download(buffer) == value).all()
    del buffers["number"], buffer
    assert len(gpu.cuda.memory) == 1
    buffers.clear()
    assert gpu.cuda.memory == {}


@pytest.mark.parametrize("count", [1, 3, 4])
def test_a_row_is_filled_up_with_zeros(load, count):
    backend, _ = load
    check_row_filling(backend, count)


def test_enqueued_work_keeps_its_network_and_buffers_alive(gpu, load):
    backend, network = load
    result = buffer_of(backend, (2, 3), "float32")
    network(STEP).bind({**allocate(backend, STEP, batch=2), "next_x": result}).enqueue()
    gc.collect()
    assert gpu.trt.contexts[0]() is not None
    np.testing.assert_array_equal(backend.download(result), np.zeros((2, 3)))
    gc.collect()
    assert gpu.trt.contexts[0]() is None


def test_deleting_a_busy_backend_waits_and_frees_everything(gpu, tmp_path):
    backend = TensorRtBackend(Flavour.TENSORRT)
    (tmp_path / "engine.trt").write_bytes(b"step")
    backend.load(STEP, tmp_path / "engine.trt").bind(allocate(backend, STEP, batch=2)).enqueue()
    assert gpu.cuda.queue
    # Without a garbage collection, though work on the stream refers to the stream.
    gc.disable()
    try:
        del backend
    finally:
        gc.enable()
    assert gpu.cuda.queue == []
    assert (gpu.cuda.memory, gpu.cuda.streams) == ({}, 0)
    assert [context() for context in gpu.trt.contexts] == [None]


def test_an_idle_context_is_bound_to_new_buffers(gpu, load):
    backend, network = load
    loaded = network(STEP)
    bounds = [loaded.bind(allocate(backend, STEP, batch=batch)) for batch in (1, 2, 3)]
    bounds[0].enqueue()
    backend.synchronize()
    bounds.clear()
    assert sum(context() is not None for context in gpu.trt.contexts) == 1
    buffers = allocate(backend, STEP, batch=1000)
    backend.upload(buffers["ids"], np.ones((1000, 3), np.int32))
    loaded.bind(buffers).enqueue()
    assert (backend.download(buffers["next_x"]) == 1).all()
    assert len(gpu.trt.contexts) == 3


def test_a_context_that_a_graph_uses_is_not_idle(gpu, load):
    backend, network = load
    loaded, buffers = network(STEP), allocate(backend, STEP, batch=1)
    bounds = [loaded.bind(buffers)]
    bounds[0].enqueue()
    backend.synchronize()
    graph = backend.capture(bounds.pop().enqueue)
    assert loaded.idle == []
    loaded.bind(buffers)
    assert len(gpu.trt.contexts) == 2
    graph.replay()
    backend.synchronize()
    del graph
    backend.trim()
    assert [context() for context in gpu.trt.contexts] == [None, None]


def test_memory_is_freed_with_its_last_user(gpu, load):
    backend, network = load
    buffers = allocate(backend, STEP, batch=1000)
    bound = network(STEP).bind(buffers)
    bound.enqueue()
    backend.synchronize()
    full = len(gpu.cuda.memory)
    buffers.clear()
    assert len(gpu.cuda.memory) == full == 2
    del bound
    # All but the scratch region, which the next network will use.
    assert len(gpu.cuda.memory) == 1


def test_networks_share_one_scratch_region_that_grows(gpu, load):
    backend, network = load
    loaded, regions = network(STEP), []
    bounds = []
    for batch in (100, 1000, 10):
        buffers = allocate(backend, STEP, batch=batch)
        before = set(gpu.cuda.memory)
        backend.upload(buffers["ids"], np.full((batch, 3), batch, np.int32))
        bounds.append((loaded.bind(buffers), buffers))
        # Still in flight in the current region when a later network needs a larger one.
        bounds[-1][0].enqueue()
        regions.append((len(set(gpu.cuda.memory) - before), gpu.trt.contexts[-1]().scratch))
    sizes = [size for _, (_, size) in regions]
    assert [new for new, _ in regions] == [1, 1, 0]
    assert sizes == [2 * (6 * 100 + 1), 2 * (6 * 1000 + 1), sizes[1]]
    assert regions[0][1][0] not in gpu.cuda.memory
    for bound, _ in bounds:
        bound.enqueue()
    assert [context().scratch for context in gpu.trt.contexts] == [regions[1][1]] * 3
    for (_, buffers), batch in zip(bounds, (100, 1000, 10), strict=True):
        assert (backend.download(buffers["next_x"]) == batch).all()


def test_an_old_scratch_region_is_freed_before_a_larger_one_is_allocated(gpu, load):
    backend, network = load
    loaded, small, large = network(STEP), allocate(backend, STEP, batch=1 << 10), allocate(backend, STEP, batch=1 << 11)
    bound = loaded.bind(small)
    bound.enqueue()
    gpu.cuda.capacity = gpu.cuda.used + 2 * 6 * 1024
    loaded.bind(large).enqueue()
    bound.enqueue()
    backend.synchronize()
    assert gpu.cuda.used == gpu.cuda.capacity


def test_a_scratch_address_is_set_once(gpu, load, monkeypatch):
    backend, network = load
    bound = network(STEP).bind(allocate(backend, STEP, batch=1))
    given = []
    monkeypatch.setattr(gpu.trt.contexts[0](), "set_device_memory", lambda *place: given.append(place))
    gpu.trt.contexts[0]().scratch = next(iter(gpu.cuda.memory)), 256
    for _ in range(3):
        bound.enqueue()
    assert len(given) == 1


def test_a_dimension_may_be_zero(load):
    backend, network = load
    loaded = network(PAST)
    for length in (0, 3):
        buffers = allocate(backend, PAST, past=length, s=2)
        backend.upload(buffers["past"], np.ones((2, length), np.float32))
        backend.upload(buffers["new"], np.ones((2, 2), np.float32))
        loaded.bind(buffers).enqueue()
        assert backend.download(buffers["total"]) == 2 * (length + 2)
        assert backend.download(buffers["past"]).shape == (2, length)


def test_buffers_are_zeroed_and_downloads_are_copies(load):
    backend, _ = load
    buffer = buffer_of(backend, (3,), "float32")
    before = backend.download(buffer)
    backend.upload(buffer, np.ones(3, np.float32))
    assert not before.any()
    assert (backend.download(buffer) == 1).all()


@pytest.mark.parametrize("dtype", ["float32", "float16", "int64", "int32", "int8", "uint8", "bool"])
def test_every_dtype_is_uploaded_and_downloaded(load, dtype):
    backend, _ = load
    array = np.arange(12).reshape(3, 4).astype(dtype)
    buffer = buffer_of(backend, (4, 3), dtype)
    backend.upload(buffer, array.T)
    found = backend.download(buffer)
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array.T)


def test_uploads_convert_between_floats_and_refuse_everything_else(load):
    backend, _ = load
    buffer = buffer_of(backend, (2, 3), "float32")
    backend.upload(buffer, np.full((2, 3), 0.5, np.float64))
    assert (backend.download(buffer) == 0.5).all()
    backend.upload(buffer, np.broadcast_to(np.float32(2), (2, 3)))
    assert (backend.download(buffer) == 2).all()
    with pytest.raises(ValueError, match=r"shape \(3,\) does not fit a buffer of shape \(2, 3\)"):
        backend.upload(buffer, np.zeros(3, np.float32))
    with pytest.raises(TypeError):
        backend.upload(buffer_of(backend, (1,), "int32"), np.ones(1, np.float32))


def test_buffers_of_another_backend_are_refused(load):
    _, network = load
    with pytest.raises(TypeError, match="a ndarray is not a buffer in a GPU.s memory"):
        network(STEP).bind({"x": np.zeros((1, 3))})
