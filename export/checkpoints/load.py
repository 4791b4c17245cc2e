"""Load the checkpoint that the command line describes, from files or with random weights."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from export.bases import bases
from export.checkpoints import presets
from export.checkpoints.adapters import read_adapters
from export.checkpoints.architectures import Config, check_vae, image_size
from export.checkpoints.diffusers_folder import read_base, read_vae
from export.checkpoints.hub import download_base
from export.checkpoints.llava import (
    check_widths,
    has_vision_tower,
    language_width,
    read_language,
    read_vision,
    read_vision_config,
    read_vision_copy,
)
from export.checkpoints.lora import LoraFile, fuse_loras
from export.checkpoints.model import (
    ADAPTERS,
    LANGUAGE,
    ROLES,
    TEXT_ENCODER,
    UNET,
    VAE,
    VISION,
    BaseParts,
    Checkpoint,
    Component,
)
from export.checkpoints.presets import Preset
from export.checkpoints.single_file import read_single_file
from export.checkpoints.synthetic import random_adapters, random_component
from export.tokenizers import has_text_tokenizer
from moma_rt.errors import CheckpointError

TINY = "tiny"
MINI = "mini"
RANDOM = "random"
# The trained weights that lie in the repository.
_MINI_WEIGHTS = Path(__file__).resolve().parents[2] / "assets" / MINI
_CLIP = "openai/clip-vit-large-patch14"


@dataclass(frozen=True)
class CheckpointRequest:
    """A checkpoint to load. `roles` are those whose weights are needed (see `roles_for`).

    base: `tiny` (synthetic), `mini` (small and trained, in the repository), a name in bases.toml, a diffusers folder,
        or a single file in the CompVis layout.
    weights: `random` generates every role not given as a file from `seed`; a folder or file holds the weights of a
        named base, which is downloaded if `weights` is None. For `mini` it is a folder laid out as assets/mini.
    adapters, mllm, vision, vae: the adapter file, the LLaVA and CLIP folders, and the VAE's folder or file.
    loras: fused into the base's UNet and text encoder, in this order.
    """

    base: str
    weights: str | None = None
    adapters: Path | None = None
    mllm: Path | None = None
    vision: Path | None = None
    vae: Path | None = None
    roles: frozenset[str] = field(default_factory=lambda: frozenset(ROLES))
    seed: int = 0
    loras: tuple[LoraFile, ...] = ()


@dataclass(frozen=True)
class _Plan:
    """A request whose base and weights are resolved.

    `name` is the base's name for the manifest; `source` its folder or file, None if it is synthetic; `vae` replaces
    the base's own.
    """

    request: CheckpointRequest
    name: str
    source: Path | None
    vae: Path | None
    is_random: bool

    @property
    def preset(self) -> Preset:
        synthetic = {TINY: presets.TINY, MINI: presets.MINI} if self.source is None else {}
        return synthetic.get(self.name, presets.SD15)

    def needs(self, role: str) -> bool:
        return role in self.request.roles

    def random(self, role: str, config: Config, model: str = "") -> Component:
        return random_component(role, config, self.request.seed, model)


def load_checkpoint(request: CheckpointRequest) -> Checkpoint:
    """Open and check everything the request needs; large tensors are read only by `Component.load`.

    Raises:
        CheckpointError: a needed role that was not given (the message names the flag), or a file that is missing,
            damaged, unsafe, of another architecture, or does not fit the others.
    """
    plan = _resolve(request)
    request = plan.request
    base = _with_loras(_base(plan), request)
    language = _language(plan)
    vision = _vision(plan, language)
    adapters = _adapters(plan, base.unet.config)
    return Checkpoint(
        base="+".join((plan.name, *(lora.path.stem for lora in request.loras))),
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
        return _Plan(request, TINY, None, request.vae, True)
    if request.base == MINI:
        return _mini(request)
    named = bases().get(request.base)
    if named is None:
        return _given_by_path(request)
    if given == RANDOM:
        return _Plan(request, named.name, None, request.vae, True)
    if given is not None:
        return _Plan(request, named.name, _existing(Path(given)), request.vae, False)
    source, vae = download_base(named, request.roles, request.vae)
    return _Plan(request, named.name, source, vae, False)


def _mini(request: CheckpointRequest) -> _Plan:
    """Resolve the small model, whose folder has all parts; those of them that are given replace the folder's."""
    if request.weights == RANDOM:
        return _Plan(request, MINI, None, request.vae, True)
    folder = _MINI_WEIGHTS if request.weights is None else _existing(Path(request.weights))
    if not (folder / "base").is_dir():
        raise CheckpointError(
            f"{folder} does not hold the small model: it has no base/; train it with python -m examples.mini_moma "
            f"(docs/mini.md), or give --weights {RANDOM} or a folder of trained weights"
        )
    complete = dataclasses.replace(
        request,
        adapters=request.adapters or folder / "attn_adapters_projectors.th",
        mllm=request.mllm or folder / "mllm",
        vision=request.vision or folder / "vision",
    )
    return _Plan(complete, MINI, folder / "base", request.vae, False)


