"""MoMA's own weights, `attn_adapters_projectors.th`: a pickle of three state dicts.

    projectors              proj.weight [M·T, E], proj.bias, norm.weight [T], norm.bias
    self_cross_attentions   {i}.to_k_ip.weight, {i}.to_v_ip.weight, and for even i {i}.scale_learnable [1]
    llm_mapping             mapping.gate_proj.weight, mapping.up_proj.weight [I, W], mapping.down_proj.weight [E, I]

with M = 4 context tokens of the text width T, embeddings of width E, a language model of width W; i counts the
attentions of the UNet in the order of `attention_layers`.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from export.checkpoints.architectures import AttentionLayer, Shapes, attention_layers
from export.checkpoints.matching import report_mismatch
from export.checkpoints.model import ADAPTERS, Component, StateDict
from export.checkpoints.names import unwrapped
from export.checkpoints.pickles import as_state_dict, load_pickle, without_wrappers
from export.checkpoints.values import check_finite, check_floating
from export.checkpoints.weights import content_hash
from moma_rt.errors import CheckpointError

CONTEXT_TOKENS = 4
EMBEDDING_WIDTH = 1024
_FILE_NAME = "attn_adapters_projectors.th"
_PROJECTORS, _ATTENTIONS, _MAPPING = "projectors", "self_cross_attentions", "llm_mapping"
_PARTS = (_PROJECTORS, _ATTENTIONS, _MAPPING)


@dataclass(frozen=True)
class AdapterGeometry:
    """The sizes of the adapters that the UNet does not set."""

    context_tokens: int
    context_width: int
    embedding_width: int
    language_width: int
    mapping_width: int

    def to_config(self) -> dict[str, Any]:
        return asdict(self)


def expected_shapes(unet_config: dict[str, Any], geometry: AdapterGeometry) -> Shapes:
    """Names and shapes of the adapters for a UNet, under the names that `Component.load` gives them."""
    g = geometry
    joined = g.context_tokens * g.context_width
    shapes: Shapes = {
        "projectors.proj.weight": (joined, g.embedding_width),
        "projectors.proj.bias": (joined,),
        "projectors.norm.weight": (g.context_width,),
        "projectors.norm.bias": (g.context_width,),
    }
    for layer in attention_layers(unet_config):
        width = layer.channels if layer.is_self else g.context_width
        for projection in ("to_k_ip", "to_v_ip"):
            shapes[f"attention.{layer.path}.{projection}.weight"] = (layer.channels, width)
        if layer.is_self:
            shapes[f"attention.{layer.path}.scale_learnable"] = (1,)
    shapes["mapping.gate_proj.weight"] = (g.mapping_width, g.language_width)
    shapes["mapping.up_proj.weight"] = (g.mapping_width, g.language_width)
    shapes["mapping.down_proj.weight"] = (g.embedding_width, g.mapping_width)
    return shapes


def read_adapters(path: Path, unet_config: dict[str, Any], language_width: int | None) -> Component:
    """Read the adapters for the given UNet from a file, or from a folder that has the file under its usual name.

    `language_width` is the width of the language model that they will be used with, None if unknown.

    Raises:
        CheckpointError: a missing, damaged or unsafe file, unexpected keys, NaN or infinity, or sizes that do not fit
            other networks.
    """
    path = path / _FILE_NAME if path.is_dir() else path
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; --adapters takes {_FILE_NAME}")
    layers = attention_layers(unet_config)
    tensors = _read(path, layers)
    geometry = _geometry(path, tensors, unet_config["cross_attention_dim"])
    found = {name: tuple(tensor.shape) or (1,) for name, tensor in tensors.items()}
    try:
        report_mismatch(str(path), found, expected_shapes(unet_config, geometry))
    except CheckpointError as error:
        widths, text = list(unet_config["block_out_channels"]), unet_config["cross_attention_dim"]
        raise CheckpointError(f"{error} (needed: adapters for UNet widths {widths}, text width {text})") from None
    if language_width is not None and language_width != geometry.language_width:
        raise CheckpointError(
            f"{path} maps from a language model of width {geometry.language_width}, the one given has {language_width}"
        )

    def load(names: Iterable[str] | None = None) -> StateDict:
        loaded = _read(path, layers)
        return {name: loaded[name].reshape(found[name]) for name in (loaded if names is None else names)}

    return Component(ADAPTERS, path.name, geometry.to_config(), content_hash((path,)), load)


def _read(path: Path, layers: tuple[AttentionLayer, ...]) -> StateDict:
    """Return the file's tensors under their new names; an unexpected name, NaN and infinity are errors."""
    data = without_wrappers(load_pickle(path))
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a {type(data).__name__}, not MoMA's adapters")
    # Entries beside them, such as `epoch`, are left out as in other files; further weights are not.
    found = {key for key, value in data.items() if key in _PARTS or isinstance(value, Mapping | torch.Tensor)}
    if found != set(_PARTS):
        have = ", ".join(sorted(map(str, data))[:6]) or "nothing"
        raise CheckpointError(f"{path} is not MoMA's adapters: it has {have}; expected {', '.join(_PARTS)}")
    parts = {part: as_state_dict(data[part], f"{path}: {part}") for part in _PARTS}
    parts = {part: {name: stored[old] for name, old in unwrapped(stored).items()} for part, stored in parts.items()}
    for part, stored in parts.items():
        check_floating(stored, f"{path}: {part}")
        check_finite(stored, f"{path}: {part}")
    paths = [layer.path for layer in layers]
    tensors = {f"projectors.{name}": tensor for name, tensor in parts[_PROJECTORS].items()}
    strange = [f"{_MAPPING} {name}" for name in parts[_MAPPING] if not name.startswith("mapping.")]
    tensors |= parts[_MAPPING]
    for name, tensor in parts[_ATTENTIONS].items():
        match = re.fullmatch(r"(\d{1,4})\.(.+)", name)
        if match and int(match[1]) < len(paths):
            tensors[f"attention.{paths[int(match[1])]}.{match[2]}"] = tensor
        else:
            strange.append(f"{_ATTENTIONS} {name}")
    if strange:
        raise CheckpointError(f"{path} does not fit: unexpected {_first(strange)} (a UNet of {len(paths)} attentions)")
    return tensors


def _geometry(path: Path, tensors: StateDict, context_width: int) -> AdapterGeometry:
    proj, gate = tensors.get("projectors.proj.weight"), tensors.get("mapping.gate_proj.weight")
    if proj is None or gate is None or proj.dim() != 2 or gate.dim() != 2:
        raise CheckpointError(f"{path} does not fit: missing proj.weight or mapping.gate_proj.weight, or not matrices")
    mapping_width, language_width = gate.shape
    return AdapterGeometry(CONTEXT_TOKENS, context_width, proj.shape[1], language_width, mapping_width)


def _first(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
