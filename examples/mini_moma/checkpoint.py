"""Write a trained model as the original's checkpoints: a diffusers folder, LLaVA's, CLIP's and the adapter file."""

import json
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from engines.store import partial_folder
from export.checkpoints import CheckpointRequest, load_checkpoint
from export.checkpoints.load import MINI
from export.checkpoints.model import ADAPTERS, LANGUAGE, TEXT_ENCODER, UNET, VAE, VISION, StateDict
from export.checkpoints.presets import MINI as PRESET
from export.checkpoints.values import check_finite, is_finite
from export.tokenizers import language_tokenizer, text_tokenizer
from moma_rt.errors import CheckpointError
from moma_rt.files import PARTIAL_PREFIX, entries, remove_tree

Config = dict[str, Any]

_INDEX: Mapping[str, Any] = MappingProxyType(
    {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
)
_SCHEDULER: Mapping[str, Any] = MappingProxyType(
    {
        "_class_name": "DDIMScheduler",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "timestep_spacing": "leading",
    }
)
# Where each role's weights lie, but the adapters, which are a pickle.
_FILES: Mapping[str, str] = MappingProxyType(
    {
        UNET: "base/unet/diffusion_pytorch_model.safetensors",
        VAE: "base/vae/diffusion_pytorch_model.safetensors",
        TEXT_ENCODER: "base/text_encoder/model.safetensors",
        LANGUAGE: "mllm/model.safetensors",
        VISION: "vision/model.safetensors",
    }
)
_ADAPTERS_FILE = "attn_adapters_projectors.th"
_ROLES = (*_FILES, ADAPTERS)


def write_checkpoint(folder: Path, weights: Mapping[str, Any], text_tokens: Path, language_tokens: Path) -> None:
    """Write `folder` in fp16, laid out as `--base mini` reads it, and read it back.

    A folder that exists is replaced as a whole once the new one is complete; its other files, such as licences, stay.

    Args:
        weights: floating-point tensors of each role by their names in the original files. `unet`, `vae`: diffusers'
            names; `text_encoder`, `vision`: those of transformers' CLIPTextModel and CLIPVisionModel; `language`:
            LLaVA's, as model.layers.0…, model.mm_projector.0.weight; `adapters`: the three dictionaries `projectors`,
            `self_cross_attentions` and `llm_mapping` of MoMA's file.
        text_tokens: a folder of CLIP's vocab.json and merges.txt.
        language_tokens: a folder of Llama's tokenizer.model and tokenizer_config.json.

    Raises:
        CheckpointError: a role is missing, a weight is NaN, infinite or beyond half precision's range, or the parts do
            not fit each other. Nothing is written then.
    """
    if missing := [role for role in _ROLES if role not in weights]:
        raise CheckpointError(f"the trained model lacks {', '.join(missing)}; it has {', '.join(weights) or 'nothing'}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with partial_folder(folder.parent) as staged:
        _write(staged, weights, text_tokens, language_tokens)
        # Opening compares all names and shapes with those of the networks, and looks for NaN.
        load_checkpoint(CheckpointRequest(MINI, weights=str(staged)))
        _put_in_place(staged, folder)


def _write(folder: Path, weights: Mapping[str, Any], text_tokens: Path, language_tokens: Path) -> None:
    shutil.copytree(text_tokens, folder / "base" / "tokenizer")
    shutil.copytree(language_tokens, folder / "mllm")
    for role, file in _FILES.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        save_file(_half(weights[role], role), folder / file, {"format": "pt"})
    parts = {part: _half(tensors, f"{ADAPTERS}: {part}") for part, tensors in weights[ADAPTERS].items()}
    torch.save(parts, folder / _ADAPTERS_FILE)
    for path, content in {
        "base/model_index.json": _INDEX,
        "base/scheduler/scheduler_config.json": _SCHEDULER,
        "base/unet/config.json": PRESET.unet,
        "base/vae/config.json": PRESET.vae,
        "base/text_encoder/config.json": _text_config(text_tokenizer(text_tokens)),
        "mllm/config.json": _language_config(language_tokenizer(language_tokens)),
        "vision/config.json": PRESET.vision,
    }.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(json.dumps(dict(content), indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _text_config(tokenizer: Tokenizer) -> Config:
    begin, end = tokenizer.encode("").ids
    return {
        **PRESET.text_encoder,
        "architectures": ["CLIPTextModel"],
        "vocab_size": tokenizer.get_vocab_size(),
        "bos_token_id": begin,
        "eos_token_id": end,
        "pad_token_id": tokenizer.padding["pad_id"],
    }


def _language_config(tokenizer: Tokenizer) -> Config:
    return {**PRESET.language, "torch_dtype": "float16", "vocab_size": tokenizer.get_vocab_size()}


def _half(tensors: StateDict, where: str) -> StateDict:
    """Convert to half precision, which must hold every value."""
    check_finite(tensors, where)
    halves = {name: tensor.detach().to("cpu", torch.float16).contiguous() for name, tensor in tensors.items()}
    for name, half in halves.items():
        if not is_finite(half):
            largest = float(tensors[name].abs().max())
            raise CheckpointError(f"{where} has {name} of up to {largest:.3g}, beyond half precision's 65,504")
    return halves


def _put_in_place(staged: Path, folder: Path) -> None:
    if not folder.exists():
        staged.rename(folder)
        return
    for path in entries(folder):
        if not (staged / path.name).exists():
            (shutil.copytree if path.is_dir() else shutil.copy2)(path, staged / path.name)
    old = folder.with_name(f"{PARTIAL_PREFIX}{secrets.token_hex(8)}")
    folder.rename(old)
    staged.rename(folder)
    remove_tree(old)
