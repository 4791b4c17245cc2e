"""From what the command line was given to a checkpoint: files where there are files, random weights where asked for."""

from dataclasses import dataclass, field
from pathlib import Path

from export.checkpoints import presets
from export.checkpoints.adapters import read_adapters
from export.checkpoints.architectures import Config, check_vae, image_size
from export.checkpoints.diffusers_folder import Base, read_base, read_vae
from export.checkpoints.llava import (
    check_widths,
    has_vision_tower,
    language_width,
    read_language,
    read_vision,
    read_vision_config,
    read_vision_copy,
)
from export.checkpoints.model import (
    ADAPTERS,
    LANGUAGE,
    ROLES,
    TEXT_ENCODER,
    UNET,
    VAE,
    VISION,
    Checkpoint,
    Component,
)
from export.checkpoints.presets import Preset
from export.checkpoints.synthetic import random_adapters, random_component
from moma_rt.errors import CheckpointError

TINY = "tiny"
SD15 = "sd15"
RANDOM = "random"


@dataclass(frozen=True)
class CheckpointRequest:
    """What to read. `roles` are those whose weights are needed (see `roles_for`).

    base: `tiny` (synthetic), `sd15` (with `weights`), or a diffusers folder.
    weights: `random` makes every role not given as a file from `seed`; a diffusers folder goes with `sd15`.
    adapters, mllm, vision, vae: the adapter file and the LLaVA, CLIP and VAE folders.
    """

    base: str
    weights: str | None = None
    adapters: Path | None = None
    mllm: Path | None = None
    vision: Path | None = None
    vae: Path | None = None
    roles: frozenset[str] = field(default_factory=lambda: frozenset(ROLES))
    seed: int = 0


@dataclass(frozen=True)
class _Plan:
    """A request whose base and weights were resolved: `folder` is None if the base is synthetic."""

    request: CheckpointRequest
    preset: Preset
    folder: Path | None
    is_random: bool

    def needs(self, role: str) -> bool:
        return role in self.request.roles

    def random(self, role: str, config: Config) -> Component:
        return random_component(role, config, self.request.seed)


def load_checkpoint(request: CheckpointRequest) -> Checkpoint:
    """Open and check everything the request needs; large tensors are read only by `Component.load`.

    Raises:
        CheckpointError: a needed role that was not given (the message names the flag), or a file that is missing,
            damaged, unsafe, of another architecture, or does not fit the others.
    """
    plan = _resolve(request)
    base = _base(plan)
    language = _language(plan)
    vision = _vision(plan, language)
    adapters = _adapters(plan, base.unet.config)
    return Checkpoint(
        base=request.base if request.base in (TINY, SD15) else Path(request.base).resolve().name,
        image_size=image_size(base.unet.config, base.vae.config),
        unet=base.unet,
        vae=base.vae,
        text_encoder=base.text_encoder,
        adapters=adapters,
        language=language,
        vision=vision,
        text_tokenizer=base.tokenizer,
        language_tokenizer=request.mllm if language is not None else None,
        roles=request.roles,
    )


def _resolve(request: CheckpointRequest) -> _Plan:
    if unknown := request.roles - set(ROLES):
        raise CheckpointError(f"unknown roles {', '.join(sorted(unknown))}; known are {', '.join(ROLES)}")
    given = request.weights
    if request.base == TINY:
        if given not in (None, RANDOM):
            raise CheckpointError(f"--base {TINY} is synthetic and takes no --weights; --base DIR reads a checkpoint")
        return _Plan(request, presets.TINY, None, True)
    if request.base == SD15:
        if given is None:
            raise CheckpointError(f"--base {SD15} needs --weights: {RANDOM} or a diffusers folder")
        return _Plan(request, presets.SD15, None if given == RANDOM else Path(given), given == RANDOM)
    if given not in (None, RANDOM):
        raise CheckpointError(
            f"--weights {given} goes with --base {SD15}; --base {request.base} is a folder of its own"
        )
    return _Plan(request, presets.SD15, Path(request.base), given == RANDOM)


def _base(plan: _Plan) -> Base:
    vae, roles, preset = plan.request.vae, plan.request.roles, plan.preset
    if plan.folder is not None:
        return read_base(plan.folder, vae, roles)
    return Base(
        plan.random(UNET, preset.unet),
        plan.random(VAE, check_vae(dict(preset.vae), "the preset")) if vae is None else read_vae(vae, roles),
        plan.random(TEXT_ENCODER, preset.text_encoder),
        None,
    )


def _language(plan: _Plan) -> Component | None:
    if not plan.needs(LANGUAGE):
        return None
    if plan.request.mllm is not None:
        return read_language(plan.request.mllm)
    if not plan.is_random:
        raise CheckpointError("the language model was not given: --mllm takes MoMA's LLaVA folder")
    config = dict(plan.preset.language)
    if plan.request.vision is not None:
        config["mm_hidden_size"] = read_vision_config(plan.request.vision)["hidden_size"]
    return plan.random(LANGUAGE, config)


def _vision(plan: _Plan, language: Component | None) -> Component | None:
    if not plan.needs(VISION):
        return None
    mllm = plan.request.mllm
    if plan.request.vision is not None:
        vision = read_vision(plan.request.vision)
    elif mllm is not None and has_vision_tower(mllm):
        vision = read_vision_copy(mllm, (language or read_language(mllm)).sha256)
    elif plan.is_random:
        vision = plan.random(VISION, plan.preset.vision)
    else:
        raise CheckpointError(
            "the vision encoder was not given: --vision takes a CLIP folder (or --mllm a LLaVA folder with a copy)"
        )
    if language is not None:
        check_widths(language.config, vision.config)
    return vision


def _adapters(plan: _Plan, unet_config: Config) -> Component | None:
    if not plan.needs(ADAPTERS):
        return None
    mllm = plan.request.mllm
    width = language_width(mllm) if mllm is not None else None
    if plan.request.adapters is not None:
        # With a random language model beside a real adapter file, the file decides whether they fit.
        if width is None and plan.is_random and plan.needs(LANGUAGE):
            width = int(plan.preset.language["hidden_size"])
        return read_adapters(plan.request.adapters, unet_config, width)
    if not plan.is_random:
        raise CheckpointError("the adapters were not given: --adapters takes attn_adapters_projectors.th")
    width = width or int(plan.preset.language["hidden_size"])
    return random_adapters(unet_config, width, plan.preset, plan.request.seed)
