"""LoRA files for tests, and what diffusers makes of them."""

import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file

from export.checkpoints.presets import TINY

Tensors = dict[str, torch.Tensor]


def written(folder: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    """Write a safetensors file into the folder."""
    path = folder / "my.safetensors"
    save_file({n: t.contiguous().clone() for n, t in tensors.items()}, path, metadata=metadata)
    return path


def tiny_unet(state: Tensors):
    """diffusers' UNet of the synthetic checkpoint's architecture."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_config(dict(TINY.unet))
    unet.load_state_dict(state)
    return unet


def fused_by_diffusers(states: tuple[Tensors, Tensors], path: Path, scale: float) -> tuple[Tensors, Tensors]:
    """The UNet's and the text encoder's state dicts after diffusers' own loading and fusing, under their own names."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    unet, text = tiny_unet(states[0]), CLIPTextModel(CLIPTextConfig(**TINY.text_encoder))
    text.load_state_dict(states[1])
    parts = {"vae": None, "tokenizer": None, "safety_checker": None, "feature_extractor": None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = StableDiffusionPipeline(
            unet=unet, text_encoder=text, scheduler=DDIMScheduler(), requires_safety_checker=False, **parts
        )
        pipeline.load_lora_weights(str(path.parent), weight_name=path.name, local_files_only=True)
        pipeline.fuse_lora(lora_scale=scale)
        pipeline.unload_lora_weights()
    return pipeline.unet.state_dict(), pipeline.text_encoder.state_dict()
