"""Denoising loop and decoding: makes pictures in batches whose samples share nothing but the schedule.

Guidance halves: a guided step runs the UNet on an unconditional and a conditional half of the batch (G = 2), a step
without guidance on the conditional half alone (G = 1).
"""

import contextlib
import inspect
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from moma_rt.backends.base import Array, CapturedGraph, Network
from moma_rt.bundle.footprint import GENERATION_NETWORKS
from moma_rt.errors import Cancelled, InputError, OutOfMemory
from moma_rt.finite import all_finite
from moma_rt.inputs.noise import Stream, draw
from moma_rt.memory.buffers import GenerationBuffers
from moma_rt.memory.limits import Limits
from moma_rt.memory.lru import Lru
from moma_rt.memory.networks import Networks, largest
from moma_rt.memory.subject_cache import SubjectCache
from moma_rt.schedulers.tables import Column, guidance_halves
from moma_rt.subject import Subject
from moma_rt.timing import StageTimer

FloatArray = NDArray[np.float32]

# Cached sets of buffers. Without CUDA graphs: one for a full batch and one for the remainder, since at SD1.5's size a
# set takes hundreds of megabytes. With graphs, whose capture takes as long as a picture: more, within graph_memory.
_BUFFER_SETS, _CAPTURED_SETS = 2, 4
# With graphs, the number of reference tokens is rounded up to a multiple of 1/16 of the grid, so that subjects of
# similar size share a graph. The kernels do not read the padding.
_TOKEN_BUCKETS = 16


@dataclass(frozen=True)
class StepInfo:
    """Progress of a generation: a step is enqueued, and the one before it has finished.

    Attributes:
        step: the enqueued step, from 1.
        steps: steps of the whole call; a call whose images do not fit one batch counts those of every batch.
        timestep: timestep of the step, 999 to 0.
    """

    step: int
    steps: int
    timestep: int


OnStep = Callable[[StepInfo], bool | None]


@dataclass(frozen=True, eq=False)
class Sample:
    """Inputs of one picture: everything that may differ within a batch.

    Attributes:
        text_tokens: [G,77,768] of G guidance halves, the unconditional half first.
        context_tokens: [G,4,768].
        subject_weights: [77].
        seed: of the noise that some schedulers add at each step.
        latents: float32 [4,h,w], standard normal.
    """

    subject: Subject
    text_tokens: Array
    context_tokens: Array
    subject_weights: Array
    strength: float
    seed: int
    latents: FloatArray


@dataclass(frozen=True)
class _Size:
    """Key of a set of buffers: numbers of guidance halves, batch size, and reference tokens by dimension name."""

    halves: tuple[int, ...]
    batch: int
    tokens: tuple[tuple[str, int], ...]


@dataclass(frozen=True, eq=False)
class Picture:
    """One generated picture.

    Attributes:
        image: RGB.
        foreground_mask: float32 [H,W] in 0..1.
        fault: the network that made NaN or infinity, which makes the picture useless; empty if none did.
    """

    image: Image.Image
    foreground_mask: FloatArray
    fault: str


