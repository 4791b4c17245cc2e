"""The names under which files store a network's tensors: one list, for folders and for single files.

Trainers, converters and versions of the libraries put prefixes before the names, add tensors that no network reads, and
spell some layers differently.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

from export.checkpoints.model import TEXT_ENCODER, UNET, VAE, VISION

Rename = Callable[[str], str | None]

# What data-parallel training and checkpoints of training put before every name.
_OUTER = ("module.", "state_dict.")
# torch.compile names a compiled part so, within names of either separator.
_COMPILED = re.compile(r"_orig_mod[._]")
_PREFIXES = MappingProxyType(
    {
        UNET: ("model.diffusion_model.", "diffusion_model.", "unet.", "model.", "module."),
        VAE: ("first_stage_model.", "vae.", "model.", "module."),
        TEXT_ENCODER: (
            *("cond_stage_model.transformer.", "cond_stage_model.", "text_encoder.", "transformer.", "text_model."),
            *("model.", "module."),
        ),
        VISION: ("vision_model.", "vision_tower.", "model.", "module."),
    }
)
_CLIP_HEADS = r"logit_scale|(text|visual)_projection(\.weight)?|.*\bposition_ids"
# Buffers of diffusion training, moving averages, and parts that are used in training only.
_TRAINING = (
    r"betas|\w*alphas_cumprod\w*|posterior_\w+|lvlb_weights|logvar|scale_factor"
    r"|(model_)?ema(_model)?\..*|loss\..*"
)
_LEFT_OUT = MappingProxyType(
    {
        UNET: re.compile(_TRAINING),
        VAE: re.compile(_TRAINING),
        TEXT_ENCODER: re.compile(rf"{_TRAINING}|{_CLIP_HEADS}|vision_model\..*"),
        VISION: re.compile(rf"{_TRAINING}|{_CLIP_HEADS}|text_model\..*"),
    }
)
_ATTENTION = re.compile(
    r"(.*\.(?:attentions\.\d+|attn_1))\.(query|key|value|proj_attn|proj_out|norm|q|k|v|to_out)\.(weight|bias)"
)
# The spellings of the VAE's attention by CompVis and by diffusers before version 0.12.
_ATTENTION_PARTS = MappingProxyType(
    {
        **{"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"},
        **{"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0", "to_out": "to_out.0", "norm": "group_norm"},
    }
)


def unwrapped(stored: Iterable[str]) -> dict[str, str]:
    """Map names without what trainers and torch.compile put before or into them to the stored names."""
    stored = list(stored)
    names = {_COMPILED.sub("", name): name for name in stored}
    while names and (prefix := next((p for p in _OUTER if all(name.startswith(p) for name in names)), None)):
        names = {name.removeprefix(prefix): old for name, old in names.items()}
    # Should two names become one, the error must show them as they are.
    return names if len(names) == len(stored) else {name: name for name in stored}


def bare(role: str, name: str) -> str | None:
    """Return a stored tensor's name without prefixes and in one spelling; None if the network does not read it.

    CompVis' names of blocks stay: only the network's config tells which of diffusers' names they are.
    """
    while not _LEFT_OUT[role].fullmatch(name):
        prefix = next((p for p in _PREFIXES[role] if name.startswith(p)), None)
        if prefix is None:
            return _one_spelling(name) if role == VAE else name
        name = name.removeprefix(prefix)
    return None


def renaming(role: str, compvis: Mapping[str, str] = MappingProxyType({}), prefix: str = "") -> Rename:
    """Return the function from stored names to today's library's, without the class' prefix; None: not to be read.

    `compvis` maps CompVis' names to diffusers'; names that do not start with `prefix` belong to other networks.
    """
    table = {bare(role, old) or old: new for old, new in compvis.items()}

    def rename(name: str) -> str | None:
        if not name.startswith(prefix):
            return None
        found = bare(role, name.removeprefix(prefix))
        return found if found is None else table.get(found, found)

    return rename


def _one_spelling(name: str) -> str:
    match = _ATTENTION.fullmatch(name)
    return f"{match[1]}.{_ATTENTION_PARTS[match[2]]}.{match[3]}" if match else name


def first_layers(rename: Rename, count: int) -> Rename:
    """Return `rename` without the tensors of a CLIP encoder's layers from number `count` on."""

    def kept(name: str) -> str | None:
        found = rename(name)
        return None if found is not None and layer_of(found) >= count else found

    return kept


def layer_of(name: str) -> int:
    """The number of the CLIP encoder's layer that a tensor belongs to, -1 if to none."""
    match = re.match(r"encoder\.layers\.(\d{1,4})\.", name)
    return int(match[1]) if match else -1
