"""The whole runtime on ONNX Runtime's CUDA provider, on a fake GPU: real networks, computed on the CPU."""

import contextlib
import gc
from types import SimpleNamespace

import numpy as np
import pytest

from moma_rt.bundle.engines import Device
from moma_rt.errors import Cancelled, OutOfMemory
from moma_rt.runtime import Runtime
from tests.moma_rt.fake_cuda import FakeCuda
from tests.moma_rt.fake_onnxruntime import FakeOnnxRuntime

PROMPT = "A car on a beach."
CALLS = [
    {"steps": 3},
    {"steps": 2, "num_images": 5, "seed": 1},
    {"steps": 4, "scheduler": "lcm", "guidance_scale": 1.0, "strength": 0.4},
    {"steps": 5, "scheduler": "dpmpp_2m", "guidance_interval": (300, 700), "num_images": 2},
    {"steps": 3, "context_embedding": np.ones(1024, np.float32)},
    {"steps": 3},
]


@pytest.fixture
def gpu(monkeypatch):
    cuda = FakeCuda(1 << 30)
    ort = FakeOnnxRuntime.install(monkeypatch, cuda)
    # The real provider wants the language model's `token_ids` there.
    ort.on_host.add("token_ids")
    monkeypatch.setattr("moma_rt.backends.selection.local_device", lambda: Device("H100", 90))
    yield SimpleNamespace(cuda=cuda, ort=ort)
    assert cuda.wrong == []


@pytest.fixture
def runtime(gpu, tiny_bundle):
    return Runtime.load(tiny_bundle)


@pytest.fixture
def subject(runtime, photo, mask):
    return runtime.enroll(photo, mask, "car")


@pytest.fixture(scope="module")
def expected(tiny_bundle, photo, mask):
    """The CPU's results of the same calls: the subject, and each call's pictures and masks."""
    runtime = Runtime.load(tiny_bundle, "onnxruntime", threads=1)
    subject = runtime.enroll(photo, mask, "car")
    return subject, [content(runtime.generate(subject, PROMPT, **options)) for options in CALLS]


def content(result):
    return [np.asarray(image) for image in result.images], result.foreground_masks


def test_the_pictures_equal_the_cpus_to_the_bit(gpu, runtime, subject, expected):
    assert runtime._networks.backend.name == "onnxruntime_cuda", "with a GPU, it is chosen without a warning"
    on_cpu, wanted = expected
    tensors = on_cpu.inputs() | {"prefix": on_cpu.prefix.kv}
    for name, tensor in (subject.inputs() | {"prefix": subject.prefix.kv}).items():
        np.testing.assert_array_equal(tensor, tensors[name])
    for options, (images, masks) in zip(CALLS, wanted, strict=True):
        found = content(runtime.generate(subject, PROMPT, **options))
        np.testing.assert_array_equal(found[0], images)
        np.testing.assert_array_equal(found[1], masks)
        assert np.std(images) > 10


def test_the_host_does_not_wait_between_steps(gpu, runtime, subject):
    waits = []
    for steps in (2, 9, 2, 9):
        before, runs = gpu.cuda.waits, len(gpu.ort.runs)
        runtime.generate(subject, PROMPT, steps=steps)
        waits.append(gpu.cuda.waits - before)
        assert gpu.ort.runs[runs:].count("denoiser") == steps
    # The first call reads its prompts. Then: the last step, picture, its mean, and foreground mask.
    assert waits[1:] == [4, 4, 4]


def test_a_second_picture_allocates_no_memory(gpu, runtime, subject):
    runtime.generate(subject, PROMPT, steps=2)
    before = dict(gpu.cuda.memory)
    runtime.generate(subject, PROMPT, steps=7, seed=1)
    assert gpu.cuda.memory.keys() == before.keys()


def test_a_callback_sees_each_step_and_may_cancel(runtime, subject, expected):
    steps = []
    found = runtime.generate(subject, PROMPT, steps=3, on_step=lambda info: steps.append(info.step))
    np.testing.assert_array_equal(content(found)[0], expected[1][0][0])
    assert steps == [1, 2, 3]
    with pytest.raises(Cancelled, match="after step 2 of 3"):
        runtime.generate(subject, PROMPT, steps=3, on_step=lambda info: info.step < 2)
    np.testing.assert_array_equal(content(runtime.generate(subject, PROMPT, steps=3))[0], expected[1][0][0])


def test_out_of_memory_ends_a_call_and_not_the_runtime(gpu, runtime, subject):
    expected = content(runtime.generate(subject, PROMPT, steps=1))[0]
    fits = []
    for room in range(0, 5 << 20, 3 << 17):
        gpu.cuda.capacity = gpu.cuda.used + room
        with contextlib.suppress(OutOfMemory):
            runtime.generate(subject, PROMPT, steps=1, num_images=4)
            fits.append(room)
        # Whether the buffers or a network ran out of memory, a single picture still fits.
        np.testing.assert_array_equal(content(runtime.generate(subject, PROMPT, steps=1))[0], expected)
        gpu.cuda.capacity = 1 << 30
        runtime._sampler._buffers.clear()
        runtime._networks.backend.trim()
        runtime.generate(subject, PROMPT, steps=1)
    assert 0 < len(fits) < 4


def test_networks_are_evicted_to_fit_a_memory_budget(gpu, tiny_bundle, photo, mask, expected):
    runtime = Runtime.load(tiny_bundle, "onnxruntime_cuda", memory_budget="12MB")
    subject = runtime.enroll(photo, mask, "car")
    np.testing.assert_array_equal(content(runtime.generate(subject, PROMPT, steps=3))[0], expected[1][0][0])
    assert set(runtime._networks._loaded) < set(runtime.bundle.manifest.networks)


def test_deleting_the_runtime_frees_everything(gpu, tiny_bundle, photo, mask):
    runtime = Runtime.load(tiny_bundle)
    runtime.generate(runtime.enroll(photo, mask, "car"), PROMPT, steps=2)
    # Immediately, not at the next garbage collection: another runtime may need the memory.
    gc.disable()
    try:
        del runtime
        assert (gpu.cuda.memory, gpu.cuda.pinned, gpu.cuda.streams) == ({}, {}, 0)
    finally:
        gc.enable()
