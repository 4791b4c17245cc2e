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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from export.checkpoints.lora_names import ALPHA, DOWN, UP, StoredLayer, is_peft, stored_layers
from export.checkpoints.matching import plain
from export.checkpoints.model import TEXT_ENCODER, UNET, Component, StateDict
from export.checkpoints.peft_config import CONFIG_FILE, PeftConfig, has_metadata, read_configs
from export.checkpoints.values import check_floating, is_finite
from export.checkpoints.weights import Weights, content_hash, open_weights
from moma_rt.errors import CheckpointError

# Part of every hash: raise it when the arithmetic changes.
_FUSION_VERSION = 2
_FOLDER_FILES = tuple(
    f"{stem}.{extension}" for extension in ("safetensors", "bin") for stem in ("adapter_model", "pytorch_lora_weights")
)


@dataclass(frozen=True)
class LoraFile:
    """A LoRA and the strength it is fused with; 1 is what it was trained for."""

    path: Path
    scale: float = 1.0


@dataclass(frozen=True)
class _Layer:
    """One layer of a LoRA, with PEFT's configuration if it has one."""

    stored: StoredLayer
    config: PeftConfig | None

    @property
    def role(self) -> str:
        return self.stored.target.role

    @property
    def weight(self) -> str:
        return self.stored.target.weight

    def delta(self, tensors: StateDict) -> torch.Tensor:
        """up · down · alpha / rank in float32, in the weight's shape."""
        down, up = (tensors[self.stored.parts[part]].float() for part in (DOWN, UP))
        rank = down.shape[0]
        product = up.reshape(-1, rank) @ down.reshape(rank, -1)
        return product.reshape(self.stored.target.shape) * self.factor(tensors, rank)

    def factor(self, tensors: StateDict, rank: int) -> float:
        """The number that up · down is multiplied by: alpha / rank."""
        if self.config is not None:
            return self.config.factor(self.stored.path, rank)
        return float(tensors[self.stored.parts[ALPHA]]) / rank if ALPHA in self.stored.parts else 1.0


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
        CheckpointError: missing or damaged files, NaN or infinity in one, tensors of unknown names, or tensors that do
            not fit. Loading raises it for a sum beyond float32.
    """
    components = {UNET: unet, TEXT_ENCODER: text_encoder}
    for lora in loras:
        weights, config = _opened(lora.path)
        layers = _layers(weights, config, unet, text_encoder)
        _check_values(layers, weights, lora.scale)
        for role in {layer.role for layer in layers}:
            own = [layer for layer in layers if layer.role == role]
            components[role] = _fused(components[role], own, weights, lora.scale)
    return components[UNET], components[TEXT_ENCODER]


def _opened(path: Path) -> tuple[Weights, Path | None]:
    """Open a LoRA's file or folder; also return PEFT's configuration, which has alpha, and then is in `files` too."""
    file = path
    if path.is_dir():
        file = next((path / name for name in _FOLDER_FILES if (path / name).is_file()), path)
        if file == path:
            raise CheckpointError(f"{path} has no LoRA: looked for {', '.join(_FOLDER_FILES)}")
    weights = open_weights(file)
    config = file.with_name(CONFIG_FILE)
    if not is_peft(weights.shapes) or (has_metadata(file) and not config.is_file()):
        return weights, None
    if not config.is_file():
        raise CheckpointError(f"{file} is in PEFT's layout: put its {CONFIG_FILE}, which holds lora_alpha, beside it")
    return dataclasses.replace(weights, files=(*weights.files, config)), config


def _fused(component: Component, layers: Sequence[_Layer], weights: Weights, scale: float) -> Component:
    if not component.sha256:
        # Its weights were not requested, so there is nothing to fuse into.
        return component

    def load(names: Iterable[str] | None = None) -> StateDict:
        state = component.load(names)
        changed = [layer for layer in layers if layer.weight in state]
        tensors = weights.read(name for layer in changed for name in layer.stored.parts.values())
        for layer in changed:
            state[layer.weight] = state[layer.weight].float() + scale * layer.delta(tensors)
            if not is_finite(state[layer.weight]):
                raise CheckpointError(
                    f"{weights.location} takes {layer.weight} beyond the range of float32: lower its scale of {scale:g}"
                )
        return state

    identity = json.dumps([_FUSION_VERSION, component.sha256, content_hash(weights.files), scale])
    return dataclasses.replace(
        component,
        name=f"{component.name} + {weights.location.name}:{scale:g}",
        sha256=hashlib.sha256(identity.encode()).hexdigest(),
        load=load,
    )


def _layers(weights: Weights, config: Path | None, unet: Component, text_encoder: Component) -> list[_Layer]:
    # The configuration first: it names the kind of adapter, of which unknown tensors are only the sign.
    configs = read_configs(weights.location, config)
    stored = stored_layers(weights.shapes, weights.location, unet, text_encoder)
    for layer in stored:
        _check(layer, weights)
    return [_Layer(layer, configs.get(layer.target.role)) for layer in stored]


def _check_values(layers: Sequence[_Layer], weights: Weights, scale: float) -> None:
    """Check all values at once: the file is small, and an export comes to a layer only after minutes."""
    tensors = weights.read(weights.shapes)
    for layer in layers:
        down, up = (layer.stored.parts[part] for part in (DOWN, UP))
        check_floating({down: tensors[down], up: tensors[up]}, weights.location)
        factor = layer.factor(tensors, weights.shapes[down][0])
        if abs(scale * factor) > torch.finfo(torch.float32).max:
            raise CheckpointError(f"{weights.location} at scale {scale:g} multiplies {down} by {factor:g}: too large")


def _check(layer: StoredLayer, weights: Weights) -> None:
    where = weights.location
    for part in (DOWN, UP):
        if part not in layer.parts:
            raise CheckpointError(f"{where} does not fit: {next(iter(layer.parts.values()))} has no {part} beside it")
    down, up = (plain(weights.shapes[layer.parts[part]]) for part in (DOWN, UP))
    target = plain(layer.target.shape)
    if len(up) != 2 or down != (up[1], *target[1:]) or up[0] != target[0] or up[1] == 0:
        raise CheckpointError(
            f"{where} does not fit {layer.target.weight} of shape {list(layer.target.shape)}: "
            f"down is {list(weights.shapes[layer.parts[DOWN]])}, up is {list(weights.shapes[layer.parts[UP]])}"
        )
    if ALPHA in layer.parts and math.prod(weights.shapes[layer.parts[ALPHA]]) != 1:
        raise CheckpointError(f"{where} does not fit: {layer.parts[ALPHA]} is not a number")
