"""The runtime: a bundle's networks on one backend, turned into enrol and generate."""

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moma_rt import backends
from moma_rt.backends.base import Array, Backend
from moma_rt.buffers import GenerationBuffers
from moma_rt.bundle import Bundle
from moma_rt.conditioning import Conditioner
from moma_rt.engines import EngineEntry
from moma_rt.enrollment import ReferenceNoise, compact, reference_pass
from moma_rt.errors import InputError
from moma_rt.generation import (
    FloatArray,
    OnStep,
    Result,
    Settings,
    StepInfo,
    check_array,
    check_finite,
    pictures,
    sample,
    upsample,
)
from moma_rt.images import VISION_SIZE, ImageSource, load_mask, load_photo, prepare
from moma_rt.lru import Lru
from moma_rt.messages import shown, warn
from moma_rt.networks import Networks, largest
from moma_rt.noise import Stream, check_seed, draw
from moma_rt.prompts import check_prompt, text_prompt
from moma_rt.schedules import ALL_TIMESTEPS, Column
from moma_rt.selection import choose, local_host
from moma_rt.stages import Stages
from moma_rt.subject import Origin, Prefix, Subject

# One set for a full batch and one for what is left over; at SD1.5's size a set is hundreds of megabytes.
_BUFFER_SETS = 2


@dataclass(frozen=True, eq=False)
class _Conditions:
    """What all samples of a call share: text [G,77,768], context [G,4,768], subject weights [77]."""

    text_tokens: Array
    context_tokens: Array
    subject_weights: Array


