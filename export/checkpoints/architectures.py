"""Check that configs are of Stable Diffusion 1.5's architecture, and derive the names and shapes of their weights."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from export.checkpoints.model import LANGUAGE, TEXT_ENCODER, UNET, VAE, VISION
from export.checkpoints.values import check_positive, is_positive
from moma_rt.errors import CheckpointError
from moma_rt.messages import first_line

Config = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]

TEXT_TOKENS = 77
LATENT_CHANNELS = 4
SCALING_FACTOR = 0.18215
_NEEDED = "Stable Diffusion 1.5"
_LLAMA_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "rms_norm_eps",
    "rope_theta",
    "hidden_act",
    "max_position_embeddings",
    "attention_bias",
)
_UNET_DEFAULTS: Config = {"sample_size": 64, "block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 1280}
_REQUIRED_UNET: Config = {
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "layers_per_block": 2,
    "transformer_layers_per_block": 1,
    "only_cross_attention": False,
    "dual_cross_attention": False,
    "attention_type": "default",
    "class_embed_type": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "addition_embed_type": None,
    "time_cond_proj_dim": None,
    "resnet_time_scale_shift": "default",
    "act_fn": "silu",
}
_REQUIRED_VAE: Config = {
    "latent_channels": LATENT_CHANNELS,
    "in_channels": 3,
    "out_channels": 3,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
}
# transformers omits these from a config if they have CLIP's default values.
_CLIP_TEXT_DEFAULTS: Config = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "vocab_size": 49408,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-05,
}
_OTHER_INPUTS = {9: "inpainting", 8: "instruction-editing", 7: "upscaling"}
_ALLOWED_IF_ABSENT = object()


@dataclass(frozen=True)
class AttentionLayer:
    """One attention of the UNet: its diffusers path, width, heads, and whether it is self-attention (`attn1`).

    `level` is its resolution: 0 is the latents' own, each further one half of that.
    """

    path: str
    level: int
    channels: int
    heads: int
    is_self: bool


def attention_layers(unet_config: Config) -> tuple[AttentionLayer, ...]:
    """All attentions in the adapter file's order, which is that of `unet.attn_processors`: down, up, mid.

    Even indices are self-attentions, odd ones the cross-attentions of the same transformer block.
    """
    layers = []
    for path, level in _transformers(unet_config):
        channels = unet_config["block_out_channels"][level]
        # diffusers named the number of heads `attention_head_dim` in SD1.5's configs and keeps reading it so.
        heads = unet_config.get("num_attention_heads") or unet_config.get("attention_head_dim", 8)
        count = heads[level] if isinstance(heads, list | tuple) else heads
        for attention in ("attn1", "attn2"):
            name = f"{path}.transformer_blocks.0.{attention}"
            layers.append(AttentionLayer(name, level, channels, count, attention == "attn1"))
    return tuple(layers)


def _transformers(config: Config) -> Iterator[tuple[str, int]]:
    """Path and resolution level (0 is the finest) of each spatial transformer."""
    levels = len(config["block_out_channels"])
    per_block = config.get("layers_per_block", 2)
    for block, kind in enumerate(config.get("down_block_types", _REQUIRED_UNET["down_block_types"])):
        for index in range(per_block if kind.startswith("CrossAttn") else 0):
            yield f"down_blocks.{block}.attentions.{index}", block
    for block, kind in enumerate(config.get("up_block_types", _REQUIRED_UNET["up_block_types"])):
        for index in range(per_block + 1 if kind.startswith("CrossAttn") else 0):
            yield f"up_blocks.{block}.attentions.{index}", levels - 1 - block
    yield "mid_block.attentions.0", levels - 1


def check_unet(config: Config, where: object) -> Config:
    """Check that `config` is a text-to-image UNet of SD1.5's architecture (any widths); fill in diffusers' defaults.

    Raises:
        CheckpointError: another architecture, which the message names if it is a known one.
    """
    config = {**_UNET_DEFAULTS, **config}
    cross = config["cross_attention_dim"]
    for key, value, model in (
        ("addition_embed_type", "text_time", "SDXL"),
        ("cross_attention_dim", 2048, "SDXL"),
        ("cross_attention_dim", 1024, "Stable Diffusion 2"),
    ):
        if config.get(key) == value:
            raise CheckpointError(f"{where} has {key} {value!r}, as {model} has; MoMA's adapters need {_NEEDED}")
    inputs = config.get("in_channels", LATENT_CHANNELS)
    if inputs != LATENT_CHANNELS:
        kind = (
            f", as {_OTHER_INPUTS[inputs]} checkpoints have" if inputs in _OTHER_INPUTS else " (another architecture)"
        )
        raise CheckpointError(f"{where} has in_channels {inputs!r}{kind}; a text-to-image one has {LATENT_CHANNELS}")
    _check_class(config, "UNet2DConditionModel", where)
    _check_values(config, _REQUIRED_UNET, where)
    widths, size = config["block_out_channels"], config["sample_size"]
    if not (isinstance(widths, list | tuple) and len(widths) == 4 and all(_is_size(w) for w in widths)):
        raise CheckpointError(f"{where} has block_out_channels {widths!r}; Stable Diffusion 1.5 has four widths")
    if not _is_size(cross) or not _is_size(size):
        raise CheckpointError(
            f"{where} has cross_attention_dim {cross!r} and sample_size {size!r}; both must be positive integers"
        )
    heads = config.get("num_attention_heads") or config.get("attention_head_dim", 8)
    if not all(_is_size(count) for count in (heads if isinstance(heads, list | tuple) else (heads,))):
        raise CheckpointError(f"{where} has attention_head_dim {heads!r}; it must be one or several positive integers")
    if config.get("freq_shift", 0) != 0:
        raise CheckpointError(f"{where} has freq_shift {config['freq_shift']!r}; {_NEEDED} has 0")
    check_positive(config, ("norm_eps", "mid_block_scale_factor"), where)
    # Linear layers and 1×1 convolutions compute the same; the weights are read as either.
    return {**config, "use_linear_projection": False}


def check_vae(config: Config, where: object) -> Config:
    """Check that `config` is a VAE that Stable Diffusion 1.5 can use, and fill in `scaling_factor`.

    Raises:
        CheckpointError: another class, other latents (such as SDXL's), or a downsampling factor other than 8.
    """
    config = {"scaling_factor": SCALING_FACTOR, **config}
    _check_class(config, "AutoencoderKL", where)
    factor = config["scaling_factor"]
    if not is_positive(factor) or abs(factor - SCALING_FACTOR) > 1e-6:
        raise CheckpointError(
            f"{where} has scaling_factor {factor!r}; Stable Diffusion 1.5's VAE has {SCALING_FACTOR} (SDXL's 0.13025)"
        )
    _check_values(config, _REQUIRED_VAE, where)
    widths = config.get("block_out_channels")
    if not isinstance(widths, list | tuple) or len(widths) != 4:
        raise CheckpointError(f"{where} has block_out_channels {widths!r}; a VAE of factor 8 has four widths")
    return config


def check_text_encoder(config: Config, where: object, width: int) -> Config:
    """Check that `config` is a CLIP text encoder of 77 tokens and the UNet's `width`, and fill in CLIP's defaults.

    Raises:
        CheckpointError: another model, length or width.
    """
    if config.get("model_type") == "clip" and isinstance(config.get("text_config"), dict):
        config = config["text_config"]
    if config.get("model_type", "clip_text_model") != "clip_text_model":
        raise CheckpointError(f"{where} has model_type {config['model_type']!r}; a CLIP text encoder is needed")
    config = {**_CLIP_TEXT_DEFAULTS, **config}
    _check_values(config, {"max_position_embeddings": TEXT_TOKENS}, where)
    check_clip_numbers(config, where)
    if config["hidden_size"] != width:
        raise CheckpointError(f"{where} has width {config['hidden_size']}, the UNet's cross-attention takes {width}")
    return config


def check_clip_numbers(config: Config, where: object) -> None:
    """Check the numbers in a CLIP encoder's config that its weights do not show.

    Raises:
        CheckpointError: one is not usable.
    """
    check_positive(config, ("layer_norm_eps",), where)
    for key in ("num_hidden_layers", "num_attention_heads"):
        if not _is_size(config[key]):
            raise CheckpointError(f"{where} has {key} {config[key]!r}; it must be a positive integer")


def _check_class(config: Config, expected: str, where: object) -> None:
    found = config.get("_class_name", expected)
    if found != expected:
        raise CheckpointError(f"{where} has the class {found}; {_NEEDED} has a {expected}")


def _check_values(config: Config, required: Config, where: object) -> None:
    for key, value in required.items():
        found = config.get(key, _ALLOWED_IF_ABSENT)
        found = tuple(found) if isinstance(found, list) else found
        if found is not _ALLOWED_IF_ABSENT and found != value:
            raise CheckpointError(f"{where} has {key} {found!r}; {_NEEDED} has {value!r}")


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def image_size(unet_config: Config, vae_config: Config) -> int:
    """The side of the square pictures in pixels: the latents' side times the VAE's factor."""
    return int(unet_config["sample_size"]) * 2 ** (len(vae_config["block_out_channels"]) - 1)


def expected_shapes(role: str, config: Config, where: object) -> Shapes:
    """Return names and shapes of the weights that `config` implies, by building the role's class on the meta device.

    Raises:
        CheckpointError: the class does not accept the config.
    """
    module = _structure(role, config, where)
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    if role == LANGUAGE:
        width, vision = config["hidden_size"], config["mm_hidden_size"]
        shapes |= {"mm_projector.0.weight": (width, vision), "mm_projector.0.bias": (width,)}
        shapes |= {"mm_projector.2.weight": (width, width), "mm_projector.2.bias": (width,)}
    return shapes


def full_config(role: str, config: Config, where: object) -> Config:
    """Return `config` with the defaults of the role's class for missing entries.

    Raises:
        CheckpointError: the class does not accept the config.
    """
    found = _structure(role, config, where).config
    return {**config, **(found if isinstance(found, Mapping) else found.to_dict())}


def _structure(role: str, config: Config, where: object) -> torch.nn.Module:
    """Build the role's module on the meta device."""
    try:
        with torch.device("meta"):
            return _build(role, config)
    except Exception as error:
        # Configs are users' files, and the classes refuse bad ones with errors of every type.
        raise CheckpointError(f"{where} does not describe a usable {role}: {_reason(error)}") from None


def _reason(error: BaseException) -> str:
    """The error's first line, or the last one if the first only announces it, as transformers' validators do."""
    first = first_line(error)
    return str(error).strip().splitlines()[-1].strip() if first.rstrip().endswith(":") else first


def llama_config(config: Config) -> Config:
    """The keyword arguments of transformers' `LlamaConfig` in a LLaVA config."""
    return {key: config[key] for key in _LLAMA_FIELDS if config.get(key) is not None}


def _build(role: str, config: Config) -> torch.nn.Module:
    """Build the role's module. The libraries are imported here because importing them takes seconds."""
    if role == UNET:
        from diffusers import UNet2DConditionModel

        return UNet2DConditionModel.from_config(config)
    if role == VAE:
        from diffusers import AutoencoderKL

        return AutoencoderKL.from_config(config)
    if role == TEXT_ENCODER:
        from transformers import CLIPTextConfig, CLIPTextModel

        return CLIPTextModel(CLIPTextConfig(**config))
    if role == VISION:
        from transformers import CLIPVisionConfig, CLIPVisionModel

        return CLIPVisionModel(CLIPVisionConfig(**config))
    from transformers import LlamaConfig, LlamaModel

    return LlamaModel(LlamaConfig(**llama_config(config)))
