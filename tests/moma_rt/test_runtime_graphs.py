"""A whole generation as one CUDA graph, on a fake GPU: when it is captured, replayed, or run step by step."""

import contextlib
import dataclasses
import gc
from types import SimpleNamespace

import numpy as np
import pytest

from moma_rt.backends.tensorrt import TensorRtBackend
from moma_rt.bundle.manifest import Bundle
from moma_rt.errors import Cancelled, MomaError
from moma_rt.runtime import Runtime
from tests.moma_rt.fake_cuda import CudaError
from tests.moma_rt.fake_gpu import Context
from tests.moma_rt.test_runtime_engines import bundle, gpu  # noqa: F401

PROMPT = "A car on a beach."


@pytest.fixture
def runtime(gpu, bundle):  # noqa: F811
    return Runtime.load(bundle, "tensorrt")


@pytest.fixture
def subject(runtime, photo, mask):
    return runtime.enroll(photo, mask, "car")


@pytest.fixture
def eager(bundle, fakes, photo, mask):  # noqa: F811
    """Pictures of the same call on a backend without CUDA graphs."""
    plain = Runtime(Bundle.open(bundle), fakes.FakeBackend())
    subject = plain.enroll(photo, mask, "car")
    return lambda **options: pixels(plain.generate(subject, PROMPT, **options))


@pytest.fixture
def enqueued(monkeypatch):
    """Names of networks that were enqueued one by one, eagerly or in a capture, and not by a replay."""
    calls = []
    execute = Context.execute_async_v3
    monkeypatch.setattr(Context, "execute_async_v3", lambda *a: (calls.append(a[0].engine.spec.name), execute(*a))[1])
    return calls


def pixels(result):
    return np.stack([np.asarray(image) for image in result.images])


def test_a_second_generation_is_one_launch(gpu, runtime, subject, eager, enqueued):  # noqa: F811
    runtime.generate(subject, PROMPT, steps=5)
    # Both bindings run twice to warm up; then the capture.
    assert enqueued.count("denoiser") == 2 * 2 + 5
    assert enqueued.count("vae_decoder") == 2 * 2 + 1
    enqueued.clear()
    used, launches = gpu.cuda.used, gpu.cuda.launches
    for seed, strength in ((1, 1.0), (2, 0.4)):
        found = pixels(runtime.generate(subject, PROMPT, steps=5, seed=seed, strength=strength))
        np.testing.assert_array_equal(found, eager(steps=5, seed=seed, strength=strength))
    assert "denoiser" not in enqueued
    assert "vae_decoder" not in enqueued
    assert (gpu.cuda.used, gpu.cuda.launches) == (used, launches + 2)


@pytest.mark.parametrize("steps", [2, 20])
def test_host_cost_of_a_replay(gpu, runtime, subject, steps):  # noqa: F811
    """It allocates nothing, waits only for the results, and makes no calls per step."""
    runtime.generate(subject, PROMPT, steps=steps)
    counted = []
    for seed in (1, 2):
        before = (gpu.cuda.allocations, gpu.cuda.waits, gpu.cuda.event_records, gpu.cuda.calls)
        runtime.generate(subject, PROMPT, steps=steps, seed=seed)
        after = (gpu.cuda.allocations, gpu.cuda.waits, gpu.cuda.event_records, gpu.cuda.calls)
        counted.append(tuple(b - a for a, b in zip(before, after, strict=True)))
    # The calls: 8 uploads, the launch, a wait for it, a copy and a wait for each of 3 results.
    assert counted == [(0, 4, 0, 8 + 1 + 1 + 2 * 3)] * 2


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("scheduler", ["ddim", "dpmpp_2m", "lcm"])
def test_a_replay_equals_eager_steps_for_every_schedule(runtime, subject, eager, scheduler, steps):
    options = {"scheduler": scheduler, "steps": steps, "num_images": 2}
    for _ in range(2):
        np.testing.assert_array_equal(pixels(runtime.generate(subject, PROMPT, **options)), eager(**options))


def test_alternating_schedules(gpu, runtime, subject, eager):  # noqa: F811
    calls = [
        {"steps": 3},
        {"steps": 3, "scheduler": "lcm"},
        {"steps": 3, "guidance_scale": 3.0},
        {"steps": 5, "scheduler": "lcm"},
        {"steps": 3},
        {"steps": 3, "scheduler": "lcm"},
        {"steps": 5, "guidance_interval": (300, 700)},
    ]
    for options in calls * 2:
        np.testing.assert_array_equal(pixels(runtime.generate(subject, PROMPT, **options)), eager(**options))
    assert gpu.cuda.launches == 2 * len(calls)


