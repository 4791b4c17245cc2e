"""A data folder of a few drawn subjects, so that no icon need be fetched; processes' work done in the test's own."""

import shutil
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file

from examples.mini_moma import loop
from examples.mini_moma.groups import BackgroundPool, compose_group, write_chunk
from examples.mini_moma.icons import ICON_SIDE, Icon
from examples.mini_moma.model import MiniMoma, Tokens
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


@pytest.fixture(scope="session")
def drawn_data(tmp_path_factory: pytest.TempPathFactory, icons: tuple[Icon, ...]) -> Path:
    """What the data stage writes, with random latents as if the VAE were trained; not to be changed."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    train_tokenizers(folder / "tokenizers", [*NAMES, "wooden table", "snow man", "car", "guitar", "dragon", "horse"])
    draw = BackgroundPool(rng.integers(0, 256, (13, 2, 128, 128, 3), np.uint8))
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "heldout"):
        groups = [compose_group(icons[i], icons[i + 1].name, rng, draw) for i in range(GROUPS)]
        chunk = folder / "groups" / f"{split}-000"
        write_chunk(chunk, groups)
        photos = torch.rand(GROUPS, 2, 4, 16, 16, generator=generator).half()
        targets = torch.rand(GROUPS, 4, 2, 4, 16, 16, generator=generator).half()
        save_file({"photos_nschw": photos, "targets_nkschw": targets}, latents_file(chunk))
    return folder


@pytest.fixture
def data(tmp_path: Path, drawn_data: Path) -> Path:
    """A copy of the data folder that may be changed."""
    return Path(shutil.copytree(drawn_data, tmp_path / "data"))


@pytest.fixture(scope="session")
def tokens(drawn_data: Path) -> Tokens:
    return Tokens(drawn_data)


@pytest.fixture(scope="session")
def model(tokens: Tokens) -> MiniMoma:
    """With random weights in the place of zeros, so that every layer matters; not to be changed."""
    torch.manual_seed(0)
    model = MiniMoma(tokens).requires_grad_(False)
    for name, parameter in model.unet.named_parameters():
        if ".processor." in name or not parameter.any():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Train in this process; plans must be of one."""

    def call(work: Callable[..., None], arguments: tuple[Any, ...], processes: int) -> None:
        assert processes == 1
        work(0, *arguments)

    monkeypatch.setattr(loop.mp, "spawn", call)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGINT)
    yield
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, handler)


class NoPool:
    """In the place of a ProcessPoolExecutor."""

    def __init__(self, processes: int, context: object) -> None:
        assert processes >= 1

    def __enter__(self) -> "NoPool":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        return map(function, items)
