"""The runtime: a bundle's networks on one backend, turned into enrol and generate."""

import os
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moma_rt import backends
from moma_rt.backends.base import Array, Backend
from moma_rt.backends.selection import Host, choose
from moma_rt.bundle.engines import EngineEntry
from moma_rt.bundle.manifest import Bundle
from moma_rt.errors import InputError, MomaError
from moma_rt.inputs.images import VISION_SIZE, ImageSource, load_mask, load_photo, prepare
from moma_rt.inputs.noise import Stream, check_seed, draw
from moma_rt.inputs.tokenizers import check_prompt, text_prompt
from moma_rt.memory.limits import GRAPH_MEMORY, SUBJECT_MEMORY, Limits
from moma_rt.memory.networks import Networks
from moma_rt.memory.subject_cache import SubjectCache
from moma_rt.messages import short_repr, warn
from moma_rt.pipeline.batching import PendingRequest, RequestQueue
from moma_rt.pipeline.conditioning import Conditioner
from moma_rt.pipeline.enrollment import ReferenceNoise, keep_masked_tokens, reference_pass
from moma_rt.pipeline.request import Result, Settings, check_array
from moma_rt.pipeline.sampling import FloatArray, OnStep, Picture, Sample, Sampler
from moma_rt.schedulers.tables import ALL_TIMESTEPS
from moma_rt.subject import Origin, Prefix, Subject
from moma_rt.timing import StageTimer


@dataclass(frozen=True, eq=False)
class _Conditions:
    """What the samples of a call share: text [G,77,768], context [G,4,768], subject weights [77]."""

    text_tokens: Array
    context_tokens: Array
    subject_weights: Array


@dataclass(frozen=True, eq=False)
class _Request:
    """A call of `generate`, checked. `prompts` are the prompt and the negative one."""

    subject: Subject
    prompts: tuple[str, str]
    embedding: Array | None
    settings: Settings
    latents: FloatArray
    on_step: OnStep | None

    @property
    def batch_key(self) -> Hashable:
        """Equal for requests that can be made together: of one schedule, and without a callback."""
        return self if self.on_step is not None else self.settings.rows.tobytes()


