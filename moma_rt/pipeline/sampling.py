"""Making pictures: samples that may differ in everything but the schedule, as many at a time as the bundle allows."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from moma_rt.backends.base import Array, CapturedGraph, Network
from moma_rt.bundle.footprint import GENERATION_NETWORKS
from moma_rt.errors import Cancelled, OutOfMemory
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

# Without recordings, one set for a full batch and one for what is left over; at SD1.5's size a set is hundreds of
# megabytes. With recordings, which take as long to make as a picture, those of several sizes, as long as there is room.
_BUFFER_SETS, _CAPTURED_SETS = 2, 4
# Where generations are recorded, subjects share a graph if they have about as many reference tokens: in steps of
# this part of a grid. The kernels do not read the tokens in between.
_TOKEN_STEPS = 16


@dataclass(frozen=True)
class StepInfo:
    """Step `step` (from 1) of `steps`, at `timestep` (999 to 0): the device has it, and has done the one before.

    `steps` counts those of the whole call, which is more than one pass if its images do not fit one batch.
    """

    step: int
    steps: int
    timestep: int


OnStep = Callable[[StepInfo], bool | None]


@dataclass(frozen=True, eq=False)
class Sample:
    """One picture to be made, of `seed`: all that may differ between the samples of a batch.

    Attributes:
        text_tokens: [G,77,768], G 2 with guidance, the unconditional half first, and 1 without.
        context_tokens: [G,4,768].
        subject_weights: [77].
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
    """What a set of buffers is for: numbers of guidance halves, samples, and reference tokens by their names."""

    halves: tuple[int, ...]
    batch: int
    tokens: tuple[tuple[str, int], ...]


@dataclass(frozen=True, eq=False)
class Picture:
    """What became of a sample: `image` RGB, and its foreground mask, float32 [H,W] in 0..1.

    `finite` is False where the latents became NaN or infinity, and the picture means nothing.
    """

    image: Image.Image
    foreground_mask: FloatArray
    finite: bool