class Runtime:
    """Enrolls subjects and makes pictures of them with one bundle.

    May be shared between threads: calls run one after the other. A step callback runs within its call's turn.
    """

    def __init__(self, bundle: Bundle, backend: Backend, engines: Mapping[str, EngineEntry] | None = None) -> None:
        self.bundle = bundle
        self._networks = Networks(bundle, backend, engines)
        self._conditioner = Conditioner(self._networks)
        self._buffers: Lru[tuple[object, ...], GenerationBuffers] = Lru(_BUFFER_SETS)
        self._lock = threading.Lock()
        self._owner: int | None = None

    @classmethod
    def load(cls, bundle: str | Path, backend: str = backends.AUTO, threads: int | None = None) -> "Runtime":
        """Open a bundle. Its networks are checked and loaded when they are first needed.

        Args:
            bundle: the folder that `python -m export.build` made.
            backend: one of `moma_rt.backends.NAMES`. "auto" runs the bundle's engines where all of them serve this
                machine's GPU, and else its ONNX files on the CPU, with a MomaWarning if there are engines and a GPU.
            threads: CPU threads a network may use; None leaves the choice to the backend.

        Raises:
            BundleError: no bundle, a newer format, a missing or truncated file, or, where the backend is named, no
                engines for this machine's GPU.
            InputError: `bundle` is no path, there is no such backend, it lacks a GPU or a package, or threads are out
                of range.
            MomaError: the GPU cannot be used.
        """
        if not isinstance(bundle, str | os.PathLike):
            raise InputError(f"a bundle is named by the path of its folder, not by {shown(bundle)}")
        backends.check(backend, threads)
        opened = Bundle.open(bundle)
        choice = choose(backend, opened.manifest, local_host)
        if choice.warning:
            warn(choice.warning)
        return cls(opened, backends.create(choice.backend, threads), choice.engines)

    def enroll(
        self,
        image: ImageSource,
        mask: ImageSource,
        name: str,
        *,
        seed: int = 0,
        vae_noise: Array | None = None,
        reference_noise: Array | None = None,
    ) -> Subject:
        """Compute once what a photo contributes to every picture of its subject.

        Args:
            image: photo of any mode and size, a path or a Pillow image.
            mask: of the photo's aspect ratio; every value above 0 is the subject.
            name: what prompts call the subject, such as "teddy bear".
            seed: of the two noises below, 0 to 2**64 - 1.
            vae_noise: float32 [1,4,h,w], standard normal, instead of drawn from `seed`.
            reference_noise: likewise, for the noising of the reference at t = 0.

        Raises:
            InputError: a photo, mask, name, seed or noise that cannot be used, or a call from within `on_step`.
            BundleError: a network that enrolling needs is missing or was altered.
        """
        self._conditioner.text_tokenizer.check_subject(name)
        seed = check_seed(seed)
        geometry = self.bundle.manifest.geometry
        shape = (1, geometry.latent_channels, geometry.latent_size, geometry.latent_size)
        noise = ReferenceNoise(
            draw(seed, Stream.VAE, shape) if vae_noise is None else check_array("vae_noise", vae_noise, shape),
            draw(seed, Stream.REFERENCE, shape)
            if reference_noise is None
            else check_array("reference_noise", reference_noise, shape),
        )
        vision_size = VISION_SIZE if geometry.language is None else geometry.language.vision_image_size
        prepared = prepare(load_photo(image), load_mask(mask), geometry.image_size, vision_size)
        origin = Origin.of(self.bundle)
        stages = Stages()
        with self._turn():
            text_tokens, _ = self._conditioner.text_tokens(name, stages)
            full = reference_pass(self._networks, prepared.photo_chw, noise, text_tokens, stages)
            reference = compact(geometry, prepared.mask_hw, full)
            prefix: Prefix | None = self._conditioner.prefix(name, prepared.pixels, stages)
        return Subject(
            name=name,
            reference_k=reference.keys,
            reference_v=reference.values,
            object_mask=reference.object_mask,
            photo=prepared.photo_hwc,
            mask=prepared.mask_hw,
            prefix=prefix,
            origin=origin,
            seconds=stages.seconds,
        )

    def generate(
        self,
        subject: Subject,
        prompt: str,
        *,
        strength: float = 1.0,
        steps: int = 50,
        guidance_scale: float = 7.5,
        guidance_interval: tuple[float, float] = ALL_TIMESTEPS,
        negative_prompt: str = "",
        seed: int = 0,
        num_images: int = 1,
        scheduler: str = "ddim",
        latents: Array | None = None,
        context_embedding: Array | None = None,
        on_step: OnStep | None = None,
    ) -> Result:
        """Make pictures of a subject.

        Args:
            subject: from `enroll` with a bundle of the same base, or `Subject.load`.
            prompt: such as "A car on a beach."; beyond 77 CLIP tokens it is cut, with a MomaWarning.
            strength: of the subject's appearance, 0 to 2: about 1.0 for a new context, 0.4 for a new texture.
            steps: of denoising, 1 to 999; at most 50 with "lcm" and "tcd", 998 with "dpmpp_2m".
            guidance_scale: of the prompt, 0 to 100; 1.0 is none and takes half the time.
            guidance_interval: lowest and highest timestep that is guided, 0 to 999 (arXiv 2404.07724). Steps outside
                are those of guidance scale 1.0: they take half the time, and scale the foreground mask to the range of
                the conditional half instead of that of both.
            negative_prompt: what the picture should not show.
            seed: of the first picture, 0 to 2**64 - 1; the following ones have the following seeds.
            num_images: 1 to 64; as many as the bundle allows are made together.
            scheduler: one of `moma_rt.schedules.SCHEDULERS`. "lcm" and "tcd" are for bundles with a fused LCM, TCD or
                Hyper-SD LoRA (`python -m export.build --lora`), 4 to 8 steps and a guidance_scale of 1.0.
            latents: float32 [num_images,4,h,w], standard normal, instead of drawn from the seeds.
            context_embedding: float32 [1024], instead of the language model's reading of photo and prompt.
            on_step: called after each step with a StepInfo; returning False cancels. It must not call this runtime,
                nor wait for a thread that does: the runtime is busy with the call that is being reported.

        Raises:
            InputError: a value outside its range, or a call from within `on_step`; nothing was computed.
            SubjectError: the subject belongs to another base's bundle.
            BundleError: a network that is needed is missing or was altered.
            Cancelled: `on_step` returned False.
            MomaError: the latents became NaN or infinity.
        """
        if not isinstance(subject, Subject):
            raise InputError(f"subject must be a Subject, from enroll or Subject.load, not {shown(subject)}")
        if on_step is not None and not callable(on_step):
            raise InputError(f"on_step must be a function of a StepInfo, not {shown(on_step)}")
        settings = Settings(strength, steps, guidance_scale, guidance_interval, scheduler, seed, num_images)
        check_prompt(prompt)
        check_prompt(negative_prompt, "negative prompt")
        geometry = self.bundle.manifest.geometry
        shape = (geometry.latent_channels, geometry.latent_size, geometry.latent_size)
        if latents is not None:
            latents = check_array("latents", latents, (num_images, *shape))
        else:
            latents = np.stack([draw(s, Stream.INITIAL_LATENTS, shape) for s in settings.seeds])
        if context_embedding is not None:
            context_embedding = check_array("context_embedding", context_embedding, (geometry.embedding_width,))
        subject.check(self.bundle)
        stages = Stages()
        with self._turn():
            conditions = self._conditions(
                subject, (prompt, negative_prompt), context_embedding, settings.guided, stages
            )
            return self._generate(subject, conditions, settings, latents, on_step or _ignore, stages)

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Wait for this thread's turn; the lock is not reentrant, because the buffers are of one call."""
        here = threading.get_ident()
        # Only this thread can have written its own number there, so it cannot change between here and the lock.
        if self._owner == here:
            raise InputError("the runtime was called from on_step, while it is busy with the call that is reported")
        with self._lock:
            self._owner = here
            try:
                yield
            finally:
                self._owner = None

    def _conditions(
        self,
        subject: Subject,
        prompts: tuple[str, str],
        embedding: Array | None,
        guided: bool,
        stages: Stages,
    ) -> _Conditions:
        conditioner = self._conditioner
        prompt, negative = prompts
        conditioner.text_tokenizer.check_subject(subject.name)
        if embedding is None:
            conditioner.check_prompt(subject, prompt)
        text, ids = conditioner.text_tokens(text_prompt(subject.name, prompt), stages)
        if embedding is not None:
            context = conditioner.project(embedding, stages)
        else:
            context = conditioner.context_tokens(subject, prompt, stages)
        weights = conditioner.text_tokenizer.subject_weights(subject.name, ids)
        if not guided:
            return _Conditions(text[None], context[None], weights)
        unconditional_text, _ = conditioner.text_tokens(negative, stages)
        unconditional_context = conditioner.unconditional_context_tokens(stages)
        return _Conditions(np.stack([unconditional_text, text]), np.stack([unconditional_context, context]), weights)

    def _generate(
        self,
        subject: Subject,
        conditions: _Conditions,
        settings: Settings,
        latents: FloatArray,
        on_step: OnStep,
        stages: Stages,
    ) -> Result:
        size = self.bundle.manifest.geometry.image_size
        result = Result([], [], settings.seeds, stages.seconds)
        chunks = self._chunks(len(latents), stages)
        rows = settings.rows
        for number, chunk in enumerate(chunks):

            def done(info: StepInfo, before: int = number * len(rows)) -> bool | None:
                return on_step(StepInfo(before + info.step, len(chunks) * len(rows), info.timestep))

            buffers = self._ready_buffers(subject, conditions, settings, latents[chunk], stages)
            noise = _step_noise(rows, settings.seeds[chunk], latents.shape[1:])
            with stages.timed("denoiser"):
                sample(buffers, rows, noise, done)
                self._networks.backend.synchronize()
                check_finite(buffers.state("latents"))
            with stages.timed("vae_decoder"):
                result.images.extend(pictures(buffers.decode()))
            result.foreground_masks.extend(upsample(buffers.state("foreground_mask"), size))
        return result

    def _chunks(self, count: int, stages: Stages) -> Sequence[slice]:
        most = min(largest(self._networks.get(name, stages).spec, "batch") for name in ("denoiser", "vae_decoder"))
        return [slice(start, min(start + most, count)) for start in range(0, count, most)]

    def _ready_buffers(
        self, subject: Subject, conditions: _Conditions, settings: Settings, latents: FloatArray, stages: Stages
    ) -> GenerationBuffers:
        """Buffers of the right size with everything in place for the first step."""
        batch, halves = len(latents), settings.halves
        sizes = {f"reference_tokens_{grid}": count for grid, count in subject.token_counts().items()}
        sizes["batch"] = batch
        networks = self._networks
        denoiser, decoder = networks.get("denoiser", stages), networks.get("vae_decoder", stages)
        buffers = self._buffers.get_or_make(
            (halves, *sorted(sizes.items())),
            lambda: GenerationBuffers(networks.backend, denoiser, decoder, sizes, halves),
        )
        buffers.hold(subject.identity, subject.inputs())
        buffers.condition("text_tokens", conditions.text_tokens)
        buffers.condition("context_tokens", conditions.context_tokens)
        buffers.upload("subject_weights", np.tile(conditions.subject_weights, (batch, 1)))
        buffers.upload("strength", np.full(batch, settings.strength, np.float32))
        buffers.begin(latents)
        return buffers


def _step_noise(rows: FloatArray, seeds: Sequence[int], shape: tuple[int, ...]) -> FloatArray | None:
    if not rows[:, Column.NOISE].any():
        return None
    return np.stack([draw(seed, Stream.STEP, (len(rows), *shape)) for seed in seeds], axis=1)


def _ignore(_: StepInfo) -> None:
    """The step callback of those who gave none."""
