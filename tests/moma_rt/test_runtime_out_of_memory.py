"""Out of memory, and the memory limits of cached graphs and buffers, on a fake GPU."""

import numpy as np
import pytest

from moma_rt.errors import Cancelled
from moma_rt.runtime import Runtime
from tests.moma_rt.fake_cuda import CudaError
from tests.moma_rt.test_runtime_engines import bundle, gpu  # noqa: F401
from tests.moma_rt.test_runtime_graphs import PROMPT, eager, enqueued, pixels  # noqa: F401


@pytest.fixture
def runtime(gpu, bundle):  # noqa: F811
    return Runtime.load(bundle, "tensorrt")


@pytest.fixture
def subject(runtime, photo, mask):
    return runtime.enroll(photo, mask, "car")


def test_graphs_are_cached_up_to_graph_memory(gpu, bundle, photo, mask, enqueued):  # noqa: F811
    def captures(**options):
        enqueued.clear()
        runtime.generate(subject, PROMPT, **options)
        return "denoiser" in enqueued

    runtime = Runtime.load(bundle, "tensorrt")
    subject = runtime.enroll(photo, mask, "car")
    buffers = bytes_with_two_graphs(runtime, subject)
    # Fits buffers of one size with two graphs, or of two sizes with one graph each.
    runtime = Runtime.load(bundle, "tensorrt", graph_memory=int(2.2 * buffers))
    small, long, wide = {"steps": 1}, {"steps": 2}, {"steps": 1, "num_images": 2}
    assert [captures(**options) for options in (small, long, small, long)] == [True, True, False, False]
    assert captures(**wide)
    assert runtime._sampler._buffers.size <= 2.2 * buffers or len(runtime._sampler._buffers) == 1
    assert not captures(**wide)
    assert captures(**small), "the older size was evicted"


def bytes_with_two_graphs(runtime, subject):
    """Bytes of buffers of one size with two graphs."""
    for steps in (1, 2):
        runtime.generate(subject, PROMPT, steps=steps)
    return runtime._sampler._buffers.size


def test_graphs_count_with_the_device_memory_they_use(gpu, runtime, subject):  # noqa: F811
    runtime.generate(subject, PROMPT, steps=5)
    (buffers,) = runtime._sampler._buffers._values.values()
    before, used = buffers.size, gpu.cuda.used
    # Nodes: a copied row and a run per step, and the decoding.
    runtime.generate(subject, PROMPT, steps=9)
    assert buffers.size - before == gpu.cuda.used - used == (2 * 9 + 1) * 64
    # Captured again: each step also copies a row of the noise table.
    runtime.generate(subject, PROMPT, steps=5, scheduler="lcm")
    assert buffers.size - before == gpu.cuda.used - used == (3 * 5 + 1) * 64 - (2 * 5 + 1) * 64 + 5 * 4 * 8 * 8 * 4


@pytest.mark.parametrize("budget", [1, 64 * (2 * 9 + 1)])
def test_one_graph_is_kept_whatever_its_size(gpu, bundle, photo, mask, budget):  # noqa: F811
    runtime = Runtime.load(bundle, "tensorrt", graph_memory=budget)
    subject = runtime.enroll(photo, mask, "car")
    for steps in (9, 3, 9, 9):
        runtime.generate(subject, PROMPT, steps=steps)
        assert len(gpu.cuda.graphs) == 1
    assert gpu.cuda.launches == 4


def test_out_of_memory_evicts_buffers_of_other_sizes(gpu, runtime, subject, eager):  # noqa: F811
    for count in (1, 2):
        runtime.generate(subject, PROMPT, steps=2, num_images=count)
    gpu.cuda.capacity = gpu.cuda.used + 10_000
    expected = eager(steps=2, num_images=4)
    np.testing.assert_array_equal(pixels(runtime.generate(subject, PROMPT, steps=2, num_images=4)), expected)
    assert len(runtime._sampler._buffers) == 1


def test_out_of_memory_for_a_new_prompt_evicts_buffers(gpu, runtime, subject):  # noqa: F811
    for count in (1, 2):
        runtime.generate(subject, PROMPT, steps=2, num_images=count)
    gpu.cuda.capacity = gpu.cuda.used + 100
    assert runtime.generate(subject, "A car of which nobody has heard yet.", steps=2).images


def test_a_capture_that_runs_out_of_memory_is_retried(gpu, runtime, subject, eager):  # noqa: F811
    gpu.cuda.failures["cudaGraphInstantiate"] = CudaError.cudaErrorMemoryAllocation
    expected = eager(steps=3)
    for launches in (1, 2):
        # Other caches are evicted, and the capture is retried.
        np.testing.assert_array_equal(pixels(runtime.generate(subject, PROMPT, steps=3)), expected)
        assert gpu.cuda.launches == launches


def leave_no_free_memory(gpu, runtime):  # noqa: F811
    """Shrink the device's memory to what is in use."""
    runtime._networks.backend.synchronize()
    gpu.cuda.capacity = gpu.cuda.used


def test_a_capture_that_runs_out_of_memory_evicts_other_graphs(gpu, runtime, subject, eager, enqueued):  # noqa: F811
    for options in ({"steps": 2, "num_images": 2}, {"steps": 2}):
        runtime.generate(subject, PROMPT, **options)
    leave_no_free_memory(gpu, runtime)
    expected = eager(steps=7)
    for is_captured in (True, False):
        enqueued.clear()
        launches = gpu.cuda.launches
        np.testing.assert_array_equal(pixels(runtime.generate(subject, PROMPT, steps=7)), expected)
        assert gpu.cuda.launches == launches + 1
        assert ("denoiser" in enqueued) == is_captured


def test_buffers_of_a_cancelled_generation_are_evicted(gpu, runtime, subject, eager):  # noqa: F811
    """Its last step may still be running in them."""
    with pytest.raises(Cancelled):
        runtime.generate(subject, PROMPT, steps=2, num_images=4, on_step=lambda _: False)
    assert gpu.cuda.queue
    gpu.cuda.capacity = gpu.cuda.used
    np.testing.assert_array_equal(pixels(runtime.generate(subject, PROMPT, steps=2)), eager(steps=2))


def test_a_capture_that_never_fits_is_not_tried_again(gpu, runtime, subject, eager, enqueued, monkeypatch):  # noqa: F811
    refused = CudaError.cudaErrorMemoryAllocation, None
    monkeypatch.setattr(gpu.cuda, "cudaGraphInstantiate", lambda *_: refused)
    found = pixels(runtime.generate(subject, PROMPT, steps=3))
    enqueued.clear()
    np.testing.assert_array_equal(pixels(runtime.generate(subject, PROMPT, steps=3)), found)
    np.testing.assert_array_equal(found, eager(steps=3))
    assert (enqueued.count("denoiser"), gpu.cuda.launches) == (3, 0)


def test_out_of_memory_for_noise_tables_evicts_other_sizes(gpu, runtime, subject, eager):  # noqa: F811
    for options in ({"steps": 2, "num_images": 2}, {"steps": 2}):
        runtime.generate(subject, PROMPT, **options)
    leave_no_free_memory(gpu, runtime)
    options = {"steps": 40, "scheduler": "lcm"}
    np.testing.assert_array_equal(pixels(runtime.generate(subject, PROMPT, **options)), eager(**options))
