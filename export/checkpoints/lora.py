"""Fuse LoRAs into a base: W + scale · alpha / rank · up · down, for linear and convolution layers.

Supported layouts: kohya's (`lora_unet_…`, `lora_te_…`, `.alpha`), in which LCM-LoRA, TCD and Hyper-SD are published;
diffusers', with PEFT (`unet.….lora_A.weight`, or without `unet.`) or from before it (`.lora.down.weight`,
`processor.to_q_lora.down.weight`); and PEFT's own (`base_model.model.….lora_A.weight`) with its `adapter_config.json`.
An unknown tensor in a file is an error, because a LoRA applied in part gives wrong pictures without any sign why.
"""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from export.checkpoints.architectures import expected_shapes
from export.checkpoints.compvis_names import unet_names
from export.checkpoints.matching import class_prefix
from export.checkpoints.model import TEXT_ENCODER, UNET, Component, StateDict
from export.checkpoints.weights import Weights, content_hash, open_weights, read_json, read_metadata
from moma_rt.errors import CheckpointError

# Part of every hash: raise it when the arithmetic changes.
_FUSION_VERSION = 1
_LISTED = 3
_DOWN, _UP, _ALPHA = "down", "up", "alpha"
_PARTS = {
    ".lora_down.weight": _DOWN,
    ".lora_up.weight": _UP,
    ".lora_A.weight": _DOWN,
    ".lora_B.weight": _UP,
    ".lora.down.weight": _DOWN,
    ".lora.up.weight": _UP,
    ".lora_linear_layer.down.weight": _DOWN,
    ".lora_linear_layer.up.weight": _UP,
    "_lora.down.weight": _DOWN,
    "_lora.up.weight": _UP,
    ".alpha": _ALPHA,
}
# The oldest files name the text encoder's layers as if they were the UNet's.
_OLD_TEXT_LAYERS = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out.0"}
_SDXL = ("lora_te1_", "lora_te2_", "text_encoder_2.")
_METADATA = "lora_adapter_metadata"
_PEFT_MODEL = "base_model.model."
_PEFT_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class LoraFile:
    """A LoRA and the strength it is fused with; 1 is what it was trained for."""

    path: Path
    scale: float = 1.0


@dataclass(frozen=True)
class _Layer:
    """One layer of a LoRA: the weight that it changes, its stored tensors, and PEFT's configuration if it has one."""

    role: str
    weight: str
    shape: tuple[int, ...]
    parts: Mapping[str, str]
    config: Mapping[str, Any]

    def delta(self, tensors: StateDict) -> torch.Tensor:
        """up · down · alpha / rank in float32, in the weight's shape."""
        down, up = (tensors[self.parts[part]].float() for part in (_DOWN, _UP))
        rank = down.shape[0]
        product = up.reshape(-1, rank) @ down.reshape(rank, -1)
        return product.reshape(self.shape) * self._factor(tensors, rank)

    def _factor(self, tensors: StateDict, rank: int) -> float:
        if self.config:
            alpha = _alpha(self.config, self.weight.removesuffix(".weight"))
            return alpha / (math.sqrt(rank) if self.config["use_rslora"] else rank)
        return float(tensors[self.parts[_ALPHA]]) / rank if _ALPHA in self.parts else 1.0


def parse_lora(text: str) -> LoraFile:
    """Parse `FILE` or `FILE:scale`.

    Raises:
        CheckpointError: the scale is not a finite number.
    """
    path, separator, scale = text.rpartition(":")
    try:
        value = float(scale)
    except ValueError:
        return LoraFile(Path(text))
    if not separator or not path:
        return LoraFile(Path(text))
    if not math.isfinite(value):
        raise CheckpointError(f"--lora {text}: the scale must be a finite number")
    return LoraFile(Path(path), value)