class Sampler:
    """Makes pictures with one bundle's denoiser and VAE decoder; one call at a time."""

    def __init__(self, networks: Networks, subjects: SubjectCache, limits: Limits) -> None:
        self._networks = networks
        self._captures = networks.backend.supports_capture
        self._graph_memory = limits.graph_memory
        self._buffers: Lru[_Size, GenerationBuffers] = Lru(
            _CAPTURED_SETS if self._captures else _BUFFER_SETS, lambda buffers: buffers.size, limits.graph_memory
        )
        self._subjects = subjects
        networks.on_unload(self._evict)

    def _evict(self, name: str) -> None:
        if name in GENERATION_NETWORKS:
            self._buffers.clear()

    def run(
        self, samples: Sequence[Sample], rows: FloatArray, on_step: OnStep | None, stages: StageTimer
    ) -> list[Picture]:
        """A picture of each sample.

        Without a callback the backend may replay a recording of all steps and the decoding, which are the stage
        "denoiser" then.

        Args:
            rows: the schedule, float32 [steps,64].

        Raises:
            Cancelled: `on_step` returned False.
            OutOfMemory: no room on the device, or in the memory budget.
            BundleError, MomaError: a network that cannot be loaded or run.
        """
        pictures: list[Picture] = []
        batches = self._batches(len(samples))
        try:
            for number, chosen in enumerate(batches):
                report = on_step and _counted(on_step, number * len(rows), len(batches) * len(rows))
                pictures += self._run_batch(samples[chosen], rows, report, stages)
        except OutOfMemory:
            # Where a network finds out when it runs: buffers of this size are not to be held against the next call.
            self._buffers.clear()
            raise
        return pictures

    @property
    def max_batch(self) -> int:
        """How many samples the bundle can make at a time; 1 where it can make none."""
        networks = self._networks.bundle.manifest.networks
        return min(
            (largest(networks[name].spec, "batch") for name in GENERATION_NETWORKS if name in networks), default=1
        )

    def _batches(self, count: int) -> list[slice]:
        most = self.max_batch
        return [slice(start, min(start + most, count)) for start in range(0, count, most)]

    def _run_batch(
        self, samples: Sequence[Sample], rows: FloatArray, on_step: OnStep | None, stages: StageTimer
    ) -> list[Picture]:
        networks = self._networks
        halves = [int(count) for count in guidance_halves(rows)]
        wanted, samples = len(samples), self._padded(samples)
        size = _Size(tuple(sorted(set(halves))), len(samples), tuple(sorted(self._token_sizes(samples).items())))
        loaded = networks.get_all(GENERATION_NETWORKS, stages)

        def prepared() -> GenerationBuffers:
            buffers = self._buffers.get_or_make(size, partial(self._new_buffers, size, *loaded))
            buffers.set_schedule(rows, _step_noise(rows, samples))
            self._fill(buffers, samples)
            return buffers

        with stages.timed("denoiser"):
            buffers = networks.retry_after_eviction(prepared)
            graph = self._graph(buffers, halves) if on_step is None else None
            # Again: recordings count, and where they needed the room of everything else, this set was let go as well.
            self._buffers.put(size, buffers)
            buffers.start(np.stack([sample.latents for sample in samples]))
            if graph is not None:
                buffers.replay(graph, len(rows))
            else:
                denoise(buffers, halves, rows, on_step)
            latents = buffers.read_state("latents")
        with stages.timed("vae_decoder"):
            if graph is None:
                buffers.decode()
            images = buffers.read_images()
        masks = upsample(buffers.read_state("foreground_mask"), images.shape[1])
        return [
            Picture(Image.fromarray(image), mask, bool(np.isfinite(latent).all()))
            for image, mask, latent in zip(images[:wanted], masks, latents, strict=False)
        ]

    def _fill(self, buffers: GenerationBuffers, samples: Sequence[Sample]) -> None:
        """Put everything in place that all steps read."""
        for index, sample in enumerate(samples):
            buffers.load_subject(index, sample.subject.identity, partial(self._subjects.reference, sample.subject))
        buffers.set_condition("text_tokens", np.stack([sample.text_tokens for sample in samples], axis=1))
        buffers.set_condition("context_tokens", np.stack([sample.context_tokens for sample in samples], axis=1))
        buffers.set_input("subject_weights", np.stack([sample.subject_weights for sample in samples]))
        buffers.set_input("strength", np.array([sample.strength for sample in samples], np.float32))

    def _padded(self, samples: Sequence[Sample]) -> Sequence[Sample]:
        """Where generations are recorded, some more samples: a power of two, so that there are few recordings."""
        if not self._captures:
            return samples
        count = min(1 << (len(samples) - 1).bit_length(), self.max_batch)
        return [*samples, *[samples[-1]] * (count - len(samples))]

    def _new_buffers(self, size: _Size, denoiser: Network, decoder: Network) -> GenerationBuffers:
        backend, sizes = self._networks.backend, {"batch": size.batch, **dict(size.tokens)}
        return GenerationBuffers(backend, denoiser, decoder, sizes, size.halves, self._graph_memory)

    def _graph(self, buffers: GenerationBuffers, halves: Sequence[int]) -> CapturedGraph | None:
        """What is to be replayed, for which everything else is let go if need be; None where there is nothing."""
        with contextlib.suppress(OutOfMemory):
            return self._networks.retry_after_eviction(lambda: buffers.graph(halves))
        buffers.disable_capture()
        return None

    def _token_sizes(self, samples: Sequence[Sample]) -> dict[str, int]:
        """Room for the reference tokens of the samples, by the denoiser's names of these sizes."""
        sizes = {}
        for grid in samples[0].subject.token_counts():
            most = max(sample.subject.token_counts()[grid] for sample in samples)
            step = max(1, grid * grid // _TOKEN_STEPS) if self._captures else 1
            sizes[f"reference_tokens_{grid}"] = min(-(-most // step) * step, grid * grid)
        return sizes


def denoise(buffers: GenerationBuffers, halves: Sequence[int], rows: FloatArray, on_step: OnStep | None) -> None:
    """Denoise what `buffers` holds, one row of the schedule a step.

    Args:
        halves: how many halves of guidance each step computes.
        on_step: called after each step with the StepInfo of this pass; False ends the generation.

    Raises:
        Cancelled: `on_step` returned False.
    """
    for index, row in enumerate(rows):
        buffers.step(index, halves[index])
        if on_step is None:
            continue
        buffers.limit_run_ahead()
        if on_step(StepInfo(index + 1, len(rows), int(row[Column.TIMESTEP]))) is False:
            raise Cancelled(f"cancelled after step {index + 1} of {len(rows)}")


def upsample(masks_b1hw: FloatArray, size: int) -> list[FloatArray]:
    """Masks of the latents' grid as masks of the picture's pixels, nearest: float32 [size,size] each."""
    factor = size // masks_b1hw.shape[-1]
    return [mask[0].repeat(factor, axis=0).repeat(factor, axis=1) for mask in masks_b1hw]


def _step_noise(rows: FloatArray, samples: Sequence[Sample]) -> FloatArray | None:
    """Fresh noise of every step, float32 [steps,B,4,h,w], for schedules that add some."""
    if not rows[:, Column.NOISE].any():
        return None
    return np.stack([draw(s.seed, Stream.STEP, (len(rows), *s.latents.shape)) for s in samples], axis=1)


def _counted(on_step: OnStep, before: int, steps: int) -> OnStep:
    """`on_step` told of the whole call's steps, of which `before` were done in earlier batches."""
    return lambda info: on_step(StepInfo(before + info.step, steps, info.timestep))
