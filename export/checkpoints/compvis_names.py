"""Map the CompVis layout's tensor names to diffusers' names; no tensors are read.

diffusers can convert such checkpoints too, but its functions are private, drop unknown tensors, and need the whole
state dict in memory. With names alone, every tensor is accounted for and can be read on demand.
"""

import re
from collections.abc import Iterable

UNET_PREFIX = "model.diffusion_model."
EMA_PREFIX = "model_ema.diffusion_model"
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
# CompVis numbers blocks consecutively over the levels: a level has two layers and then a change of resolution on the
# way down, and three layers, with the change inside the last one, on the way up.
_DOWN, _UP, _LAST_VAE_LEVEL = 3, 3, 3


def unet_names(names: Iterable[str]) -> dict[str, str]:
    """Map CompVis names (without `model.diffusion_model.`) to the given diffusers names."""
    return {_unet_name(name): name for name in names}


def vae_names(names: Iterable[str]) -> dict[str, str]:
    """Map CompVis names (without `first_stage_model.`) to the given diffusers names."""
    return {_vae_name(name): name for name in names}


def ema_name(name: str) -> str:
    """Return the name of a UNet tensor's moving average: the tensor's name (without its prefix) without dots."""
    return EMA_PREFIX + name.replace(".", "")


def _unet_name(name: str) -> str:
    module, _, kind = name.rpartition(".")
    if module in _UNET_ENDS:
        return f"{_UNET_ENDS[module]}.{kind}"
    match = re.fullmatch(
        r"(down|up|mid)_blocks?\.(?:(\d+)\.)?(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", name
    )
    if match is None:
        return name
    way, part, index, rest = match[1], match[3], int(match[4]), match[5]
    block = int(match[2] or 0)
    if part == "resnets":
        inner, _, kind = rest.rpartition(".")
        rest = f"{_RESNET.get(inner, inner)}.{kind}"
    if way == "mid":
        return f"middle_block.{2 * index if part == 'resnets' else 1}.{rest}"
    if part == "downsamplers":
        return f"input_blocks.{_DOWN * block + _DOWN}.0.op.{rest.removeprefix('conv.')}"
    if part == "upsamplers":
        # After the resnet, and after the attention, which all levels but the coarsest have.
        return f"output_blocks.{_UP * block + _UP - 1}.{1 if block == 0 else 2}.{rest}"
    place = f"input_blocks.{_DOWN * block + 1 + index}" if way == "down" else f"output_blocks.{_UP * block + index}"
    return f"{place}.{0 if part == 'resnets' else 1}.{rest}"


def _vae_name(name: str) -> str:
    name = name.replace(".conv_shortcut.", ".nin_shortcut.").replace(".conv_norm_out.", ".norm_out.")
    if match := re.fullmatch(r"(.+)\.mid_block\.attentions\.0\.(.+)\.(weight|bias)", name):
        return f"{match[1]}.mid.attn_1.{_VAE_ATTENTION.get(match[2], match[2])}.{match[3]}"
    if match := re.fullmatch(r"(.+)\.mid_block\.resnets\.(\d+)\.(.+)", name):
        return f"{match[1]}.mid.block_{int(match[2]) + 1}.{match[3]}"
    if match := re.fullmatch(r"encoder\.down_blocks\.(\d+)\.(.+)", name):
        return f"encoder.down.{match[1]}.{_vae_part(match[2])}"
    if match := re.fullmatch(r"decoder\.up_blocks\.(\d+)\.(.+)", name):
        return f"decoder.up.{_LAST_VAE_LEVEL - int(match[1])}.{_vae_part(match[2])}"
    return name


def _vae_part(rest: str) -> str:
    rest = rest.replace("downsamplers.0.", "downsample.").replace("upsamplers.0.", "upsample.")
    return re.sub(r"^resnets\.", "block.", rest)