def test_a_callback_sees_each_step_and_may_cancel(gpu, runtime, subject, eager):  # noqa: F811
    steps = []
    found = pixels(runtime.generate(subject, PROMPT, steps=4, on_step=lambda info: steps.append(info.step)))
    np.testing.assert_array_equal(found, eager(steps=4))
    assert steps == [1, 2, 3, 4]
    with pytest.raises(Cancelled, match="after step 2 of 4"):
        runtime.generate(subject, PROMPT, steps=4, on_step=lambda info: info.step < 2)
    assert gpu.cuda.launches == 0
    np.testing.assert_array_equal(pixels(runtime.generate(subject, PROMPT, steps=4)), found)
    assert gpu.cuda.launches == 1


def test_with_a_callback_the_host_is_one_step_ahead_of_the_device(gpu, runtime, subject):  # noqa: F811
    """Otherwise all steps would be enqueued before the first has run, and there would be nothing left to cancel."""
    seen = []
    for _ in range(2):
        runtime.generate(subject, PROMPT, steps=4, on_step=lambda _: seen.append((len(gpu.cuda.queue), gpu.cuda.waits)))
    for generation in (seen[:4], seen[4:]):
        # Uploads precede the first step; a step is a copied schedule row and a run.
        assert [queued for queued, _ in generation[1:]] == [2, 2, 2]
        assert len({waits for _, waits in generation}) == 1, "the stream was not synchronized"


def with_tokens(subject, count):
    """A copy of a subject with `count` reference tokens at the finest grid."""

    def cut(tensors):
        return {name: t[:count] if len(t) == len(subject.object_mask[8]) else t for name, t in tensors.items()}

    fields = ("reference_k", "reference_v", "object_mask")
    return dataclasses.replace(subject, **{field: cut(getattr(subject, field)) for field in fields})


def test_subjects_of_similar_size_share_a_graph(gpu, runtime, subject, eager, enqueued):  # noqa: F811
    # On a grid of 64 tokens, counts are rounded up to multiples of 4.
    sizes = [21, 18, 17, 16, 20]
    assert subject.token_counts()[8] == sizes[0]
    captured = []
    for count in [*sizes, 24]:
        enqueued.clear()
        runtime.generate(with_tokens(subject, count), PROMPT, steps=3)
        captured.append("denoiser" in enqueued)
    assert captured == [True, True, False, True, False, False]
    np.testing.assert_array_equal(pixels(runtime.generate(subject, PROMPT, steps=3)), eager(steps=3))


def test_the_order_of_a_subjects_grids_does_not_matter(runtime, subject):
    """A loaded subject lists them in another order than an enrolled one."""
    for masks in (subject.object_mask, dict(reversed(subject.object_mask.items()))):
        runtime.generate(dataclasses.replace(subject, object_mask=masks), PROMPT, steps=2)
    assert len(runtime._sampler._buffers) == 1


