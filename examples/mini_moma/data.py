"""The first stage: render icons, draw backgrounds, compose training samples, and train both tokenizers."""

import argparse
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from examples.mini_moma.backgrounds import CONTEXTS, SIDE, STUDIO, background
from examples.mini_moma.groups import CHUNK, BackgroundPool, compose_group, write_chunk
from examples.mini_moma.icons import Icon, heldout_names, load_icons
from examples.mini_moma.rendering import render_icons
from examples.mini_moma.scenes import Picture
from examples.mini_moma.vocabularies import train_tokenizers
from moma_rt.errors import InputError
from moma_rt.files import atomic_write
from moma_rt.outputs import writing

_SEED = 20261130
_BACKGROUNDS = 400
_HELDOUT_CHUNKS = 1


def add_options(p: argparse.ArgumentParser) -> None:
    """Add the options of this stage."""
    p.add_argument("--groups", type=int, default=8000, help="training samples, each a photo and four pictures")


def run(options: argparse.Namespace) -> None:
    """Write everything that is still missing to the folder `options.data`.

    Raises:
        InputError: an icon set cannot be fetched, or the number of groups is no multiple of the size of a chunk.
    """
    folder: Path = options.data
    if options.groups < CHUNK or options.groups % CHUNK:
        raise InputError(f"--groups must be a positive multiple of {CHUNK}, not {options.groups}")
    folder.mkdir(parents=True, exist_ok=True)
    icons = load_icons(folder) if (folder / "icons.npz").exists() else render_icons(folder)
    heldout = heldout_names()
    print(f"{len(icons)} icons, {sum(icon.name in heldout for icon in icons)} of them held out")
    if not (folder / "backgrounds.npy").exists():
        _draw_backgrounds(folder, options.processes)
    _compose(folder, options)
    train_tokenizers(folder / "tokenizers", [icon.name for icon in icons if icon.name not in heldout])


def _draw_backgrounds(folder: Path, processes: int) -> None:
    places = np.empty((len(CONTEXTS) + 1, _BACKGROUNDS, SIDE, SIDE, 3), np.uint8)
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        drawn = pool.map(_backgrounds_of, (*CONTEXTS, STUDIO))
        for index, place in enumerate(tqdm(drawn, "draw backgrounds", len(places))):
            places[index] = place
    path = folder / "backgrounds.npy"
    with writing(path), atomic_write(path) as temporary, temporary.open("wb") as file:
        np.save(file, places)


def _backgrounds_of(context: str) -> Picture:
    rng = np.random.default_rng([_SEED, *context.encode()])
    return np.stack([background(context, rng) for _ in range(_BACKGROUNDS)])


def _compose(folder: Path, options: argparse.Namespace) -> None:
    chunks = [("train", number) for number in range(options.groups // CHUNK)]
    chunks += [("heldout", number) for number in range(_HELDOUT_CHUNKS)]
    missing = [chunk for chunk in chunks if not _chunk_folder(folder, *chunk).exists()]
    with ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn")) as pool:
        written = pool.map(partial(_compose_chunk, folder), missing)
        for _ in tqdm(written, "compose pictures", len(missing)):
            pass


def _compose_chunk(folder: Path, chunk: tuple[str, int]) -> None:
    split, number = chunk
    icons = _of_split(load_icons(folder), split)
    draw = BackgroundPool(np.load(folder / "backgrounds.npy", mmap_mode="r"))
    rng = np.random.default_rng([_SEED, number, *split.encode()])
    groups = []
    for _ in range(CHUNK):
        icon, other = (icons[index] for index in rng.integers(len(icons), size=2))
        groups.append(compose_group(icon, other.name, rng, draw))
    write_chunk(_chunk_folder(folder, split, number), groups)


def _chunk_folder(folder: Path, split: str, number: int) -> Path:
    return folder / "groups" / f"{split}-{number:03d}"


def _of_split(icons: Sequence[Icon], split: str) -> list[Icon]:
    heldout = heldout_names()
    return [icon for icon in icons if (icon.name in heldout) == (split == "heldout")]