class Sampler:
    """Makes pictures with one bundle's denoiser and VAE decoder. Not thread-safe."""

    def __init__(self, networks: Networks, subjects: SubjectCache, limits: Limits) -> None:
        self._networks = networks
        self._use_graphs = networks.backend.supports_capture
        self._graph_memory = limits.graph_memory
        self._buffers: Lru[_Size, GenerationBuffers] = Lru(
            _CAPTURED_SETS if self._use_graphs else _BUFFER_SETS, lambda buffers: buffers.size, limits.graph_memory
        )
        self._subjects = subjects
        networks.on_eviction(self._evict)

    def _evict(self, name: str) -> None:
        if name in GENERATION_NETWORKS:
            self._buffers.clear()

    def run(
        self, samples: Sequence[Sample], rows: FloatArray, on_step: OnStep | None, stages: StageTimer
    ) -> list[Picture]:
        """Make a picture of each sample.

        Without a callback the backend may replay a CUDA graph of all steps and the decoding, which then count as the
        stage "denoiser".

        Args:
            rows: the schedule, float32 [steps,64].

        Raises:
            Cancelled: `on_step` returned False.
            InputError: `on_step` returned work that nobody would do or wait for.
            OutOfMemory: too little device memory, or too small a memory budget.
            BundleError, MomaError: a network cannot be loaded or run.
        """
        pictures: list[Picture] = []
        batches = self._batches(len(samples))
        try:
            for index, batch in enumerate(batches):
                report = on_step and _counted(on_step, index * len(rows), len(batches) * len(rows))
                pictures += self._run_batch(samples[batch], rows, report, stages)
        except (OutOfMemory, MemoryError):
            # Some networks allocate while they run: free these buffers, so that a smaller call fits.
            self._buffers.clear()
            raise
        return pictures

    @property
    def max_batch(self) -> int:
        """Largest batch of the bundle's denoiser and VAE decoder; 1 if it has neither."""
        networks = self._networks.bundle.manifest.networks
        return min(
            (largest(networks[name].spec, "batch") for name in GENERATION_NETWORKS if name in networks), default=1
        )

    def _batches(self, count: int) -> list[slice]:
        size = self.max_batch
        return [slice(start, min(start + size, count)) for start in range(0, count, size)]

    def _run_batch(
        self, samples: Sequence[Sample], rows: FloatArray, on_step: OnStep | None, stages: StageTimer
    ) -> list[Picture]:
        networks = self._networks
        halves = [int(count) for count in guidance_halves(rows)]
        requested, samples = len(samples), self._padded(samples)
        size = _Size(tuple(sorted(set(halves))), len(samples), tuple(sorted(self._token_sizes(samples).items())))
        loaded = networks.get_all(GENERATION_NETWORKS, stages)

        def prepare_buffers() -> GenerationBuffers:
            buffers = self._buffers.get_or_make(size, partial(self._new_buffers, size, *loaded))
            buffers.set_schedule(rows, _step_noise(rows, samples))
            self._upload_inputs(buffers, samples)
            return buffers

        with stages.timed("denoiser"):
            buffers = networks.retry_after_eviction(prepare_buffers)
            graph = self._graph(buffers, halves) if on_step is None else None
            # Once more: the set has grown by the graph, and capturing may have evicted the set itself.
            self._buffers.put(size, buffers)
            buffers.start(np.stack([sample.latents for sample in samples]))
            if graph is not None:
                buffers.replay(graph, len(rows))
            else:
                denoise(buffers, halves, rows, on_step)
            networks.backend.synchronize()
        with stages.timed("vae_decoder"):
            if graph is None:
                buffers.decode()
            images, means = buffers.read_pictures()
        masks = buffers.read_state("foreground_mask")
        faults = _faults(buffers, masks, means)
        return [
            Picture(Image.fromarray(image), upsample(mask, len(image)), fault)
            for image, mask, fault in zip(images[:requested], masks, faults, strict=False)
        ]

    def _upload_inputs(self, buffers: GenerationBuffers, samples: Sequence[Sample]) -> None:
        """Upload the inputs that are the same for all steps."""
        for index, sample in enumerate(samples):
            buffers.load_subject(index, sample.subject.identity, partial(self._subjects.reference, sample.subject))
        buffers.set_condition("text_tokens", np.stack([sample.text_tokens for sample in samples], axis=1))
        buffers.set_condition("context_tokens", np.stack([sample.context_tokens for sample in samples], axis=1))
        buffers.set_input("subject_weights", np.stack([sample.subject_weights for sample in samples]))
        buffers.set_input("strength", np.array([sample.strength for sample in samples], np.float32))

    def _padded(self, samples: Sequence[Sample]) -> Sequence[Sample]:
        """With graphs, repeat the last sample up to a power of two, so that few batch sizes are captured."""
        if not self._use_graphs:
            return samples
        count = min(1 << (len(samples) - 1).bit_length(), self.max_batch)
        return [*samples, *[samples[-1]] * (count - len(samples))]

    def _new_buffers(self, size: _Size, denoiser: Network, decoder: Network) -> GenerationBuffers:
        backend, sizes = self._networks.backend, {"batch": size.batch, **dict(size.tokens)}
        return GenerationBuffers(backend, denoiser, decoder, sizes, size.halves, self._graph_memory)

    def _graph(self, buffers: GenerationBuffers, halves: Sequence[int]) -> CapturedGraph | None:
        """Graph of all steps and the decoding, or None. Evicts other caches if there is no memory to capture it."""
        with contextlib.suppress(OutOfMemory):
            return self._networks.retry_after_eviction(lambda: buffers.graph(halves))
        buffers.disable_capture()
        return None

    def _token_sizes(self, samples: Sequence[Sample]) -> dict[str, int]:
        """Reference tokens to allocate per grid, by the denoiser's dimension names."""
        sizes = {}
        for grid in samples[0].subject.token_counts():
            largest_count = max(sample.subject.token_counts()[grid] for sample in samples)
            bucket = max(1, grid * grid // _TOKEN_BUCKETS) if self._use_graphs else 1
            sizes[f"reference_tokens_{grid}"] = min(-(-largest_count // bucket) * bucket, grid * grid)
        return sizes


def denoise(buffers: GenerationBuffers, halves: Sequence[int], rows: FloatArray, on_step: OnStep | None) -> None:
    """Run all denoising steps, one per row of the schedule.

    Args:
        halves: number of guidance halves of each step.
        on_step: called with a StepInfo of this batch once a step is enqueued and the one before it has finished;
            returning False cancels.

    Raises:
        Cancelled: `on_step` returned False.
        InputError: it returned work that nobody would do or wait for.
    """
    for index, row in enumerate(rows):
        buffers.step(index, halves[index])
        if on_step is None:
            continue
        buffers.limit_run_ahead()
        if _is_false(on_step(StepInfo(index + 1, len(rows), int(row[Column.TIMESTEP])))):
            raise Cancelled(f"cancelled after step {index + 1} of {len(rows)}")


def _is_false(result: object) -> bool:
    """Whether a callback returned Python's, NumPy's or PyTorch's False; other values, such as 0, have no meaning.

    Raises:
        InputError: it returned work that nobody would do or wait for.
    """
    if inspect.iscoroutine(result):
        # Closed, so that Python does not warn that it was never awaited.
        result.close()
    if inspect.isawaitable(result) or inspect.isgenerator(result) or isinstance(result, Future):
        raise InputError(f"on_step returned a {type(result).__name__}: give a function that does its work at once")
    is_boolean = isinstance(result, bool) or str(getattr(result, "dtype", "")) in ("bool", "torch.bool")
    return is_boolean and getattr(result, "ndim", 0) == 0 and not result


def upsample(mask_1hw: FloatArray, size: int) -> FloatArray:
    """Upsample a mask from the latents' grid to pixels, nearest neighbor: float32 [size,size]."""
    factor = size // mask_1hw.shape[-1]
    mask_hw: FloatArray = mask_1hw[0].repeat(factor, axis=0).repeat(factor, axis=1)
    return mask_hw


def _faults(buffers: GenerationBuffers, masks_b1hw: FloatArray, means_b: FloatArray) -> list[str]:
    """For each picture, the first network whose results are not finite; empty if all are."""
    if all_finite(masks_b1hw) and all_finite(means_b):
        return [""] * len(means_b)
    denoiser, decoder = GENERATION_NETWORKS
    # Latents that are not finite show in the decoder's mean, so they need not be downloaded otherwise.
    latents_bchw = buffers.read_state("latents")
    return [
        denoiser if not (all_finite(latents) and all_finite(mask)) else "" if np.isfinite(mean) else decoder
        for latents, mask, mean in zip(latents_bchw, masks_b1hw, means_b, strict=True)
    ]


def _step_noise(rows: FloatArray, samples: Sequence[Sample]) -> FloatArray | None:
    """Noise to add at each step, float32 [steps,B,4,h,w]; None for schedules that add none."""
    if not rows[:, Column.NOISE].any():
        return None
    return np.stack([draw(s.seed, Stream.STEP, (len(rows), *s.latents.shape)) for s in samples], axis=1)


def _counted(on_step: OnStep, before: int, steps: int) -> OnStep:
    """Make `on_step` count the steps of the whole call, `before` of them in earlier batches."""
    return lambda info: on_step(StepInfo(before + info.step, steps, info.timestep))