class Runtime:
    """Enrolls subjects and makes pictures of them with one bundle.

    May be shared between threads: calls run one after the other, or together as far as `max_batch` allows. A step
    callback runs within its call's turn.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        engines: Mapping[str, EngineEntry] | None = None,
        limits: Limits = Limits(),
    ) -> None:
        self.bundle = bundle
        self._networks = Networks(bundle, backend, engines, limits.memory_budget)
        self._subjects = SubjectCache(self._networks, limits.subject_memory)
        self._conditioner = Conditioner(self._networks, self._subjects)
        self._sampler = Sampler(self._networks, self._subjects, limits)
        self._queue: RequestQueue[_Request, Result] = RequestQueue(min(limits.max_batch, self._sampler.max_batch))

    @classmethod
    def load(
        cls,
        bundle: str | Path,
        backend: str = backends.AUTO,
        threads: int | None = None,
        *,
        max_batch: int = 1,
        memory_budget: int | str | None = None,
        subject_memory: int | str = SUBJECT_MEMORY,
        graph_memory: int | str = GRAPH_MEMORY,
    ) -> "Runtime":
        """Open a bundle. Its networks are checked and loaded when they are first needed.

        Args:
            bundle: the folder that `python -m export.build` made.
            backend: one of `moma_rt.backends.NAMES`. "auto" runs the bundle's engines where all of them serve this
                machine's GPU, and else its ONNX files: on the GPU if the installed ONNX Runtime is one for GPUs, on the
                CPU otherwise. A MomaWarning says why engines for other GPUs, or that ONNX Runtime, are not used.
            threads: CPU threads a network may use; None leaves the choice to the backend.
            max_batch: how many pictures of several threads' calls may be made together, 1 to 64, and no more than the
                bundle allows. Calls of one schedule (steps, scheduler, guidance) that wait for the device are; each has
                its own subject, prompt, strength and seed.
            memory_budget: bytes that loaded networks may need together, or a text such as "8GB": they are loaded in
                turn then, the last one used staying longest. Neither buffers nor subjects count. None: no limit.
            subject_memory: of a GPU, for enrolled subjects, so that going from one to another uploads nothing. With
                SD1.5 in half precision, up to 50 MB each, and 320 MB once a 7B language model read a prompt for it.
            graph_memory: for the buffers and, on a GPU, the recorded CUDA graphs of the sizes of pictures (batch,
                guidance, steps) used last; those of the last one are kept whatever they take.

        Raises:
            BundleError: no bundle, a newer format, a missing or truncated file, or, where the backend is named, no
                engines for this machine's GPU (of inductor: or its CPU).
            InputError: `bundle` is no path, there is no such backend, it lacks a GPU or a package, or a number is out
                of range.
            MomaError: the GPU cannot be used.
        """
        if not isinstance(bundle, str | os.PathLike):
            raise InputError(f"a bundle is named by the path of its folder, not by {short_repr(bundle)}")
        backends.check(backend, threads)
        limits = Limits.of(max_batch, memory_budget, subject_memory, graph_memory)
        opened = Bundle.open(bundle)
        choice = choose(backend, opened.manifest, Host())
        if choice.warning:
            warn(choice.warning)
        return cls(opened, backends.create(choice.backend, threads), choice.engines, limits)

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
            OutOfMemory: no room on the device, or in the memory budget.
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
        stages = StageTimer()
        with self._queue.exclusive():
            text_tokens, _ = self._conditioner.text_tokens(name, stages)
            full = reference_pass(self._networks, prepared.photo_chw, noise, text_tokens, stages)
            reference = keep_masked_tokens(geometry, prepared.mask_hw, full)
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
            steps: of denoising, 1 to 999; to 50 with "lcm" and "tcd", 998 with "dpmpp_2m", 1000 with "ddim_trailing".
            guidance_scale: of the prompt, 0 to 100; 1.0 is none and takes half the time.
            guidance_interval: lowest and highest timestep that is guided, 0 to 999 (arXiv 2404.07724). Steps outside
                are those of guidance scale 1.0: they take half the time, and scale the foreground mask to the range of
                the conditional half instead of that of both.
            negative_prompt: what the picture should not show.
            seed: of the first picture, 0 to 2**64 - 1; the following ones have the following seeds.
            num_images: 1 to 64; as many as the bundle allows are made together.
            scheduler: one of `moma_rt.schedulers.tables.SCHEDULERS`. "lcm", "tcd" and "ddim_trailing" need a bundle
                with a fused LCM, TCD or Hyper-SD LoRA (`python -m export.build --lora`), 2 to 8 steps and a
                guidance_scale of 1.0. With a single step of theirs, the subject's reference is not injected.
            latents: float32 [num_images,4,h,w], standard normal, instead of drawn from the seeds.
            context_embedding: float32 [1024], instead of the language model's reading of photo and prompt.
            on_step: called with a StepInfo after each step was given to the device and the one before it was done;
                returning False cancels. It must not call this runtime, nor wait for a thread that does: the runtime is
                busy with the call that is being reported.

        Raises:
            InputError: a value outside its range, or a call from within `on_step`; nothing was computed.
            SubjectError: the subject belongs to another base's bundle.
            BundleError: a network that is needed is missing or was altered.
            Cancelled: `on_step` returned False.
            OutOfMemory: no room on the device, or in the memory budget.
            MomaError: the latents became NaN or infinity.
        """
        if not isinstance(subject, Subject):
            raise InputError(f"subject must be a Subject, from enroll or Subject.load, not {short_repr(subject)}")
        if on_step is not None and not callable(on_step):
            raise InputError(f"on_step must be a function of a StepInfo, not {short_repr(on_step)}")
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
        # Now: in this call's turn others would wait for it, at each call with a subject that was loaded for it.
        subject.identity  # noqa: B018
        request = _Request(subject, (prompt, negative_prompt), context_embedding, settings, latents, on_step)
        return self._queue.submit(PendingRequest(request, request.batch_key, num_images), self._run_batch)

    def _run_batch(self, calls: Sequence[PendingRequest[_Request, Result]]) -> None:
        """Answer calls of one kind. What is wrong with one of them is the error of that one."""
        stages = StageTimer()
        prepared = []
        for call in calls:
            try:
                prepared.append((call, self._samples(call.request, stages)))
            except Exception as error:
                call.error = error
        samples = [sample for _, of_call in prepared for sample in of_call]
        if not samples:
            return
        request = calls[0].request
        try:
            made = iter(self._sampler.run(samples, request.settings.rows, request.on_step, stages))
        except Exception as error:
            if len(prepared) == 1:
                prepared[0][0].error = error
                return
        else:
            for call, of_call in prepared:
                _finish(call, [next(made) for _ in of_call], stages)
            return
        # One may be what the others fail for, or together they need more memory than there is. The error has gone, and
        # with it what it held of the device.
        for call, _ in prepared:
            self._run_batch([call])

    def _samples(self, request: _Request, stages: StageTimer) -> list[Sample]:
        settings = request.settings
        conditions = self._conditions(request.subject, request.prompts, request.embedding, settings.guided, stages)
        shared = (conditions.text_tokens, conditions.context_tokens, conditions.subject_weights, settings.strength)
        return [
            Sample(request.subject, *shared, seed, latents)
            for seed, latents in zip(settings.seeds, request.latents, strict=True)
        ]

    def _conditions(
        self,
        subject: Subject,
        prompts: tuple[str, str],
        embedding: Array | None,
        guided: bool,
        stages: StageTimer,
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


def _finish(call: PendingRequest[_Request, Result], made: Sequence[Picture], stages: StageTimer) -> None:
    """Answer a call with its pictures, or with what went wrong while they were made."""
    if all(picture.finite for picture in made):
        images, masks = [picture.image for picture in made], [picture.foreground_mask for picture in made]
        call.set_result(Result(images, masks, call.request.settings.seeds, dict(stages.seconds)))
    else:
        call.error = MomaError("the latents became NaN or infinity while denoising: lower guidance_scale or strength")
