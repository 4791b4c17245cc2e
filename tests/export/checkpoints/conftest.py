"""Editable copies of the golden checkpoints and ways to damage them; the synthetic base that LoRAs are fused into."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from export.checkpoints.model import TEXT_ENCODER, UNET, Component, StateDict
from export.checkpoints.presets import TINY
from export.checkpoints.synthetic import random_component

BASE = "SG161222/Realistic_Vision_V4.0_noVAE"
VAE = "stabilityai/sd-vae-ft-mse"
CLIP = "openai/clip-vit-large-patch14-336"
LLAVA = "KunpengSong/MoMA_llava_7b"
ADAPTERS = "checkpoints/attn_adapters_projectors.th"


@dataclass(frozen=True)
class Hub:
    """A copy of the checkpoints whose files may be replaced (never written in place: they are hard links)."""

    root: Path

    @property
    def base(self) -> Path:
        return self.root / BASE

    @property
    def vae(self) -> Path:
        return self.root / VAE

    @property
    def clip(self) -> Path:
        return self.root / CLIP

    @property
    def llava(self) -> Path:
        return self.root / LLAVA

    @property
    def adapters(self) -> Path:
        return self.root / ADAPTERS

    def replace(self, path: Path, content: bytes) -> None:
        path.unlink(missing_ok=True)
        path.write_bytes(content)

    def edit_json(self, path: Path, **changes: Any) -> None:
        self.replace(path, json.dumps({**json.loads(path.read_text()), **changes}).encode())

    def truncate(self, path: Path) -> None:
        self.replace(path, path.read_bytes()[: path.stat().st_size // 2])

    def save(self, path: Path, save: Callable[[Path], object]) -> None:
        path.unlink(missing_ok=True)
        save(path)


@pytest.fixture
def copy(hub: Path, tmp_path: Path) -> Hub:
    shutil.copytree(hub, tmp_path / "hub", copy_function=os.link)
    return Hub(tmp_path / "hub")


@pytest.fixture(scope="session")
def original(hub: Path) -> Hub:
    return Hub(hub)


@pytest.fixture(scope="session")
def base() -> tuple[Component, Component]:
    """The synthetic checkpoint's UNet and text encoder."""
    return random_component(UNET, TINY.unet, 0), random_component(TEXT_ENCODER, TINY.text_encoder, 0)


@pytest.fixture(scope="session")
def states(base) -> tuple[StateDict, StateDict]:
    """The weights of `base`, which tests must not change."""
    unet, text_encoder = base
    return unet.load(), text_encoder.load()
