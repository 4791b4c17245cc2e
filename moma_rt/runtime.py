"""The runtime: enrolls subjects and generates pictures with a bundle's networks on one backend."""

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
from moma_rt.errors import InputError, MomaError, with_memory_errors
from moma_rt.inputs.images import VISION_SIZE, load_mask, load_photo, prepare
from moma_rt.inputs.noise import Stream, check_seed, draw
from moma_rt.inputs.reading import ImageSource
from moma_rt.inputs.tokenizers import check_prompt
from moma_rt.memory.limits import GRAPH_MEMORY, SUBJECT_MEMORY, Limits
from moma_rt.memory.networks import Networks
from moma_rt.memory.subject_cache import SubjectCache
from moma_rt.messages import short_repr, warn
from moma_rt.pipeline.batching import PendingRequest, RequestQueue
from moma_rt.pipeline.conditioning import Conditioner
from moma_rt.pipeline.enrollment import ReferenceNoise, keep_masked_tokens, reference_pass
from moma_rt.pipeline.request import Result, Settings, check_array, check_on_step, explain_overflow
from moma_rt.pipeline.sampling import FloatArray, OnStep, Picture, Sample, Sampler
from moma_rt.schedulers.tables import ALL_TIMESTEPS
from moma_rt.subject import Origin, Prefix, Subject
from moma_rt.timing import StageTimer


@dataclass(frozen=True, eq=False)
class _Request:
    """A checked call of `generate`; `prompts` are the prompt and the negative prompt."""

    subject: Subject
    prompts: tuple[str, str]
    embedding: Array | None
    settings: Settings
    latents: FloatArray
    on_step: OnStep | None

    @property
    def batch_key(self) -> Hashable:
        """Equal for requests that can share a batch: those with one schedule and no callback."""
        return self if self.on_step is not None else self.settings.rows.tobytes()


