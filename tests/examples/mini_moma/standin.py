"""Weights of the small model's shapes, by their names in the original files, as its training hands them over."""

import json
from pathlib import Path
from typing import Any

from export.checkpoints.architectures import attention_layers
from export.checkpoints.matching import class_prefix
from export.checkpoints.model import LANGUAGE, TEXT_ENCODER, UNET, VAE, VISION, StateDict
from export.checkpoints.presets import MINI
from export.checkpoints.synthetic import random_adapters, random_component
from export.tokenizers import language_tokenizer, text_tokenizer

LLAVA = "KunpengSong/MoMA_llava_7b"
CLIP = "SG161222/Realistic_Vision_V4.0_noVAE/tokenizer"


def tokenizer_folders(hub: Path, folder: Path) -> tuple[Path, Path]:
    """Folders of a text and a language tokenizer, as the data stage makes them; each has a few hundred tokens."""
    text, language = folder / "text", folder / "language"
    for place, source, names in (
        (text, hub / CLIP, ("vocab.json", "merges.txt")),
        (language, hub / LLAVA, ("tokenizer.model",)),
    ):
        place.mkdir(parents=True)
        for name in names:
            (place / name).write_bytes((source / name).read_bytes())
    (language / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True, "legacy": False}))
    return text, language


def weights(text: Path, language: Path, seed: int = 0) -> dict[str, Any]:
    """Random weights of every role in float32, for tokenizers in two folders."""
    text_config = {**MINI.text_encoder, "vocab_size": text_tokenizer(text).get_vocab_size()}
    language_config = {**MINI.language, "vocab_size": language_tokenizer(language).get_vocab_size()}

    def random(role: str, config: Any) -> StateDict:
        return random_component(role, config, seed).load()

    model = random(LANGUAGE, language_config)
    return {
        UNET: random(UNET, MINI.unet),
        VAE: random(VAE, MINI.vae),
        TEXT_ENCODER: _prefixed(random(TEXT_ENCODER, text_config), "text_model."),
        VISION: _prefixed(random(VISION, MINI.vision), "vision_model."),
        LANGUAGE: {f"model.{name}": tensor for name, tensor in model.items()},
        "adapters": _adapters(seed),
    }


def _prefixed(tensors: StateDict, prefix: str) -> StateDict:
    own = class_prefix(tensors)
    return {prefix + name.removeprefix(own): tensor for name, tensor in tensors.items()}


def _adapters(seed: int) -> dict[str, StateDict]:
    tensors = random_adapters(dict(MINI.unet), MINI.language["hidden_size"], MINI, seed).load()
    numbers = {layer.path: number for number, layer in enumerate(attention_layers(MINI.unet))}
    attentions = {}
    for name, tensor in tensors.items():
        if name.startswith("attention."):
            path, part = next(
                (path, name.removeprefix(f"attention.{path}."))
                for path in numbers
                if name.startswith(f"attention.{path}.")
            )
            attentions[f"{numbers[path]}.{part}"] = tensor
    return {
        "projectors": {n.removeprefix("projectors."): t for n, t in tensors.items() if n.startswith("projectors.")},
        "self_cross_attentions": attentions,
        "llm_mapping": {name: tensor for name, tensor in tensors.items() if name.startswith("mapping.")},
    }
