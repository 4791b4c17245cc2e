"""Memory that is short, and how much of it is kept for the next picture, on a GPU of NumPy."""

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


def test_recordings_are_kept_as_far_as_their_memory_goes(gpu, bundle, photo, mask, enqueued):  # noqa: F811
    def recorded(**options):
        enqueued.clear()
        runtime.generate(subject, PROMPT, **options)
        return "denoiser" in enqueued

    runtime = Runtime.load(bundle, "tensorrt")
    subject = runtime.enroll(photo, mask, "car")
    buffers = sizes_of_pictures(runtime, subject)
    # Room for one size of pictures with two recordings, or for two sizes with one each.
    runtime = Runtime.load(bundle, "tensorrt", graph_memory=int(2.2 * buffers))
    small, long, wide = {"steps": 1}, {"steps": 2}, {"steps": 1, "num_images": 2}
    assert [recorded(**options) for options in (small, long, small, long)] == [True, True, False, False]
    assert recorded(**wide)
    assert runtime._sampler._buffers.size <= 2.2 * buffers or len(runtime._sampler._buffers) == 1
    assert not recorded(**wide)
    assert recorded(**small), "the older size went"


def sizes_of_pictures(runtime, subject):
    """Bytes of one size of pictures with two recordings."""
    for steps in (1, 2):
        runtime.generate(subject, PROMPT, steps=steps)
    return runtime._sampler._buffers.size


def test_recordings_count_as_what_they_take_of_the_device(gpu, runtime, subject):  # noqa: F811
    runtime.generate(subject, PROMPT, steps=5)
    (buffers,) = runtime._sampler._buffers._values.values()
    before, used = buffers.size, gpu.cuda.used
    # Of steps, each a copied row and a run, and of the decoding.
    runtime.generate(subject, PROMPT, steps=9)
    assert buffers.size - before == gpu.cuda.used - used == (2 * 9 + 1) * 64
    # Recorded anew, where a step copies a row of a table of noise as well.
    runtime.generate(subject, PROMPT, steps=5, scheduler="lcm")
    assert buffers.size - before == gpu.cuda.used - used == (3 * 5 + 1) * 64 - (2 * 5 + 1) * 64 + 5 * 4 * 8 * 8 * 4


@pytest.mark.parametrize("budget", [1, 64 * (2 * 9 + 1)])
def test_one_recording_is_kept_whatever_it_takes(gpu, bundle, photo, mask, budget):  # noqa: F811
    runtime = Runtime.load(bundle, "tensorrt", graph_memory=budget)
    subject = runtime.enroll(photo, mask, "car")
    for steps in (9, 3, 9, 9):
        runtime.generate(subject, PROMPT, steps=steps)
        assert len(gpu.cuda.graphs) == 1
    assert gpu.cuda.launches == 4


def test_memory_that_is_short_is_made_by_forgetting_other_sizes(gpu, runtime, subject, eager):  # noqa: F811
    for count in (1, 2):
        runtime.generate(subject, PROMPT, steps=2, num_images=count)
    gpu.cuda.capacity = gpu.cuda.used + 10_000
    expected = eager(steps=2, num_images=4)
    np.testing.assert_array_equal(pixels(runtime.generate(subject, PROMPT, steps=2, num_images=4)), expected)
    assert len(runtime._sampler._buffers) == 1


def test_a_new_prompt_finds_room_as_well(gpu, runtime, subject):  # noqa: F811
    for count in (1, 2):
        runtime.generate(subject, PROMPT, steps=2, num_images=count)
    gpu.cuda.capacity = gpu.cuda.used + 100
    assert runtime.generate(subject, "A car of which nobody has heard yet.", steps=2).images


def test_a_recording_for_which_there_is_no_room_is_made_later(gpu, runtime, subject, eager):  # noqa: F811
    gpu.cuda.failures["cudaGraphInstantiate"] = CudaError.cudaErrorMemoryAllocation
    expected = eager(steps=3)
    for launches in (1, 2):
        # The others make room, and it is tried again.
        np.testing.assert_array_equal(pixels(runtime.generate(subject, PROMPT, steps=3)), expected)
        assert gpu.cuda.launches == launches


def without_room(gpu, runtime):  # noqa: F811
    """Leave the device no byte beside what is in use."""
    runtime._networks.backend.synchronize()
    gpu.cuda.capacity = gpu.cuda.used


def test_whatever_is_only_kept_makes_room_for_a_recording(gpu, runtime, subject, eager, enqueued):  # noqa: F811
    for options in ({"steps": 2, "num_images": 2}, {"steps": 2}):
        runtime.generate(subject, PROMPT, **options)
    without_room(gpu, runtime)
    expected = eager(steps=7)
    for is_recorded in (True, False):
        enqueued.clear()
        launches = gpu.cuda.launches
        np.testing.assert_array_equal(pixels(runtime.generate(subject, PROMPT, steps=7)), expected)
        assert gpu.cuda.launches == launches + 1
        assert ("denoiser" in enqueued) == is_recorded


def test_what_a_cancelled_generation_left_makes_room(gpu, runtime, subject, eager):  # noqa: F811
    """Its last step may still run in that memory."""
    with pytest.raises(Cancelled):
        runtime.generate(subject, PROMPT, steps=2, num_images=4, on_step=lambda _: False)
    assert gpu.cuda.queue
    gpu.cuda.capacity = gpu.cuda.used
    np.testing.assert_array_equal(pixels(runtime.generate(subject, PROMPT, steps=2)), eager(steps=2))


def test_what_never_has_room_to_be_recorded_is_tried_once(gpu, runtime, subject, eager, enqueued, monkeypatch):  # noqa: F811
    refused = CudaError.cudaErrorMemoryAllocation, None
    monkeypatch.setattr(gpu.cuda, "cudaGraphInstantiate", lambda *_: refused)
    found = pixels(runtime.generate(subject, PROMPT, steps=3))
    enqueued.clear()
    np.testing.assert_array_equal(pixels(runtime.generate(subject, PROMPT, steps=3)), found)
    np.testing.assert_array_equal(found, eager(steps=3))
    assert (enqueued.count("denoiser"), gpu.cuda.launches) == (3, 0)


def test_other_sizes_make_room_for_tables(gpu, runtime, subject, eager):  # noqa: F811
    for options in ({"steps": 2, "num_images": 2}, {"steps": 2}):
        runtime.generate(subject, PROMPT, **options)
    without_room(gpu, runtime)
    options = {"steps": 40, "scheduler": "lcm"}
    np.testing.assert_array_equal(pixels(runtime.generate(subject, PROMPT, **options)), eager(**options))