def test_reference_tokens_are_rounded_up(runtime, subject):
    counts = subject.token_counts()
    sizes = runtime._sampler._token_sizes([SimpleNamespace(subject=subject)])
    for grid, count in counts.items():
        assert count <= sizes[f"reference_tokens_{grid}"] <= grid * grid
        assert sizes[f"reference_tokens_{grid}"] % max(1, grid * grid // 16) == 0


def test_a_graph_does_not_outlive_its_scratch_region(gpu, runtime, subject, eager, enqueued):  # noqa: F811
    runtime.generate(subject, PROMPT, steps=3)
    runtime._networks.backend.trim()
    enqueued.clear()
    np.testing.assert_array_equal(pixels(runtime.generate(subject, PROMPT, steps=3)), eager(steps=3))
    assert enqueued.count("denoiser") == 2 * 2 + 3, "captured again, in the new region"


@pytest.mark.parametrize(
    "failing", ["cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate", "cudaGraphUpload"]
)
def test_after_a_failed_capture_steps_run_eagerly(gpu, runtime, subject, eager, failing):  # noqa: F811
    gpu.cuda.failures[failing] = CudaError.cudaErrorIllegalAddress
    for _ in range(2):
        np.testing.assert_array_equal(pixels(runtime.generate(subject, PROMPT, steps=3)), eager(steps=3))
    assert gpu.cuda.launches == 0
    assert gpu.cuda.captured is None


@pytest.mark.parametrize("networks", [("denoiser",), ("vae_decoder",)])
def test_a_network_that_is_not_capturable(gpu, runtime, subject, eager, monkeypatch, networks):  # noqa: F811
    """TensorRT-RTX can say so; test_jit.py tests which flavour is asked."""
    monkeypatch.setattr(
        "moma_rt.backends.tensorrt.is_capturable", lambda _, context, __: context.engine.spec.name not in networks
    )
    np.testing.assert_array_equal(pixels(runtime.generate(subject, PROMPT, steps=3)), eager(steps=3))
    assert (gpu.cuda.launches, gpu.cuda.graphs) == (0, {})


def test_a_network_that_fails_during_a_capture(gpu, runtime, subject, eager, monkeypatch):  # noqa: F811
    execute = Context.execute_async_v3

    def refusing(context, stream):
        return gpu.cuda.captured is None and execute(context, stream)

    monkeypatch.setattr(Context, "execute_async_v3", refusing)
    np.testing.assert_array_equal(pixels(runtime.generate(subject, PROMPT, steps=3)), eager(steps=3))
    assert (gpu.cuda.launches, gpu.cuda.graphs, gpu.cuda.captured) == (0, {}, None)


def test_old_graphs_are_evicted(gpu, runtime, subject):  # noqa: F811
    for steps in range(1, 10):
        runtime.generate(subject, PROMPT, steps=steps)
    gc.collect()
    assert len(gpu.cuda.graphs) == 4


@pytest.mark.parametrize("is_busy", [False, True])
def test_deleting_the_runtime_frees_everything(gpu, bundle, photo, mask, is_busy):  # noqa: F811
    runtime = Runtime.load(bundle, "tensorrt")
    subject = runtime.enroll(photo, mask, "car")
    for count in (1, 2, 3):
        runtime.generate(subject, PROMPT, steps=2, num_images=count)
    if is_busy:
        with contextlib.suppress(Cancelled):
            runtime.generate(subject, PROMPT, steps=2, on_step=lambda _: False)
        assert gpu.cuda.queue
    # Immediately, not at the next garbage collection: another runtime may need the memory.
    gc.disable()
    try:
        del runtime
        assert (gpu.cuda.graphs, gpu.cuda.memory, gpu.cuda.streams) == ({}, {}, 0)
    finally:
        gc.enable()


def test_graphs_are_captured_again_for_longer_noise_tables(runtime, subject, eager):
    for steps, seed in ((3, 1), (5, 2), (3, 3), (70, 4), (5, 5)):
        options = {"steps": steps, "seed": seed, "scheduler": "lcm" if steps < 50 else "ddim"}
        np.testing.assert_array_equal(pixels(runtime.generate(subject, PROMPT, **options)), eager(**options))


def test_batches_are_rounded_up_to_few_sizes(gpu, runtime, subject, eager, enqueued):  # noqa: F811
    for count in (1, 2, 3, 4):
        expected = eager(steps=2, num_images=count)
        np.testing.assert_array_equal(pixels(runtime.generate(subject, PROMPT, steps=2, num_images=count)), expected)
    assert len(runtime._sampler._buffers) == 3
    enqueued.clear()
    for count in (1, 2, 3, 4, 2, 1):
        result = runtime.generate(subject, PROMPT, steps=2, num_images=count)
        assert len(result.images) == len(result.foreground_masks) == count
    assert "denoiser" not in enqueued


def test_a_queued_graph_outlives_its_buffers(gpu, runtime, subject, monkeypatch):  # noqa: F811
    runtime.generate(subject, PROMPT, steps=2)

    def interrupted(*_):
        runtime._sampler._buffers.clear()
        raise KeyboardInterrupt

    monkeypatch.setattr(runtime._networks.backend, "synchronize", interrupted)
    with pytest.raises(KeyboardInterrupt):
        runtime.generate(subject, PROMPT, steps=2)
    assert gpu.cuda.queue
    monkeypatch.undo()
    assert runtime.generate(subject, PROMPT, steps=2).images


def test_half_copied_subjects_are_copied_again(gpu, runtime, subject, eager, monkeypatch):  # noqa: F811
    runtime.generate(subject, PROMPT, steps=2)
    other = dataclasses.replace(subject, reference_k={n: k + 1 for n, k in subject.reference_k.items()})
    fill, filled = TensorRtBackend.fill_row, []

    def failing(self, target, row, source):
        filled.append(target)
        if len(filled) == 3:
            gpu.cuda.failures["cudaMemcpyAsync"] = CudaError.cudaErrorIllegalAddress
        fill(self, target, row, source)

    monkeypatch.setattr(TensorRtBackend, "fill_row", failing)
    with pytest.raises(MomaError, match="cudaMemcpyAsync"):
        runtime.generate(other, PROMPT, steps=2)
    monkeypatch.undo()
    np.testing.assert_array_equal(pixels(runtime.generate(subject, PROMPT, steps=2)), eager(steps=2))
