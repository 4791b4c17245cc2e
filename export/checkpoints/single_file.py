"""Read a base model, or a VAE, from one `.safetensors` or `.ckpt` file in the CompVis layout.

Such a file has no configs: sizes come from the shapes, the rest is Stable Diffusion 1.5's. If it holds the UNet twice,
the plain weights are used and their moving average (`model_ema.`) is ignored, as in diffusers; if it holds only the
average, that is used.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from export.checkpoints import presets
from export.checkpoints.architectures import (
    SCALING_FACTOR,
    check_text_encoder,
    check_unet,
    check_vae,
    expected_shapes,
)
from export.checkpoints.compvis_names import EMA_PREFIX, UNET_PREFIX, ema_name, unet_names, vae_names
from export.checkpoints.matching import Origin, Shapes, class_prefix, fit, unread
from export.checkpoints.model import TEXT_ENCODER, UNET, VAE, BaseParts, Component
from export.checkpoints.names import Rename, renaming
from export.checkpoints.weights import Weights, open_weights, read_json, tensors_hash
from moma_rt.errors import CheckpointError

_VAE_PREFIX = "first_stage_model."
_TEXT_PREFIX = "cond_stage_model.transformer."
# The first that a file has is read.
_TEXT_PREFIXES = (_TEXT_PREFIX, "cond_stage_model.", "text_encoder.")
_NEEDED = "MoMA's adapters need Stable Diffusion 1.5"
# Names that other files have, and what they tell.
_OTHER_NAMES = {
    "conditioner.": f"a name that SDXL checkpoints have; {_NEEDED}",
    "cond_stage_model.model.": "a text encoder in OpenCLIP's layout, as Stable Diffusion 2 has; "
    f"looked for {_TEXT_PREFIX}*; {_NEEDED}",
    f"{UNET_PREFIX}joint_blocks.": f"a name that Stable Diffusion 3 checkpoints have; {_NEEDED}",
}
_HINTS = {
    "lora_unet_": "; a LoRA has such names: --lora takes it",
    "lora_te_": "; a LoRA has such names: --lora takes it",
    "base_model.model.": "; a LoRA of PEFT has such names: --lora takes it",
    "down_blocks.": "; the UNet of a diffusers folder has such names: give the whole folder",
    "input_blocks.": "; a UNet alone has such names: give a whole checkpoint",
    "diffusion_model.": "; a UNet alone has such names: give a whole checkpoint",
    "text_model.": "; a text encoder has such names: give a whole checkpoint",
    "first_stage_model.": "; a VAE has such names: --vae takes it",
    "decoder.": "; a VAE has such names: --vae takes it",
    "double_blocks.": "; Flux has such names",
}
_V_PREDICTION = ("v_pred", "ztsnr")
_SCALE = "scale_factor"
_CLIP_HEAD_WIDTH = 64


def read_single_file(file: Path, vae: Component | None, roles: frozenset[str]) -> BaseParts:
    """Read a checkpoint file, with `vae` instead of its own VAE if given; the result's tokenizer is None.

    Weights are hashed for `roles` only; other components have only their configs.

    Raises:
        CheckpointError: the file is damaged or unsafe, has another layout or architecture than SD1.5's, or lacks a
            part that `roles` needs, or a part does not fit.
    """
    weights = open_weights(file)
    prefix = _unet_prefix(file, weights.shapes)
    unet_config = _unet_config(file, weights.shapes, prefix)
    unet_shapes = expected_shapes(UNET, unet_config, file)
    to_new = unet_names(unet_shapes)
    _check_scale(weights)
    if prefix == EMA_PREFIX:
        to_new = {ema_name(old).removeprefix(prefix): new for old, new in to_new.items()}
    unet = _component(UNET, weights, unet_config, renaming(UNET, to_new, prefix), roles)
    text_encoder = _text_encoder(weights, unet_config["cross_attention_dim"], roles)
    return BaseParts(unet, vae if vae is not None else _vae_of_base(weights, roles), text_encoder, None)


def read_vae_file(file: Path, roles: frozenset[str]) -> Component:
    """Read the VAE from a file: a VAE alone, in CompVis' or diffusers' layout, or a whole checkpoint in CompVis'.

    Raises:
        CheckpointError: see `read_single_file`.
    """
    weights = open_weights(file)
    prefix = _VAE_PREFIX if any(name.startswith(_VAE_PREFIX) for name in weights.shapes) else ""
    rename = renaming(VAE, prefix=prefix)
    if not any(rename(name) == "encoder.conv_in.weight" for name in weights.shapes):
        raise CheckpointError(f"{file} holds no VAE: it lacks {_VAE_PREFIX}encoder.* and encoder.*")
    return _vae(weights, prefix, roles)


def _unet_prefix(file: Path, shapes: Mapping[str, Any]) -> str:
    """Return the prefix of the UNet's names, after checking that the file is a checkpoint of the right kind."""
    for start, what in _OTHER_NAMES.items():
        if name := next((name for name in shapes if name.startswith(start)), None):
            raise CheckpointError(f"{file} has {name}: {what}")
    if name := next((name for name in _V_PREDICTION if name in shapes), None):
        raise CheckpointError(
            f"{file} has {name}, the mark of v_prediction; only models that predict epsilon are supported"
        )
    for prefix in (UNET_PREFIX, EMA_PREFIX):
        if any(name.startswith(prefix) for name in shapes):
            return prefix
    have = ", ".join(sorted(shapes)[:3]) or "nothing"
    hint = next((hint for start, hint in _HINTS.items() if any(name.startswith(start) for name in shapes)), "")
    raise CheckpointError(
        f"{file} is not a checkpoint in the CompVis layout: it has no {UNET_PREFIX}* but {have}{hint}"
    )


