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
from export.checkpoints.architectures import check_text_encoder, check_unet, check_vae, expected_shapes
from export.checkpoints.compvis_names import EMA_PREFIX, UNET_PREFIX, ema_name, unet_names, vae_names
from export.checkpoints.matching import Origin, Rename, Shapes, class_prefix, fit, unread
from export.checkpoints.model import TEXT_ENCODER, UNET, VAE, BaseParts, Component
from export.checkpoints.weights import Weights, open_weights, tensors_hash
from moma_rt.errors import CheckpointError

_VAE_PREFIX = "first_stage_model."
_TEXT_PREFIX = "cond_stage_model.transformer."
_OTHER_MODELS = {
    "conditioner.": "an SDXL checkpoint; MoMA's adapters need Stable Diffusion 1.5",
    "cond_stage_model.model.": "a Stable Diffusion 2 checkpoint; MoMA's adapters need 1.5",
    "model.diffusion_model.joint_blocks.": "a Stable Diffusion 3 checkpoint; MoMA's adapters need 1.5",
    "lora_unet_": "a LoRA, not a base model; --lora takes it",
    "lora_te_": "a LoRA, not a base model; --lora takes it",
    "down_blocks.": "a single-file part of a diffusers folder, not a whole checkpoint; give the folder",
    "text_model.": "a text encoder, not a whole checkpoint",
}
_V_PREDICTION = ("v_pred", "ztsnr")
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
    if prefix == EMA_PREFIX:
        to_new = {ema_name(old).removeprefix(prefix): new for old, new in to_new.items()}
    unet = _component(UNET, weights, unet_config, _renaming(prefix, to_new), roles)
    text_encoder = _text_encoder(weights, unet_config["cross_attention_dim"], roles)
    return BaseParts(unet, vae if vae is not None else _vae_of_base(weights, roles), text_encoder, None)


def read_vae_file(file: Path, roles: frozenset[str]) -> Component:
    """Read the VAE from a file in the CompVis layout: a VAE alone, or a whole checkpoint.

    Raises:
        CheckpointError: see `read_single_file`.
    """
    weights = open_weights(file)
    prefix = _VAE_PREFIX if any(name.startswith(_VAE_PREFIX) for name in weights.shapes) else ""
    if f"{prefix}encoder.conv_in.weight" not in weights.shapes:
        raise CheckpointError(f"{file} holds no VAE: it lacks {_VAE_PREFIX}encoder.* and encoder.*")
    return _vae(weights, prefix, roles)


def _unet_prefix(file: Path, shapes: Mapping[str, Any]) -> str:
    """Return the prefix of the UNet's names, after checking that the file is a checkpoint of the right kind."""
    for start, kind in _OTHER_MODELS.items():
        if any(name.startswith(start) for name in shapes):
            raise CheckpointError(f"{file} is {kind}")
    if any(name in shapes for name in _V_PREDICTION):
        raise CheckpointError(f"{file} predicts v_prediction (as Stable Diffusion 2 does); 1.5 predicts epsilon")
    for prefix in (UNET_PREFIX, EMA_PREFIX):
        if any(name.startswith(prefix) for name in shapes):
            return prefix
    have = ", ".join(sorted(shapes)[:3]) or "nothing"
    raise CheckpointError(f"{file} is not a checkpoint in the CompVis layout: it has no {UNET_PREFIX}* but {have}")


def _unet_config(file: Path, shapes: Mapping[str, tuple[int, ...]], prefix: str) -> dict[str, Any]:
    def shape(name: str) -> tuple[int, ...]:
        return shapes.get(f"{UNET_PREFIX}{name}" if prefix == UNET_PREFIX else ema_name(name), ())

    config = dict(presets.SD15.unet)
    inputs, text, projection = (
        shape(name)
        for name in (
            "input_blocks.0.0.weight",
            "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
            "input_blocks.1.1.proj_in.weight",
        )
    )
    widths = [shape(f"input_blocks.{block}.0.out_layers.3.weight")[:1] for block in (1, 4, 7, 10)]
    if len(inputs) == 4:
        config["in_channels"] = inputs[1]
    if len(text) == 2:
        config["cross_attention_dim"] = text[1]
    if all(widths):
        config["block_out_channels"] = tuple(width[0] for width in widths)
    config["use_linear_projection"] = len(projection) == 2
    if shape("label_emb.0.0.weight"):
        config["addition_embed_type"] = "text_time"
    return check_unet(config, file)


