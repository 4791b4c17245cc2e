"""Failures of any CUDA call, and any amount of memory, on a fake GPU.

A call returns its pictures or raises its error, and later calls are not affected.
"""

import gc

import numpy as np
import pytest

from moma_rt.bundle.manifest import Bundle
from moma_rt.errors import MomaError, OutOfMemory
from moma_rt.runtime import Runtime
from tests.moma_rt.fake_cuda import NULL_GRAPH, CudaError, FakeCuda
from tests.moma_rt.test_runtime_engines import bundle, gpu  # noqa: F401

# Subject, prompt and options.
CALLS = (
    (0, "A car.", {"steps": 2}),
    (1, "A car.", {"steps": 3, "num_images": 2}),
    (1, "A car on a hill.", {"steps": 3, "scheduler": "lcm"}),
    (0, "A car.", {"steps": 2, "on_step": lambda _: None}),
)
# Calls that free something: their failures are ignored, and a simulated one would leak.
ENDING = ("Free", "FreeHost", "EventDestroy", "GraphDestroy", "GraphExecDestroy", "StreamDestroy")


@pytest.fixture
def subjects(bundle, fakes, photo, mask):  # noqa: F811
    plain = Runtime(Bundle.open(bundle), fakes.FakeBackend())
    return [plain.enroll(photo.rotate(90 * i), mask, "car") for i in range(2)]


@pytest.fixture
def make(bundle, fakes, subjects):  # noqa: F811
    """Run all of `CALLS`, check their pictures, and return how many succeeded; errors of type `error` are ignored."""

    def pictures(runtime, subject, prompt, options):
        return np.stack([np.asarray(image) for image in runtime.generate(subjects[subject], prompt, **options).images])

    plain = Runtime(Bundle.open(bundle), fakes.FakeBackend())
    expected = [pictures(plain, *call) for call in CALLS]

    def made(runtime, error=()):
        count = 0
        for call, wanted in zip(CALLS, expected, strict=True):
            try:
                found = pictures(runtime, *call)
            except error:
                continue
            np.testing.assert_array_equal(found, wanted)
            count += 1
        return count

    return made


@pytest.fixture
def fail(monkeypatch):
    """Make the n-th CUDA call from now on fail; None: no call. Returns the number of calls since this was last used.

    Calls that free something are not counted.
    """
    get = FakeCuda.__getattribute__
    state = {"failing": None, "error": None, "count": 0}

    def counted(cuda, name):
        value = get(cuda, name)
        if not callable(value) or isinstance(value, type) or not name.startswith("cuda") or name[4:] in ENDING:
            return value

        def call(*arguments):
            state["count"] += 1
            if state["count"] != state["failing"]:
                return value(*arguments)
            if name == "cudaStreamEndCapture":
                cuda.graphs.pop(value(*arguments)[1], None)
                return state["error"], NULL_GRAPH
            return state["error"], None

        return call

    monkeypatch.setattr(FakeCuda, "__getattribute__", counted)

    def set_failing(failing, error=None):
        before = state["count"]
        state.update(failing=failing, error=error, count=0)
        return before

    return set_failing


def check_nothing_is_left(gpu, *runtime):  # noqa: F811
    """Delete a runtime that nothing else references; all it had on the device must be freed without a collection."""
    gc.disable()
    try:
        del runtime
        cuda = gpu.cuda
        left = (cuda.graphs, cuda.memory, cuda.pinned, cuda.events, cuda.streams, cuda.queue, cuda.wrong)
        assert left == ({}, {}, {}, {}, 0, [], [])
    finally:
        gc.enable()


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 7])
@pytest.mark.parametrize("error", ["cudaErrorMemoryAllocation", "cudaErrorIllegalAddress"])
def test_any_cuda_call_may_fail(gpu, bundle, make, fail, every, error):  # noqa: F811
    runtimes = [Runtime.load(bundle, "tensorrt")]
    fail(None)
    assert make(runtimes[0]) == len(CALLS)
    total = fail(None)
    check_nothing_is_left(gpu, runtimes.pop())
    assert total > 100
    for failing in range(1, total, every):
        runtimes.append(Runtime.load(bundle, "tensorrt"))
        fail(failing, CudaError[error])
        assert make(runtimes[0], MomaError) >= len(CALLS) - 1, failing
        fail(None)
        assert make(runtimes[0]) == len(CALLS), failing
        check_nothing_is_left(gpu, runtimes.pop())


@pytest.mark.parametrize("budget", [None, 14])
def test_any_amount_of_device_memory(gpu, bundle, make, budget):  # noqa: F811
    """A call that succeeded once succeeds again, and more memory never makes fewer pictures."""
    runtimes = [Runtime.load(bundle, "tensorrt", memory_budget=budget)]
    enough = gpu.cuda.capacity
    assert make(runtimes[0]) == len(CALLS)
    used = gpu.cuda.used
    check_nothing_is_left(gpu, runtimes.pop())
    counts = []
    for part in range(11):
        gpu.cuda.capacity = used * part // 5
        runtimes.append(Runtime.load(bundle, "tensorrt", memory_budget=budget))
        counts.append(make(runtimes[0], OutOfMemory))
        assert make(runtimes[0], OutOfMemory) == counts[-1]
        gpu.cuda.capacity = enough
        assert make(runtimes[0]) == len(CALLS)
        check_nothing_is_left(gpu, runtimes.pop())
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0, len(CALLS))


@pytest.mark.parametrize("method", ["allocate", "upload", "download"])
def test_memory_that_runs_out_in_the_host_is_an_error_of_one_line(fakes, fake_bundle, photo, mask, method, monkeypatch):
    """Once: other buffers are evicted and the call succeeds, if it allocates. For ever: OutOfMemory, until it ends."""
    backend = fakes.FakeBackend()
    runtime = Runtime(Bundle.open(fake_bundle), backend)
    subject = runtime.enroll(photo, mask, "car")
    expected = np.asarray(runtime.generate(subject, "A car.", steps=2).images[0])
    work, failures = getattr(backend, method), []

    def failing(*arguments):
        if failures:
            failures.pop()
            raise MemoryError("Unable to allocate 3 GiB")
        return work(*arguments)

    monkeypatch.setattr(backend, method, failing)
    failures.append(None)
    # The first result of a new prompt: evicting and trying again helps.
    assert runtime.generate(subject, "A car on a hill.", steps=2).images
    failures[:] = [None] * 50
    with pytest.raises(OutOfMemory, match=r"too little memory: Unable to allocate 3 GiB; close other"):
        runtime.generate(subject, "A car in a lake.", steps=2)
    with pytest.raises(OutOfMemory, match=r"too little memory: Unable to allocate 3 GiB; close other"):
        runtime.enroll(photo, mask, "green car")
    failures.clear()
    np.testing.assert_array_equal(runtime.generate(subject, "A car.", steps=2).images[0], expected)


def test_memory_errors_of_loading_are_out_of_memory(fake_bundle, monkeypatch):
    def choose(*_):
        raise MemoryError

    monkeypatch.setattr("moma_rt.runtime.choose", choose)
    with pytest.raises(OutOfMemory, match="too little memory: an allocation failed"):
        Runtime.load(fake_bundle)