def _unet_config(file: Path, shapes: Mapping[str, tuple[int, ...]], prefix: str) -> dict[str, Any]:
    def shape(name: str) -> tuple[int, ...]:
        return shapes.get(f"{UNET_PREFIX}{name}" if prefix == UNET_PREFIX else ema_name(name), ())

    config = dict(presets.SD15.unet)
    inputs = shape("input_blocks.0.0.weight")
    text = shape("input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight")
    widths = [shape(f"input_blocks.{block}.0.out_layers.3.weight")[:1] for block in (1, 4, 7, 10)]
    if len(inputs) == 4:
        config["in_channels"] = inputs[1]
    if len(text) == 2:
        config["cross_attention_dim"] = text[1]
    if all(widths):
        config["block_out_channels"] = tuple(width[0] for width in widths)
    if shape("label_emb.0.0.weight"):
        config["addition_embed_type"] = "text_time"
    return check_unet(config, file)


def _check_scale(weights: Weights) -> None:
    """Check the factor of the latents, where training saved it; half precision may have rounded it."""
    if weights.shapes.get(_SCALE) not in ((), (1,)):
        return
    factor = float(weights.read([_SCALE])[_SCALE])
    if abs(factor - SCALING_FACTOR) > 1e-3:
        raise CheckpointError(
            f"{weights.location} has {_SCALE} {factor:g}; Stable Diffusion 1.5's latents have {SCALING_FACTOR}"
        )


def _text_encoder(weights: Weights, width: int, roles: frozenset[str]) -> Component:
    prefix = next((p for p in _TEXT_PREFIXES if any(name.startswith(p) for name in weights.shapes)), _TEXT_PREFIX)
    rename = renaming(TEXT_ENCODER, prefix=prefix)
    found = {new: shape for name, shape in weights.shapes.items() if (new := rename(name)) is not None}
    if not found and TEXT_ENCODER in roles:
        raise CheckpointError(f"{weights.location} has no text encoder ({_TEXT_PREFIX}*); give a whole checkpoint")
    config = dict(presets.SD15.text_encoder)
    embedding, mlp = found.get("embeddings.token_embedding.weight"), found.get("encoder.layers.0.mlp.fc1.weight")
    if embedding and mlp and len(embedding) == 2 and len(mlp) == 2:
        config |= {"vocab_size": embedding[0], "hidden_size": embedding[1], "intermediate_size": mlp[0]}
        config["num_attention_heads"] = max(1, embedding[1] // _CLIP_HEAD_WIDTH)
        config["num_hidden_layers"] = _count(found, r"encoder\.layers\.(\d+)\..*")
    if found or TEXT_ENCODER in roles:
        config = check_text_encoder(config, weights.location, width)
    return _component(TEXT_ENCODER, weights, config, rename, roles)


def _vae_of_base(weights: Weights, roles: frozenset[str]) -> Component:
    if any(name.startswith(_VAE_PREFIX) for name in weights.shapes):
        return _vae(weights, _VAE_PREFIX, roles)
    if VAE in roles:
        raise CheckpointError(f"{weights.location} has no VAE ({_VAE_PREFIX}*); give one with --vae")
    return unread(VAE, weights.location.stem, check_vae(dict(presets.SD15.vae), weights.location))


def _vae(weights: Weights, prefix: str, roles: frozenset[str]) -> Component:
    file, rename = weights.location, renaming(VAE, prefix=prefix)
    shapes = {new: shape for name, shape in weights.shapes.items() if (new := rename(name)) is not None}
    beside = file.parent / "config.json"
    if not prefix and any(name.startswith("encoder.down_blocks.") for name in shapes) and beside.is_file():
        config = check_vae(read_json(beside), beside)
    else:
        config = check_vae(_vae_config(shapes), file)
    return _component(VAE, weights, config, renaming(VAE, vae_names(expected_shapes(VAE, config, file)), prefix), roles)


def _vae_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Stable Diffusion 1.5's config with the sizes of a VAE in CompVis' or diffusers' layout."""
    config = dict(presets.SD15.vae)
    for first in ("encoder.down.{}.block.{}.", "encoder.down_blocks.{}.resnets.{}."):
        widths = [shapes.get(f"{first.format(level, 0)}conv1.weight", ())[:1] for level in range(4)]
        if all(widths):
            config["block_out_channels"] = tuple(width[0] for width in widths)
            config["layers_per_block"] = _count(shapes, first.format(0, r"(\d+)") + r"conv1\.weight")
    return config


def _count(names: Mapping[str, Any], pattern: str) -> int:
    return len({match[1] for name in names if (match := re.fullmatch(pattern, name))})


def _component(role: str, weights: Weights, config: dict[str, Any], rename: Rename, roles: frozenset[str]) -> Component:
    """Return one role of the file, hashed by its own tensors: merges often share a VAE or a text encoder."""
    name = weights.location.stem
    if role not in roles:
        return unread(role, name, config)
    expected: Shapes = expected_shapes(role, config, weights.location)
    # Its values are read, and so checked, for its hash.
    component = fit(role, Origin(name, config, ""), weights, expected, rename, check=False)
    prefix = class_prefix(expected)
    stored = {tensor.removeprefix(prefix): value for tensor, value in component.load().items()}
    identity = json.dumps([role, config, tensors_hash(stored)], sort_keys=True)
    return dataclasses.replace(component, sha256=hashlib.sha256(identity.encode()).hexdigest())
