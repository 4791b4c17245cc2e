"""A base model as a diffusers folder: model_index.json, unet/, vae/, text_encoder/, tokenizer/, scheduler/."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from export.checkpoints import presets
from export.checkpoints.architectures import check_text_encoder, check_unet, check_vae, expected_shapes
from export.checkpoints.matching import Origin, fit, unread
from export.checkpoints.model import TEXT_ENCODER, UNET, VAE, BaseParts, Component
from export.checkpoints.single_file import read_vae_file
from export.checkpoints.weights import content_hash, open_weights, read_json
from export.tokenizers import has_text_tokenizer
from moma_rt.errors import CheckpointError

_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")
_OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def read_base(folder: Path, vae: Path | None, roles: frozenset[str]) -> BaseParts:
    """Read a diffusers folder, with the VAE from `vae` if one is given.

    Weights are opened and hashed for `roles` only; other components have only their configs.

    Raises:
        CheckpointError: not a diffusers folder, another architecture than SD1.5's, or files that are missing, damaged
            or do not fit their configs.
    """
    unet_config = _unet_config(folder)
    unet = _component(UNET, folder, folder / "unet", unet_config, roles)
    vae_component = read_vae(vae, roles) if vae is not None else _vae_of_base(folder, roles)
    text_config = _config_or_preset(
        folder / "text_encoder",
        TEXT_ENCODER in roles,
        lambda config, where: check_text_encoder(config, where, unet_config["cross_attention_dim"]),
        presets.SD15.text_encoder,
    )
    text_encoder = _component(TEXT_ENCODER, folder, folder / "text_encoder", text_config, roles)
    tokenizer = _tokenizer(folder / "tokenizer") if TEXT_ENCODER in roles else None
    return BaseParts(unet, vae_component, text_encoder, tokenizer)


def _unet_config(folder: Path) -> dict[str, Any]:
    """Return the UNet's config, after checking everything in the folder that describes the architecture."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder")
    index, unet = folder / "model_index.json", folder / "unet" / "config.json"
    if not index.is_file() and not unet.is_file():
        raise CheckpointError(f"{folder} is not a diffusers folder: it has no model_index.json and no unet/config.json")
    pipeline = str(read_json(index).get("_class_name", _PIPELINES[0])) if index.is_file() else _PIPELINES[0]
    if pipeline.startswith("StableDiffusionXL"):
        raise CheckpointError(f"{folder} is an SDXL checkpoint ({pipeline}); MoMA's adapters need Stable Diffusion 1.5")
    # The UNet's own file names the architecture (inpainting, SD2) better than the pipeline's class, so check it first.
    config = check_unet(read_json(unet), folder) if unet.is_file() or pipeline in _PIPELINES else {}
    if pipeline not in _PIPELINES:
        raise CheckpointError(f"{folder} is a {pipeline}; MoMA's adapters need a {_PIPELINES[0]}")
    scheduler = folder / "scheduler" / "scheduler_config.json"
    prediction = read_json(scheduler).get("prediction_type", "epsilon") if scheduler.is_file() else "epsilon"
    if prediction != "epsilon":
        raise CheckpointError(f"{folder} predicts {prediction} (as Stable Diffusion 2 does); 1.5 predicts epsilon")
    return config


def read_vae(folder: Path, roles: frozenset[str]) -> Component:
    """Read a VAE from a folder (config.json and weights), or from a file in the CompVis layout.

    Raises:
        CheckpointError: the path does not exist, has another kind of VAE, or its weights are damaged or do not fit.
    """
    if folder.is_file():
        return read_vae_file(folder, roles)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} does not exist; --vae takes a folder with config.json and weights, or a file")
    return _component(VAE, folder, folder, check_vae(read_json(folder / "config.json"), folder), roles)


def _vae_of_base(folder: Path, roles: frozenset[str]) -> Component:
    if VAE in roles and not (folder / "vae" / "config.json").is_file():
        raise CheckpointError(f"{folder} has no vae/config.json; give a VAE with --vae")
    config = _config_or_preset(folder / "vae", VAE in roles, check_vae, presets.SD15.vae)
    return _component(VAE, folder, folder / "vae", config, roles)


def _config_or_preset(folder: Path, needed: bool, check: Callable[..., Any], preset: dict[str, Any]) -> dict[str, Any]:
    """Return the folder's config, or SD1.5's own if the folder is absent and its weights are not needed."""
    path = folder / "config.json"
    if not needed and not path.is_file():
        return dict(preset)
    return dict(check(read_json(path), folder))


def _component(role: str, source: Path, folder: Path, config: dict[str, Any], roles: frozenset[str]) -> Component:
    name = source.resolve().name
    if role not in roles:
        return unread(role, name, config)
    weights = open_weights(folder)
    origin = Origin(name, config, content_hash((folder / "config.json", *weights.files)))
    rename = {UNET: str, VAE: _vae_name, TEXT_ENCODER: _text_encoder_name}[role]
    return fit(role, origin, weights, expected_shapes(role, config, folder / "config.json"), rename)


def _vae_name(name: str) -> str:
    match = re.fullmatch(r"(.*\.attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)", name)
    return f"{match[1]}.{_OLD_VAE_ATTENTION[match[2]]}.{match[3]}" if match else name


def _text_encoder_name(name: str) -> str | None:
    """Return a CLIP text tensor's name without its prefix, None for the other tensors of a full CLIP model."""
    if name.endswith(".position_ids") or name.startswith(("vision_model.", "visual_projection.")):
        return None
    if name in ("logit_scale", "text_projection.weight"):
        return None
    return name.removeprefix("text_model.")


def _tokenizer(folder: Path) -> Path:
    if not has_text_tokenizer(folder):
        raise CheckpointError(f"{folder} has no tokenizer: looked for vocab.json with merges.txt, and tokenizer.json")
    return folder
