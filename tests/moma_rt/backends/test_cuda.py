"""Copies between the host and the device, through page-locked memory, on a fake GPU."""

import gc
import subprocess
import sys

import numpy as np
import pytest

from moma_rt.backends.cuda import Stream
from moma_rt.errors import MomaError, OutOfMemory
from tests.moma_rt.fake_cuda import CudaError

CHUNK = 1 << 22
FLOAT32, FLOAT16 = np.dtype("float32"), np.dtype("float16")


@pytest.fixture
def stream(gpu):
    return Stream()


def test_an_upload_larger_than_all_page_locked_memory(gpu, stream):
    count = 6 * CHUNK // 4 + 63
    array = np.arange(count, dtype=np.float32)
    memory = stream.allocate(array.nbytes)
    stream.copy_in(memory, array, FLOAT32)
    assert gpu.cuda.waits == 0, "it waits for the events of reused chunks, not for the stream"
    assert len(gpu.cuda.queue) == 4, "the last chunks are not copied yet"
    array.fill(np.nan)
    np.testing.assert_array_equal(stream.copy_out(memory, FLOAT32, count), np.arange(count))
    assert len(gpu.cuda.pinned) == 4


def test_many_small_uploads_in_a_row(gpu, stream):
    memory = [stream.allocate(300_000) for _ in range(70)]
    for value, place in enumerate(memory):
        array = np.full(75_000, value, np.float64)
        stream.copy_in(place, array, FLOAT32)
        array.fill(np.nan)
    assert gpu.cuda.waits == 0
    for value, place in enumerate(memory):
        assert (stream.copy_out(place, FLOAT32, 75_000) == value).all()


def test_numbers_are_converted_on_the_way(stream):
    memory = stream.allocate(1000)
    stream.copy_in(memory, np.array([[0.5, 65504.0], [-1.0, 1e-7]])[:, ::-1], FLOAT16)
    np.testing.assert_array_equal(stream.copy_out(memory, FLOAT16, 4), np.float16([65504.0, 0.5, 1e-7, -1.0]))
    with pytest.raises(TypeError, match="same_kind"):
        stream.copy_in(memory, np.ones(3), np.dtype("int32"))


def test_empty_arrays(gpu, stream):
    memory = stream.allocate(0)
    stream.copy_in(memory, np.ones((0, 3), np.float32), FLOAT32)
    stream.clear(memory)
    assert stream.copy_out(memory, FLOAT32, 0).shape == (0,)
    assert gpu.cuda.queue == [], "the download waited for earlier work"


