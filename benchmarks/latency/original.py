"""The baselines of the latency benchmark: the original MoMA's algorithm in PyTorch, which caches nothing.

Uses the models and schedulers of diffusers and transformers, not this project's networks and operators, with the
checkpoint that a bundle was built from. `PlainDiffusion` is Stable Diffusion alone, a lower bound for both.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, LCMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel, CLIPTextConfig, CLIPVisionConfig, LlamaConfig

from benchmarks.latency.captured_unet import CapturedUnet
from benchmarks.latency.original_attention import GenerationStep, ReferencePass, next_foreground, set_processors
from benchmarks.latency.requests import Answer, Request, Settings
from export.checkpoints.architectures import llama_config
from export.checkpoints.model import Checkpoint, Component
from moma_rt.bundle.manifest import LANGUAGE_TOKENIZER, TEXT_TOKENIZER, Bundle
from moma_rt.bundle.specs import Precision
from moma_rt.inputs.images import VISION_SIZE, PreparedImages, load_mask, load_photo, prepare
from moma_rt.inputs.noise import Stream, draw
from moma_rt.inputs.tokenizers import LanguageTokenizer, TextTokenizer, text_prompt
from moma_rt.timing import StageTimer

_BETAS = MappingProxyType({"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"})
_SCHEDULERS: Mapping[str, Callable[[], Any]] = MappingProxyType(
    {
        "ddim": lambda: DDIMScheduler(**_BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        "lcm": lambda: LCMScheduler(**_BETAS),
    }
)
# The reference is injected only at timesteps below this one.
_INJECTION_BELOW = 950
# The original drops the last four text tokens of the reference pass, as if they were context tokens.
_REFERENCE_TEXT_TOKENS = 73
# This mode captures CUDA graphs; "max-autotune" would time convolutions for minutes and gains little on them.
_COMPILE_MODE = "reduce-overhead"
_DTYPES = MappingProxyType(
    {Precision.FP32: torch.float32, Precision.FP16: torch.float16, Precision.BF16: torch.bfloat16}
)


class PlainDiffusion:
    """Stable Diffusion without MoMA, as diffusers runs it: text encoder, UNet steps, VAE decoder.

    Args:
        execution: how the UNet runs in the steps: "eager", "compiled" (then the decoder is, too), or "graph" for a CUDA
            graph.
    """

    def __init__(self, checkpoint: Checkpoint, settings: Settings, execution: str = "eager") -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        # As in the inductor backend, for a fair comparison.
        torch.backends.cudnn.benchmark = True
        self.settings, self.compiled = settings, execution == "compiled"
        bundle = Bundle.open(settings.bundle)
        self.dtype = _DTYPES[settings.baseline_precision or bundle.network("denoiser").precision]
        self.geometry = bundle.manifest.geometry
        self.text_tokenizer = TextTokenizer(bundle.path(TEXT_TOKENIZER), self.geometry.text_tokens)
        self.text_encoder = self._transformer(CLIPTextConfig(**checkpoint.text_encoder.config), checkpoint.text_encoder)
        self.vae = self._diffuser(AutoencoderKL, checkpoint.vae)
        self.unet = self._diffuser(UNet2DConditionModel, checkpoint.unet)
        if settings.channels_last:
            self.use_channels_last()
        self.step, self.decode = self.unet, self.vae.decode
        if self.compiled:
            self.step = torch.compile(self.unet, mode=_COMPILE_MODE)
            self.decode = torch.compile(self.vae.decode, mode=_COMPILE_MODE)
        elif execution == "graph":
            self.step = CapturedUnet(self.unet)

    def use_channels_last(self) -> None:
        """Convert UNet and VAE to the channels-last memory format, which tensor cores prefer."""
        for model in (self.unet, self.vae):
            model.to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def answer(self, request: Request) -> Answer:
        """Generate a picture from the request alone."""
        stages, start = StageTimer(), time.perf_counter()
        image, mask = self._picture(request, stages)
        return Answer(time.perf_counter() - start, stages.seconds, image, mask)

    def _picture(self, request: Request, stages: StageTimer) -> tuple[np.ndarray, np.ndarray | None]:
        text_gtc = torch.cat([self._text(text, stages) for text in self._texts(request)])
        scheduler, latents = self._start(request)
        with self._timed(stages, "denoiser"):
            for timestep in scheduler.timesteps:
                latents = self._denoised(scheduler, timestep, latents, text_gtc, None)
        return self._decoded(latents, stages), None

    def _texts(self, request: Request) -> tuple[str, ...]:
        """Return the negative prompt, if there is guidance, and the prompt."""
        prompt = text_prompt(request.name, request.prompt)
        return ("", prompt) if self.settings.is_guided else (prompt,)

    def _text(self, text: str, stages: StageTimer) -> Tensor:
        with self._timed(stages, "text_encoder"):
            ids = torch.from_numpy(self.text_tokenizer.encode(text)).long()[None].to(self.device)
            return self.text_encoder(input_ids=ids)[0]

    def _start(self, request: Request) -> tuple[Any, Tensor]:
        """Return a scheduler with its timesteps set, and the initial latents."""
        scheduler = _SCHEDULERS[self.settings.scheduler]()
        scheduler.set_timesteps(self.settings.steps, device=self.device)
        return scheduler, self._noise(request.seed, Stream.INITIAL_LATENTS)

    def _denoised(
        self, scheduler: Any, timestep: Tensor, latents: Tensor, text_gtc: Tensor, kwargs: dict[str, Any] | None
    ) -> Tensor:
        if self.compiled:
            # The outputs of the last step's graph have been read, and may be overwritten.
            torch.compiler.cudagraph_mark_step_begin()
        eps = self.step(
            latents.expand(len(text_gtc), -1, -1, -1),
            timestep,
            encoder_hidden_states=text_gtc,
            cross_attention_kwargs=kwargs,
            return_dict=False,
        )[0]
        if self.settings.is_guided:
            unconditional, conditional = eps.chunk(2)
            eps = unconditional + self.settings.guidance_scale * (conditional - unconditional)
        return scheduler.step(eps, timestep, latents, return_dict=False)[0]

    def _decoded(self, latents: Tensor, stages: StageTimer) -> np.ndarray:
        with self._timed(stages, "vae_decoder"):
            image = self.decode(latents / self.vae.config.scaling_factor, return_dict=False)[0]
            unit = (image / 2 + 0.5).clamp(0, 1).float()
            return (unit[0].permute(1, 2, 0) * 255).round().to(torch.uint8).cpu().numpy()

    def _noise(self, seed: int, stream: Stream) -> Tensor:
        geometry = self.geometry
        shape = (1, geometry.latent_channels, geometry.latent_size, geometry.latent_size)
        return torch.from_numpy(draw(seed, stream, shape)).to(self.device, self.dtype)

    def _weights(self, component: Component) -> dict[str, Tensor]:
        weights = component.load()
        for name in weights:
            weights[name] = weights[name].to(self.device, self.dtype)
        return weights

    def _diffuser(self, kind: Any, component: Component) -> Any:
        with torch.device("meta"):
            model = kind.from_config(component.config)
        model.load_state_dict(self._weights(component), assign=True)
        return model.eval().requires_grad_(False)

    def _transformer(self, config: Any, component: Component) -> nn.Module:
        # Not on the meta device, because these models have buffers that are in no checkpoint.
        with self.device:
            model = AutoModel.from_config(config, dtype=self.dtype, attn_implementation="sdpa")
        weights = {n: t for n, t in self._weights(component).items() if not n.startswith("mm_projector.")}
        model.load_state_dict(weights, assign=True)
        return model.eval().requires_grad_(False)

    @contextlib.contextmanager
    def _timed(self, stages: StageTimer, stage: str) -> Iterator[None]:
        with stages.timed(stage):
            yield
            if self.device.type == "cuda":
                torch.cuda.synchronize()


class Original(PlainDiffusion):
    """The original MoMA: photo, mask and prompt to a picture. Caches nothing of a subject."""

    def __init__(self, checkpoint: Checkpoint, settings: Settings, execution: str = "eager") -> None:
        super().__init__(checkpoint, settings, execution)
        assert checkpoint.adapters is not None
        self.adapters = self._weights(checkpoint.adapters)
        set_processors(self.unet, self.adapters)
        if settings.has_language_model:
            self._load_language(checkpoint)

    def _load_language(self, checkpoint: Checkpoint) -> None:
        assert checkpoint.language is not None
        assert checkpoint.vision is not None
        self.language_tokenizer = LanguageTokenizer(Bundle.open(self.settings.bundle).path(LANGUAGE_TOKENIZER))
        self.vision_encoder = self._transformer(CLIPVisionConfig(**checkpoint.vision.config), checkpoint.vision)
        config = LlamaConfig(**llama_config(checkpoint.language.config))
        self.language_model = self._transformer(config, checkpoint.language)
        names = [f"mm_projector.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")]
        loaded = checkpoint.language.load(names)
        self.projector = [loaded[name].to(self.device, self.dtype) for name in names]

    def _picture(self, request: Request, stages: StageTimer) -> tuple[np.ndarray, np.ndarray | None]:
        with self._timed(stages, "images"):
            vision_size = self.geometry.language.vision_image_size if self.geometry.language else VISION_SIZE
            images = prepare(load_photo(request.photo), load_mask(request.mask), self.geometry.image_size, vision_size)
        context_gmc = self._context(request, images, stages)
        reference = self._reference(request, images, stages)
        text_gtc = torch.cat([self._text(text, stages) for text in self._texts(request)])
        scheduler, latents = self._start(request)
        with self._timed(stages, "denoiser"):
            latents, foreground = self._generate(
                request, images, (context_gmc, text_gtc, reference), scheduler, latents
            )
        return self._decoded(latents, stages), foreground[0, 0].float().cpu().numpy()

    def _generate(
        self,
        request: Request,
        images: PreparedImages,
        conditions: tuple[Tensor, Tensor, ReferencePass],
        scheduler: Any,
        latents: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return the final latents [1,4,h,w] and the final foreground mask [1,1,H,W]."""
        context_gmc, text_gtc, reference = conditions
        object_mask = torch.from_numpy(images.mask_hw[None, None]).to(self.device, self.dtype)
        # Not `ones_like` the mask, whose strides differ from those of the masks of later steps.
        foreground = torch.ones(object_mask.shape, dtype=torch.float32, device=self.device)
        subject_tokens = self._subject_tokens(request)
        injects = (scheduler.timesteps < _INJECTION_BELOW).to(self.dtype)
        # The compiler would specialize on the value of a bool, and compile a graph for each.
        flags = injects.clone().split(1) if self.compiled else [bool(flag) for flag in injects.tolist()]
        for timestep, flag in zip(scheduler.timesteps, flags, strict=True):
            step = GenerationStep(
                reference=reference,
                object_mask=object_mask,
                foreground=foreground,
                strength=self.settings.strength,
                injects=flag,
                context_gmc=context_gmc,
                subject_tokens=subject_tokens,
            )
            latents = self._denoised(scheduler, timestep, latents, text_gtc, {"step": step})
            foreground = next_foreground(step.saliency, self.geometry.latent_size, self.geometry.image_size)
        return latents, foreground

    def _subject_tokens(self, request: Request) -> Tensor:
        ids = self.text_tokenizer.encode(text_prompt(request.name, request.prompt))
        weights = self.text_tokenizer.subject_weights(request.name, ids)
        return torch.from_numpy(np.flatnonzero(weights)).to(self.device)

    def _reference(self, request: Request, images: PreparedImages, stages: StageTimer) -> ReferencePass:
        """Compute keys and values of the photo: its sampled latents are noised at t = 0 and passed through the UNet."""
        with self._timed(stages, "vae_encoder"):
            photo = torch.from_numpy(images.photo_chw).to(self.device, self.dtype)
            posterior = self.vae.encode(photo).latent_dist
            sample = posterior.mean + posterior.std * self._noise(request.subject_seed, Stream.VAE)
            latents = sample * self.vae.config.scaling_factor
        text = self._text(request.name, stages)[:, :_REFERENCE_TEXT_TOKENS]
        with self._timed(stages, "subject_encoder"):
            zero = torch.zeros(1, dtype=torch.int64, device=self.device)
            noise = self._noise(request.subject_seed, Stream.REFERENCE)
            noised = _SCHEDULERS["ddim"]().add_noise(latents, noise, zero)
            reference = ReferencePass()
            self.unet(noised, zero, encoder_hidden_states=text, cross_attention_kwargs={"step": reference})
        return reference

    def _context(self, request: Request, images: PreparedImages, stages: StageTimer) -> Tensor:
        """Return context tokens [G, 4, C]; the unconditional ones are the projection of zeros."""
        if self.settings.has_language_model:
            embedding = self._embedding(request, images, stages)
        else:
            embedding = torch.from_numpy(self.settings.embedding[None]).to(self.device, self.dtype)
        with self._timed(stages, "context_projector"):
            if self.settings.is_guided:
                embedding = torch.cat([torch.zeros_like(embedding), embedding])
            weights = {name: self.adapters[f"projectors.{name}"] for name in ("proj.weight", "proj.bias")}
            projected = functional.linear(embedding, weights["proj.weight"], weights["proj.bias"])
            tokens = projected.unflatten(-1, (self.geometry.context_tokens, -1))
            scale, shift = self.adapters["projectors.norm.weight"], self.adapters["projectors.norm.bias"]
            return functional.layer_norm(tokens, scale.shape, scale, shift)

    def _embedding(self, request: Request, images: PreparedImages, stages: StageTimer) -> Tensor:
        """Run the language model on photo and prompt, and map its last token to the context embedding [1, 1024]."""
        language = self.geometry.language
        assert language is not None
        with self._timed(stages, "vision_encoder"):
            pixels = torch.from_numpy(images.pixels).to(self.device, self.dtype)
            features = self.vision_encoder(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
            first_weight, first_bias, second_weight, second_bias = self.projector
            hidden = functional.gelu(functional.linear(features, first_weight, first_bias))
            image_tokens = functional.linear(hidden, second_weight, second_bias)
        with self._timed(stages, "language_model"):
            ids = self.language_tokenizer.encode(
                request.name, request.prompt, language.vocabulary, language.image_tokens
            )
            before, after = (
                torch.from_numpy(part).long().to(self.device)
                for part in np.split(ids[ids < language.vocabulary], [int(np.argmax(ids >= language.vocabulary))])
            )
            embed = self.language_model.get_input_embeddings()
            sequence = torch.cat([embed(before)[None], image_tokens, embed(after)[None]], dim=1)
            last = self.language_model(inputs_embeds=sequence).last_hidden_state[:, -1]
            gate, up, down = (self.adapters[f"mapping.{name}_proj.weight"] for name in ("gate", "up", "down"))
            gated = functional.silu(functional.linear(last, gate)) * functional.linear(last, up)
            return functional.linear(gated, down)