def _given_by_path(request: CheckpointRequest) -> _Plan:
    source, given = Path(request.base), request.weights
    if given not in (None, RANDOM):
        raise CheckpointError(
            f"--weights {given} goes with a base's name ({', '.join(bases())}); --base {source} is a path of its own"
        )
    if not source.exists():
        raise CheckpointError(
            f"{source} does not exist; "
            f"a base is {TINY}, {MINI}, {', '.join(bases())}, a diffusers folder or a single file"
        )
    name = source.stem if source.is_file() else source.resolve().name
    return _Plan(request, name, source, request.vae, given == RANDOM)


def _existing(path: Path) -> Path:
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; --weights takes {RANDOM}, a diffusers folder or a single file")
    return path


def _base(plan: _Plan) -> BaseParts:
    roles, preset = plan.request.roles, plan.preset
    if plan.source is not None and plan.source.is_dir():
        return read_base(plan.source, plan.vae, roles)
    vae = read_vae(plan.vae, roles) if plan.vae is not None else None
    if plan.source is not None:
        parts = read_single_file(plan.source, vae, roles)
        return dataclasses.replace(parts, tokenizer=_tokenizer_of_file(plan)) if plan.needs(TEXT_ENCODER) else parts
    # Bases differ in UNet and text encoder; the other networks are the same in all, and so are exported once.
    model = "" if preset is not presets.SD15 else plan.name
    return BaseParts(
        plan.random(UNET, preset.unet, model),
        vae if vae is not None else plan.random(VAE, check_vae(dict(preset.vae), "the preset")),
        plan.random(TEXT_ENCODER, preset.text_encoder, model),
        None,
    )


def _tokenizer_of_file(plan: _Plan) -> Path:
    """Find CLIP's tokenizer, which a single file lacks: beside the file, or the same one in the vision folder."""
    file, vision = Path(str(plan.source)), plan.request.vision
    beside = file.parent / "tokenizer"
    for folder in (beside, *((vision,) if vision is not None else ())):
        if has_text_tokenizer(folder):
            return folder
    raise CheckpointError(
        f"{file} needs CLIP's tokenizer: put vocab.json and merges.txt of https://huggingface.co/{_CLIP} into {beside}"
    )


def _with_loras(base: BaseParts, request: CheckpointRequest) -> BaseParts:
    if not request.loras:
        return base
    unet, text_encoder = fuse_loras(base.unet, base.text_encoder, request.loras)
    return dataclasses.replace(base, unet=unet, text_encoder=text_encoder)


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
        # A random language model has the preset's width, which a real adapter file must match.
        if width is None and plan.is_random and plan.needs(LANGUAGE):
            width = int(plan.preset.language["hidden_size"])
        return read_adapters(plan.request.adapters, unet_config, width)
    if not plan.is_random:
        raise CheckpointError("the adapters were not given: --adapters takes attn_adapters_projectors.th")
    width = width or int(plan.preset.language["hidden_size"])
    return random_adapters(unet_config, width, plan.preset, plan.request.seed)
