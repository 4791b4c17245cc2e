"""A base model as a diffusers folder: model_index.json, unet/, vae/, text_encoder/, tokenizer/, scheduler/."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from export.checkpoints import presets
from export.checkpoints.architectures import check_text_encoder, check_unet, check_vae, expected_shapes
from export.checkpoints.compvis_names import unet_names, vae_names
from export.checkpoints.matching import Origin, fit, unread
from export.checkpoints.model import TEXT_ENCODER, UNET, VAE, BaseParts, Component
from export.checkpoints.names import Rename, first_layers, layer_of, renaming
from export.checkpoints.single_file import read_vae_file
from export.checkpoints.weights import Weights, content_hash, open_weights, read_json
from export.tokenizers import has_text_tokenizer
from moma_rt.errors import CheckpointError
from moma_rt.messages import warn

_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")
_NEEDED = "MoMA's adapters need Stable Diffusion 1.5"


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
        raise CheckpointError(f"{index} names the pipeline {pipeline}, SDXL's; {_NEEDED}")
    # A pipeline's class says little: many, such as ControlNet's, are saved with Stable Diffusion 1.5's own networks.
    if not unet.is_file() and pipeline not in _PIPELINES:
        raise CheckpointError(f"{index} names the pipeline {pipeline}, and there is no unet/config.json; {_NEEDED}")
    config = check_unet(read_json(unet), unet)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    prediction = read_json(scheduler).get("prediction_type", "epsilon") if scheduler.is_file() else "epsilon"
    if prediction != "epsilon":
        raise CheckpointError(
            f"{scheduler} has prediction_type {prediction!r}; only models that predict epsilon are supported"
        )
    return config


def read_vae(folder: Path, roles: frozenset[str]) -> Component:
    """Read a VAE from a folder (config.json and weights), or from a file in the CompVis layout.

    Raises:
        CheckpointError: the path does not exist, has another kind of VAE, or its weights are damaged or do not fit.
    """
    if folder.is_file():
        return read_vae_file(folder, roles)
    if not folder.is_dir():
        found = "is neither a file nor a folder" if folder.exists() else "does not exist"
        raise CheckpointError(f"{folder} {found}; --vae takes a folder with config.json and weights, or a file")
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
    expected = expected_shapes(role, config, folder / "config.json")
    if role == TEXT_ENCODER:
        return fit(role, origin, weights, expected, _clip_naming(folder, weights, config))
    return fit(role, origin, weights, expected, renaming(role, {UNET: unet_names, VAE: vae_names}[role](expected)))


def _clip_naming(folder: Path, weights: Weights, config: dict[str, Any]) -> Rename:
    """As transformers does, read only as many layers as the config names: so people bake clip skip into a folder."""
    rename, count = renaming(TEXT_ENCODER), config["num_hidden_layers"]
    stored = 1 + max((layer_of(rename(name) or "") for name in weights.shapes), default=-1)
    if stored > count:
        warn(f"{folder} has {stored} layers; only the first {count} are used, as its config.json says (clip skip)")
    return first_layers(rename, count)


def _tokenizer(folder: Path) -> Path:
    if not has_text_tokenizer(folder):
        raise CheckpointError(f"{folder} has no tokenizer: looked for vocab.json with merges.txt, and tokenizer.json")
    return folder