def fuse_loras(unet: Component, text_encoder: Component, loras: Sequence[LoraFile]) -> tuple[Component, Component]:
    """Return the UNet and the text encoder with all LoRAs added; a component that no LoRA changes is returned as is.

    Changed weights are loaded as float32, so that fusing into half precision rounds nothing.

    Raises:
        CheckpointError: missing or damaged files, keys that are not a LoRA of SD1.5, or tensors that do not fit.
    """
    components = {UNET: unet, TEXT_ENCODER: text_encoder}
    targets = _targets(unet, text_encoder)
    for lora in loras:
        weights = _opened(lora.path)
        layers = _layers(weights, targets)
        for role in {layer.role for layer in layers}:
            own = [layer for layer in layers if layer.role == role]
            components[role] = _fused(components[role], own, weights, lora.scale)
    return components[UNET], components[TEXT_ENCODER]


def _opened(path: Path) -> Weights:
    """Open a LoRA's file; in PEFT's own layout, `files` also has the adapter_config.json with its alpha."""
    weights = open_weights(path)
    if not any(name.removeprefix("unet.").startswith(_PEFT_MODEL) for name in weights.shapes):
        return weights
    config = weights.files[0].with_name(_PEFT_CONFIG)
    if not config.is_file():
        raise CheckpointError(f"{path} is in PEFT's layout: put its {_PEFT_CONFIG}, which holds lora_alpha, beside it")
    return dataclasses.replace(weights, files=(*weights.files, config))


def _fused(component: Component, layers: Sequence[_Layer], weights: Weights, scale: float) -> Component:
    if not component.sha256:
        # Its weights were not requested, so there is nothing to fuse into.
        return component

    def load(names: Iterable[str] | None = None) -> StateDict:
        state = component.load(names)
        changed = [layer for layer in layers if layer.weight in state]
        tensors = weights.read(name for layer in changed for name in layer.parts.values())
        for layer in changed:
            state[layer.weight] = state[layer.weight].float() + scale * layer.delta(tensors)
        return state

    identity = json.dumps([_FUSION_VERSION, component.sha256, content_hash(weights.files), scale])
    return dataclasses.replace(
        component,
        name=f"{component.name} + {weights.location.name}:{scale:g}",
        sha256=hashlib.sha256(identity.encode()).hexdigest(),
        load=load,
    )


def _targets(unet: Component, text_encoder: Component) -> dict[str, tuple[str, str, tuple[int, ...]]]:
    """Map every name that a LoRA may use for a layer to its role, weight name in `Component.load`, and shape."""
    found = {}
    shapes = expected_shapes(UNET, unet.config, unet.name)
    old_names = {new: old for old, new in unet_names(shapes).items()}
    for name, shape in _layer_weights(shapes):
        layer, old = (n.removesuffix(".weight") for n in (name, old_names[name]))
        for start in ("", "unet.", _PEFT_MODEL, f"unet.{_PEFT_MODEL}"):
            found[f"{start}{layer}"] = (UNET, name, shape)
        for alias in (layer, old):
            found[f"lora_unet_{_flat(alias)}"] = (UNET, name, shape)
    shapes = expected_shapes(TEXT_ENCODER, text_encoder.config, text_encoder.name)
    prefix = class_prefix(shapes)
    for name, shape in _layer_weights(shapes):
        layer = name.removeprefix(prefix).removesuffix(".weight")
        parent, _, last = layer.rpartition(".")
        for alias in (
            f"text_encoder.text_model.{layer}",
            f"text_encoder.text_model.{parent}.{_OLD_TEXT_LAYERS.get(last, last)}",
            f"text_encoder.{layer}",
            f"lora_te_text_model_{_flat(layer)}",
        ):
            found[alias] = (TEXT_ENCODER, name, shape)
    return found