def _text_encoder(weights: Weights, width: int, roles: frozenset[str]) -> Component:
    names = {_text_name(name): name for name in weights.shapes}
    names.pop(None, None)
    if not names and TEXT_ENCODER in roles:
        raise CheckpointError(f"{weights.location} has no text encoder ({_TEXT_PREFIX}*); give a whole checkpoint")
    found = {new: weights.shapes[old] for new, old in names.items() if new is not None}
    config = dict(presets.SD15.text_encoder)
    embedding, mlp = found.get("embeddings.token_embedding.weight"), found.get("encoder.layers.0.mlp.fc1.weight")
    if embedding and mlp and len(embedding) == 2 and len(mlp) == 2:
        config |= {"vocab_size": embedding[0], "hidden_size": embedding[1], "intermediate_size": mlp[0]}
        config["num_attention_heads"] = max(1, embedding[1] // _CLIP_HEAD_WIDTH)
        config["num_hidden_layers"] = _count(found, r"encoder\.layers\.(\d+)\..*")
    if found or TEXT_ENCODER in roles:
        config = check_text_encoder(config, weights.location, width)
    return _component(TEXT_ENCODER, weights, config, _text_name, roles)


def _text_name(name: str) -> str | None:
    """Return a text encoder tensor's name without its prefixes; None for other tensors.

    Some merging tools omit `text_model.`, and older versions of transformers saved position_ids as a tensor.
    """
    if not name.startswith(_TEXT_PREFIX) or name.endswith(".position_ids"):
        return None
    return name.removeprefix(_TEXT_PREFIX).removeprefix("text_model.")


def _vae_of_base(weights: Weights, roles: frozenset[str]) -> Component:
    if any(name.startswith(_VAE_PREFIX) for name in weights.shapes):
        return _vae(weights, _VAE_PREFIX, roles)
    if VAE in roles:
        raise CheckpointError(f"{weights.location} has no VAE ({_VAE_PREFIX}*); give one with --vae")
    return unread(VAE, weights.location.stem, check_vae(dict(presets.SD15.vae), weights.location))


def _vae(weights: Weights, prefix: str, roles: frozenset[str]) -> Component:
    shapes = {name.removeprefix(prefix): shape for name, shape in weights.shapes.items() if name.startswith(prefix)}
    config = dict(presets.SD15.vae)
    widths = [shapes.get(f"encoder.down.{level}.block.0.conv1.weight", ())[:1] for level in range(4)]
    if all(widths):
        config["block_out_channels"] = tuple(width[0] for width in widths)
        config["layers_per_block"] = _count(shapes, r"encoder\.down\.0\.block\.(\d+)\..*")
    config = check_vae(config, weights.location)
    to_new = vae_names(expected_shapes(VAE, config, weights.location))
    renamed = _renaming(prefix, to_new)

    def rename(name: str) -> str | None:
        # Files saved in the middle of a VAE's training keep its discriminator and a second copy.
        return None if name.startswith((f"{prefix}loss.", f"{prefix}model_ema.")) else renamed(name)

    return _component(VAE, weights, config, rename, roles)


def _count(names: Mapping[str, Any], pattern: str) -> int:
    return len({match[1] for name in names if (match := re.fullmatch(pattern, name))})


def _renaming(prefix: str, to_new: Mapping[str, str]) -> Rename:
    def rename(name: str) -> str | None:
        if not name.startswith(prefix):
            return None
        rest = name.removeprefix(prefix)
        return to_new.get(rest, rest)

    return rename


def _component(role: str, weights: Weights, config: dict[str, Any], rename: Rename, roles: frozenset[str]) -> Component:
    """Return one role of the file, hashed by its own tensors: merges often share a VAE or a text encoder."""
    name = weights.location.stem
    if role not in roles:
        return unread(role, name, config)
    expected: Shapes = expected_shapes(role, config, weights.location)
    component = fit(role, Origin(name, config, ""), weights, expected, rename)
    prefix = class_prefix(expected)
    stored = {tensor.removeprefix(prefix): value for tensor, value in component.load().items()}
    identity = json.dumps([role, config, tensors_hash(stored)], sort_keys=True)
    return dataclasses.replace(component, sha256=hashlib.sha256(identity.encode()).hexdigest())