def test_page_locked_memory_is_reused_after_a_synchronization(gpu, stream):
    memory = stream.allocate(CHUNK)
    for _ in range(3):
        stream.copy_in(memory, np.ones(CHUNK // 4 - 64, np.float32), FLOAT32)
        stream.synchronize()
    assert gpu.cuda.event_records == 0, "one chunk was enough"


def test_out_of_memory_for_page_locked_memory(gpu, stream):
    memory = stream.allocate(100)
    gpu.cuda.failures["cudaHostAlloc"] = CudaError.cudaErrorMemoryAllocation
    with pytest.raises(OutOfMemory, match=r"^cudaHostAlloc of 4194304 bytes failed: cudaErrorMemoryAllocation"):
        stream.copy_in(memory, np.ones(25, np.float32), FLOAT32)
    assert gpu.cuda.events == {}
    stream.copy_in(memory, np.ones(25, np.float32), FLOAT32)
    assert stream.copy_out(memory, FLOAT32, 25).tolist() == [1] * 25


@pytest.mark.parametrize("call", ["cudaEventRecord", "cudaEventSynchronize"])
def test_a_failing_event_is_named_and_the_next_upload_works(gpu, stream, call):
    count = 5 * CHUNK // 4
    memory = stream.allocate(4 * count)
    gpu.cuda.failures[call] = CudaError.cudaErrorIllegalAddress
    with pytest.raises(MomaError, match=f"^{call} failed: cudaErrorIllegalAddress$"):
        stream.copy_in(memory, np.zeros(count, np.float32), FLOAT32)
    stream.copy_in(memory, np.arange(count, dtype=np.float32), FLOAT32)
    np.testing.assert_array_equal(stream.copy_out(memory, FLOAT32, count), np.arange(count))


def test_limit_run_ahead_allows_one_piece_of_work(gpu, stream):
    memory = stream.allocate(256)
    ahead = []
    for _ in range(4):
        stream.clear(memory)
        stream.limit_run_ahead()
        ahead.append(len(gpu.cuda.queue))
    assert (ahead, gpu.cuda.waits, len(gpu.cuda.events)) == ([1, 1, 1, 1], 0, 2)


def test_memory_outlives_the_copies_within_the_device(gpu, stream):
    memory = [stream.allocate(256) for _ in range(2)]
    stream.synchronize()
    stream.copy_within(*memory)
    memory.clear()
    assert len(gpu.cuda.memory) == 2
    stream.synchronize()
    assert gpu.cuda.memory == {}


def test_memory_outlives_a_copy_that_was_not_waited_for(gpu, stream):
    memory = stream.allocate(100)
    gpu.cuda.failures["cudaStreamSynchronize"] = CudaError.cudaErrorIllegalAddress
    with pytest.raises(MomaError, match="^cudaStreamSynchronize failed"):
        stream.copy_out(memory, FLOAT32, 25)
    gc.collect()
    del memory
    assert gpu.cuda.queue
    assert len(gpu.cuda.memory) == 1
    stream.synchronize()


def test_a_graph_keeps_only_the_memory_it_uses_alive(gpu, stream):
    used, queued = [stream.allocate(100)], [stream.allocate(300)]
    stream.clear(queued.pop())
    graph = stream.capture(lambda: stream.clear(used.pop()))
    assert len(gpu.cuda.memory) == 2
    stream.synchronize()
    assert [len(memory) for memory in gpu.cuda.memory.values()] == [256]
    del graph
    assert gpu.cuda.memory == {}


def test_a_graph_has_no_negative_size_if_others_free_memory_meanwhile(gpu, stream, monkeypatch):
    upload = gpu.cuda.cudaGraphUpload

    def upload_beside_others(*arguments):
        gpu.cuda.capacity += 1000
        return upload(*arguments)

    monkeypatch.setattr(gpu.cuda, "cudaGraphUpload", upload_beside_others)
    memory = stream.allocate(100)
    assert stream.capture(lambda: stream.clear(memory)).size == 0


def test_no_garbage_is_collected_while_the_stream_is_captured(gpu, stream):
    """Garbage may own device memory, and freeing that would end the capture."""
    memory = [stream.allocate(100)]
    stream.synchronize()

    def enqueue():
        circle = [memory.pop()]
        circle.append(circle)
        del circle
        for _ in range(10):
            kept = [[] for _ in range(10_000)]
        del kept

    stream.capture(enqueue)
    assert gpu.cuda.memory != {}
    assert gc.isenabled()
    gc.collect()
    assert gpu.cuda.memory == {}


def test_a_capture_leaves_garbage_collection_as_it_was(stream):
    gc.disable()
    try:
        stream.capture(lambda: None)
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.parametrize("call", ["cudaStreamBeginCapture", "cudaStreamEndCapture"])
def test_a_capture_that_fails_leaves_nothing(gpu, stream, call):
    memory = stream.allocate(100)
    gpu.cuda.failures[call] = CudaError.cudaErrorIllegalAddress
    with pytest.raises(MomaError, match=f"^{call} failed: cudaErrorIllegalAddress$"):
        stream.capture(lambda: stream.clear(memory))
    assert (gpu.cuda.graphs, gpu.cuda.captured, gpu.cuda.queue) == ({}, None, [])
    assert gc.isenabled()
    stream.launch(stream.capture(lambda: stream.clear(memory)))
    assert not stream.copy_out(memory, FLOAT32, 25).any()


def test_a_process_synchronizes_the_stream_before_it_exits(repository):
    """At exit Python destroys a library's objects, which work on the stream may still use."""
    script = """if True:
        import atexit, sys
        from tests.moma_rt.fake_cuda import FakeCuda
        cuda = FakeCuda(1 << 20)
        sys.modules[cuda.__name__] = cuda
        atexit.register(lambda: print(cuda.queue, len(cuda.memory), cuda.streams))
        from moma_rt.backends.cuda import Stream
        class Backend: pass
        backend, stream = Backend(), Stream()
        stream.synchronize_at_end_of(backend)
        stream.clear(stream.allocate(100))
        assert cuda.queue
    """
    done = subprocess.run([sys.executable, "-c", script], cwd=repository, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("[] 0 1\n", "")


@pytest.mark.filterwarnings("error")
def test_a_device_that_fails_at_exit_is_no_error(gpu, stream):
    class Backend:
        pass

    backend, memory = Backend(), stream.allocate(100)
    stream.synchronize_at_end_of(backend)
    stream.clear(memory)
    gpu.cuda.failures["cudaStreamSynchronize"] = CudaError.cudaErrorIllegalAddress
    del backend
    assert gpu.cuda.failures == {}


def test_a_copy_larger_than_its_target_is_refused(stream):
    with pytest.raises(AssertionError):
        stream.copy_within(stream.allocate(300), stream.allocate(301))


def test_deleting_the_stream_frees_everything(gpu):
    stream = Stream()
    stream.copy_in(stream.allocate(100), np.ones(25, np.float32), FLOAT32)
    stream.limit_run_ahead()
    del stream
    gc.collect()
    assert (gpu.cuda.pinned, gpu.cuda.events, gpu.cuda.memory, gpu.cuda.streams) == ({}, {}, {}, 0)