def _layer_weights(shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[str, tuple[int, ...]]]:
    return [(n, s) for n, s in shapes.items() if n.endswith(".weight") and len(s) in (2, 4) and "embeddings." not in n]


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _layers(weights: Weights, targets: Mapping[str, tuple[str, str, tuple[int, ...]]]) -> list[_Layer]:
    where = weights.location
    if any(name.startswith(_SDXL) for name in weights.shapes):
        raise CheckpointError(f"{where} is an SDXL LoRA; MoMA's adapters need Stable Diffusion 1.5")
    parts: dict[tuple[str, str, tuple[int, ...]], dict[str, str]] = {}
    unknown = []
    for name in weights.shapes:
        suffix = next((suffix for suffix in _PARTS if name.endswith(suffix)), "")
        target = targets.get(_alias(name.removesuffix(suffix)))
        if not suffix or target is None or _PARTS[suffix] in parts.get(target, {}):
            unknown.append(name)
        else:
            parts.setdefault(target, {})[_PARTS[suffix]] = name
    if unknown or not parts:
        have = ", ".join(sorted(unknown)[:_LISTED]) or "nothing"
        more = f" and {len(unknown) - _LISTED} more" if len(unknown) > _LISTED else ""
        raise CheckpointError(
            f"{where} is not a LoRA for Stable Diffusion 1.5's UNet and text encoder: it has {have}{more}"
        )
    configs = _peft_configs(weights)
    layers = []
    for (role, weight, shape), stored in parts.items():
        layer = _Layer(role, weight, shape, stored, configs.get(role, {}))
        _check(layer, weights)
        layers.append(layer)
    return layers


def _alias(layer: str) -> str:
    """Return a layer's name as diffusers has it since PEFT.

    Before, it put LoRAs in attention processors and did not number the layers in `to_out`.
    """
    layer = layer.replace(".processor.", ".")
    return f"{layer}.0" if layer.endswith(".to_out") else layer


def _check(layer: _Layer, weights: Weights) -> None:
    where = weights.location
    for part in (_DOWN, _UP):
        if part not in layer.parts:
            raise CheckpointError(f"{where} does not fit: {next(iter(layer.parts.values()))} has no {part} beside it")
    down, up = (_plain(weights.shapes[layer.parts[part]]) for part in (_DOWN, _UP))
    target = _plain(layer.shape)
    if len(up) != 2 or down != (up[1], *target[1:]) or up[0] != target[0] or up[1] == 0:
        raise CheckpointError(
            f"{where} does not fit {layer.weight} of shape {list(layer.shape)}: "
            f"down is {list(weights.shapes[layer.parts[_DOWN]])}, up is {list(weights.shapes[layer.parts[_UP]])}"
        )
    if _ALPHA in layer.parts and math.prod(weights.shapes[layer.parts[_ALPHA]]) != 1:
        raise CheckpointError(f"{where} does not fit: {layer.parts[_ALPHA]} is not a number")


def _plain(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape without a trailing 1×1: linear layers and 1×1 convolutions are stored as either."""
    return shape[:2] if shape[2:] == (1, 1) else shape


def _peft_configs(weights: Weights) -> dict[str, Mapping[str, Any]]:
    """Return the entries of PEFT's configuration that set alpha, by role; empty where there are none.

    The configuration is a file beside PEFT's own files; newer versions of diffusers write it into the header.
    """
    beside = weights.files[-1]
    is_file = beside.name == _PEFT_CONFIG
    try:
        entries = read_json(beside) if is_file else json.loads(read_metadata(weights.location).get(_METADATA, "{}"))
        unet = _peft_config(entries, f"{UNET}.") or _peft_config(entries, "")
        if is_file and not unet:
            raise ValueError("no lora_alpha")
        return {UNET: unet, TEXT_ENCODER: _peft_config(entries, f"{TEXT_ENCODER}.")}
    except (ValueError, TypeError, AttributeError, re.error):
        what = f"{_PEFT_CONFIG} beside it" if is_file else f"{_METADATA} in its header"
        raise CheckpointError(f"{weights.location} has a damaged {what}") from None


def _peft_config(entries: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return the entries that set the alpha of one network's layers; empty if `entries` has none for `prefix`."""
    if f"{prefix}lora_alpha" not in entries:
        return {}
    patterns = entries.get(f"{prefix}alpha_pattern") or {}
    return {
        "lora_alpha": float(entries[f"{prefix}lora_alpha"]),
        # PEFT's rule: a pattern matches the end of a layer's name, from a dot on.
        "alpha_pattern": [(re.compile(rf"(.*\.)?({pattern})"), float(alpha)) for pattern, alpha in patterns.items()],
        "use_rslora": bool(entries.get(f"{prefix}use_rslora")),
    }


def _alpha(config: Mapping[str, Any], layer: str) -> float:
    found = (alpha for pattern, alpha in config["alpha_pattern"] if pattern.fullmatch(layer))
    return float(next(found, config["lora_alpha"]))