class Runtime:
    """Enrolls subjects and generates pictures of them with one bundle.

    Thread-safe: calls wait in a queue and run one at a time, or in batches of up to ``max_batch`` pictures. A step
    callback runs while its call occupies the device. A forked process must load a runtime of its own; one on ONNX
    Runtime's CPU backend that was idle at the fork goes on.
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
        self._queue: RequestQueue[_Request, Result] = RequestQueue(
            min(limits.max_batch, self._sampler.max_batch), self._networks.renew if backend.survives_fork else None
        )

    @classmethod
    @with_memory_errors
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
        """Open a bundle. Its networks are verified and loaded on first use.

        Memory is given in bytes or as a text such as ``"8GB"``.

        Args:
            bundle: folder that ``python -m export.build`` made.
            backend: one of ``moma_rt.backends.NAMES``. ``"auto"`` runs the bundle's engines if all of them serve this
                machine's GPU, and otherwise its ONNX files: on the GPU if a GPU build of ONNX Runtime is installed,
                else on the CPU. A ``MomaWarning`` says why engines for other GPUs, or that ONNX Runtime, are not used.
            threads: CPU threads that a network may use; None: one per core, and at most as many as the process's
                affinity and its container's quota allow.
            max_batch: largest batch that pictures of different calls may share, 1 to 64, and at most the bundle's
                largest. Calls that wait for the device share one if they have the same schedule (steps, scheduler,
                guidance) and no ``on_step``; subject, prompt, strength and seed may differ.
            memory_budget: memory that the loaded networks may need; the least recently used are evicted for another
                one. Buffers and subjects do not count. None: no limit.
            subject_memory: GPU memory that caches enrolled subjects, so that switching between them uploads nothing.
                An SD1.5 subject in half precision takes up to 50 MB, 320 MB once a 7B language model read a prompt
                for it.
            graph_memory: memory that caches the buffers and, on a GPU, the captured CUDA graphs of the most recently
                used sizes (batch, guidance, steps); those of the last size are kept even if they take more.

        Raises:
            BundleError: there is no bundle, its format is newer, a file is missing or truncated, or a backend chosen
                by name finds no engines for this machine's GPU (inductor: or CPU).
            InputError: ``bundle`` is not a path, the backend does not exist or lacks a GPU or a package, or a number is
                out of range.
            MomaError: the GPU cannot be used.
        """
        if not isinstance(bundle, str | os.PathLike):
            raise InputError(f"bundle must be the path of a bundle's folder, not {short_repr(bundle)}")
        backends.check(backend, threads)
        limits = Limits.of(max_batch, memory_budget, subject_memory, graph_memory)
        opened = Bundle.open(bundle)
        choice = choose(backend, opened.manifest, Host())
        if choice.warning:
            warn(choice.warning)
        return cls(opened, backends.create(choice.backend, threads), choice.engines, limits)

    @with_memory_errors
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
            image: photo of any mode and size, as a path or a Pillow image.
            mask: likewise, with the photo's aspect ratio; what is neither black nor transparent belongs to the
                subject, and of a cut-out everything that is visible. A ``MomaWarning`` tells of a mask that is
                probably not meant so.
            name: the subject's name in prompts, such as ``"teddy bear"``.
            seed: seed of the two noises below, 0 to ``2**64 - 1``.
            vae_noise: noise of the VAE's latent sample, float32 [1,4,h,w], standard normal; None: drawn from ``seed``.
            reference_noise: likewise, for noising the reference at t = 0.

        Raises:
            InputError: a photo, mask, name, seed or noise cannot be used, or this was called from ``on_step``.
            BundleError: a network that enrolling needs is missing or was altered.
            OutOfMemory: too little device memory, or too small a ``memory_budget``.
            MomaError: a network made NaN or infinity; the message names the network and what helps.
        """
        self._queue.check_process()
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

    @with_memory_errors
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
        """Generate pictures of a subject.

        Args:
            subject: from ``enroll`` with a bundle of the same base, or from ``Subject.load``.
            prompt: such as ``"A car on a beach."``; truncated to 77 CLIP tokens, with a ``MomaWarning``.
            strength: strength of the subject's appearance, 0 to 2: about 1.0 for a new context, 0.4 for a new texture.
            steps: denoising steps, 1 to 999; up to 50 with ``"lcm"`` and ``"tcd"``, 998 with ``"dpmpp_2m"``, 1000 with
                ``"ddim_trailing"``.
            guidance_scale: classifier-free guidance scale, 0 to 100; 1.0 is no guidance and takes half the time.
            guidance_interval: lowest and highest guided timestep, 0 to 999 (arXiv 2404.07724). Steps outside it run at
                guidance scale 1.0: they take half the time, and normalize the foreground mask by the range of the
                conditional half instead of both halves.
            negative_prompt: what the pictures should not show.
            seed: seed of the first picture, 0 to ``2**64 - 1``; each further picture adds 1.
            num_images: 1 to 64, in batches of up to the bundle's largest.
            scheduler: one of ``moma_rt.schedulers.tables.SCHEDULERS``. ``"lcm"``, ``"tcd"`` and ``"ddim_trailing"``
                need a bundle with a fused LCM, TCD or Hyper-SD LoRA (``python -m export.build --lora``), 2 to 8 steps
                and guidance scale 1.0. With a single step of these, the subject's reference is not injected.
            latents: initial noise, float32 [num_images,4,h,w], standard normal; None: drawn from the seeds.
            context_embedding: float32 [1024], in place of the language model's output for photo and prompt.
            on_step: called with a ``StepInfo`` once a step is enqueued and the one before it has finished; returning
                False (or NumPy's False) cancels. It must not be ``async``, nor call this runtime, which is busy with
                this call, nor wait for a thread that does.

        Raises:
            InputError: a value is out of range, or this was called from ``on_step``; nothing was computed.
            SubjectError: the subject was enrolled with another base.
            BundleError: a network that is needed is missing or was altered.
            Cancelled: ``on_step`` returned False.
            OutOfMemory: too little device memory, or too small a ``memory_budget``.
            MomaError: a network made NaN or infinity; the message names the network and what helps.
        """
        self._check(subject)
        check_on_step(on_step)
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
        # Hash the subject before queueing: inside the batch, other threads would wait for it.
        subject.identity  # noqa: B018
        request = _Request(subject, (prompt, negative_prompt), context_embedding, settings, latents, on_step)
        return self._queue.submit(PendingRequest(request, request.batch_key, num_images), self._run_batch)

    @with_memory_errors
    def context_embedding(self, subject: Subject, prompt: str) -> FloatArray:
        """Return what the language model makes of a subject's photo and a prompt, float32 [1024].

        ``generate`` makes its context tokens from it, or from another one that it is given as ``context_embedding``.

        Raises:
            InputError, SubjectError, BundleError, OutOfMemory: as for ``generate``.
        """
        self._check(subject)
        check_prompt(prompt)
        subject.check(self.bundle)
        with self._queue.exclusive():
            self._conditioner.check_prompt(subject, prompt)
            return self._conditioner.embedding(subject, prompt, StageTimer())

    def _check(self, subject: object) -> None:
        if not isinstance(subject, Subject):
            raise InputError(f"subject must be a Subject, from enroll or Subject.load, not {short_repr(subject)}")
        self._queue.check_process()

    def _run_batch(self, batch: Sequence[PendingRequest[_Request, Result]]) -> None:
        """Complete requests of equal `batch_key`. An error of one request fails only that request."""
        stages = StageTimer()
        accepted = []
        for pending in batch:
            try:
                accepted.append((pending, self._samples(pending.request, stages)))
            except Exception as error:
                pending.error = error
        samples = [sample for _, own_samples in accepted for sample in own_samples]
        if not samples:
            return
        request = batch[0].request
        try:
            pictures = iter(self._sampler.run(samples, request.settings.rows, request.on_step, stages))
        except Exception as error:
            if len(accepted) == 1:
                accepted[0][0].error = error
                return
        else:
            for pending, own_samples in accepted:
                self._complete(pending, [next(pictures) for _ in own_samples], stages)
            return
        # Retry one by one: one request may have failed the batch, or the batch may have run out of memory. This is not
        # in the except clause, where the error's traceback keeps device memory alive.
        for pending, _ in accepted:
            self._run_batch([pending])

    def _complete(
        self, pending: PendingRequest[_Request, Result], pictures: Sequence[Picture], stages: StageTimer
    ) -> None:
        """Complete a request with its pictures, or with an error if one of them is not finite."""
        settings = pending.request.settings
        network = next(filter(None, (picture.fault for picture in pictures)), None)
        if network is None:
            images, masks = [picture.image for picture in pictures], [picture.foreground_mask for picture in pictures]
            pending.set_result(Result(images, masks, settings.seeds, dict(stages.seconds)))
        else:
            advice = explain_overflow(settings, pending.request.latents) or self._networks.overflow_advice(network)
            pending.error = MomaError(f"the picture became NaN or infinity in the {network}: {advice}")

    def _samples(self, request: _Request, stages: StageTimer) -> list[Sample]:
        settings = request.settings
        conditions = self._conditioner.conditions(
            request.subject, request.prompts, request.embedding, settings.guided, stages
        )
        shared = (conditions.text_tokens, conditions.context_tokens, conditions.subject_weights, settings.strength)
        return [
            Sample(request.subject, *shared, seed, latents)
            for seed, latents in zip(settings.seeds, request.latents, strict=True)
        ]
