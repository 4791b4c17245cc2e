"""A data folder of a few drawn subjects, so that no icon need be fetched."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file

from examples.mini_moma.groups import BackgroundPool, compose_group, write_chunk
from examples.mini_moma.icons import ICON_SIDE, Icon
from examples.mini_moma.vae import latents_file
from examples.mini_moma.vocabularies import train_tokenizers

NAMES = ("red ball", "blue box", "green cone", "teapot")
GROUPS = 3


def drawn_icon(index: int) -> Icon:
    image = Image.new("RGBA", (ICON_SIDE, ICON_SIDE))
    draw = ImageDraw.Draw(image)
    color = ((220, 40, 40, 255), (40, 60, 220, 255), (40, 180, 60, 255), (230, 200, 60, 255))[index]
    draw.ellipse((0, 20 * index, ICON_SIDE - 1, ICON_SIDE - 1), fill=color)
    draw.rectangle((40, 60, 90, 120), fill=(250, 250, 250, 255))
    return Icon(NAMES[index], "drawn", np.asarray(image))


@pytest.fixture(scope="session")
def icons() -> tuple[Icon, ...]:
    return tuple(drawn_icon(index) for index in range(len(NAMES)))


@pytest.fixture
def data(tmp_path: Path, icons: tuple[Icon, ...]) -> Path:
    """What the data stage writes, with random latents as if the VAE were trained."""
    rng = np.random.default_rng(0)
    train_tokenizers(tmp_path / "tokenizers", [*NAMES, "wooden table", "snow man", "car", "guitar", "dragon", "horse"])
    draw = BackgroundPool(rng.integers(0, 256, (13, 2, 128, 128, 3), np.uint8))
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "heldout"):
        groups = [compose_group(icons[i], icons[i + 1].name, rng, draw) for i in range(GROUPS)]
        folder = tmp_path / "groups" / f"{split}-000"
        write_chunk(folder, groups)
        photos = torch.rand(GROUPS, 2, 4, 16, 16, generator=generator).half()
        targets = torch.rand(GROUPS, 4, 2, 4, 16, 16, generator=generator).half()
        save_file({"photos_nschw": photos, "targets_nkschw": targets}, latents_file(folder))
    return tmp_path
