"""Training samples: a photo of a subject and pictures of it that prompts ask for, in chunks on disk."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from engines.store import partial_folder
from examples.mini_moma.backgrounds import CONTEXTS, SIDE, STUDIO
from examples.mini_moma.icons import Icon
from examples.mini_moma.scenes import (
    CONTEXT_STRENGTH,
    TEXTURE_STRENGTH,
    Draw,
    Picture,
    Scene,
    context_prompt,
    photo,
    random_context,
    random_texture,
    target,
    texture_prompt,
    textured,
    varied,
)
from moma_rt.files import remove_tree
from moma_rt.outputs import writing

GRID = SIDE // 8
TARGETS = 4
CHUNK = 250
_TEXTURE_SHARE = 0.2
# So many photos show the subject in a place; the others, on a plain ground.
_PLACE_SHARE = 0.4
# So many subjects are called by another one's name, so that what they look like comes from the photo.
_MISNAMED_SHARE = 0.1


@dataclass(frozen=True, eq=False)
class Group:
    """A photo and what prompts make of it.

    Attributes:
        name: what the prompts call the subject.
        photo: the reference.
        targets: pictures of the subject in contexts, or in another material on a plain ground.
        prompts, strengths: one for each target.
    """

    name: str
    photo: Scene
    targets: tuple[Scene, ...]
    prompts: tuple[str, ...]
    strengths: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Chunk:
    """Groups on disk; arrays are memory maps.

    Attributes:
        photos_nhwc: uint8 [N, 128, 128, RGB].
        masks_nhw: bool [N, 128, 128], of the photos.
        targets_nkhwc: uint8 [N, K, 128, 128, RGB].
        coverage_nkhw: uint8 [N, K, 16, 16], the share of each latent's cell that the subject covers, times 255.
        names, prompts, strengths: of the groups, and of their targets.
    """

    photos_nhwc: Picture
    masks_nhw: npt.NDArray[np.bool_]
    targets_nkhwc: Picture
    coverage_nkhw: npt.NDArray[np.uint8]
    names: Sequence[str]
    prompts: Sequence[Sequence[str]]
    strengths: Sequence[Sequence[float]]


class BackgroundPool:
    """Backgrounds drawn beforehand, since drawing one takes longer than composing a picture.

    Args:
        places: uint8 [13, M, 128, 128, RGB], in the order of `CONTEXTS`, then the plain ground.
    """

    def __init__(self, places: Picture) -> None:
        self._places = places

    def __call__(self, context: str, rng: np.random.Generator) -> Picture:
        """Return one of a context's backgrounds, as `examples.mini_moma.backgrounds.background` does."""
        index = (*CONTEXTS, STUDIO).index(context)
        background: Picture = self._places[index, rng.integers(self._places.shape[1])]
        return background


def compose_group(icon: Icon, other_name: str, rng: np.random.Generator, draw: Draw) -> Group:
    """Compose a group of a subject, which is called by `other_name` now and then."""
    rgba = varied(icon.rgba_hwc, rng)
    name = other_name if rng.random() < _MISNAMED_SHARE else icon.name
    place = random_context(rng)[0] if rng.random() < _PLACE_SHARE else None
    targets, prompts, strengths = [], [], []
    for _ in range(TARGETS):
        if rng.random() < _TEXTURE_SHARE:
            texture, phrase = random_texture(rng)
            targets.append(target(textured(rgba, texture, rng), STUDIO, rng, draw))
            prompts.append(texture_prompt(name, phrase))
            strengths.append(TEXTURE_STRENGTH)
        else:
            context, phrase = random_context(rng)
            targets.append(target(rgba, context, rng, draw))
            prompts.append(context_prompt(name, phrase))
            strengths.append(CONTEXT_STRENGTH)
    return Group(name, photo(rgba, rng, place, draw), tuple(targets), tuple(prompts), tuple(strengths))


def write_chunk(folder: Path, groups: Sequence[Group]) -> None:
    """Write groups to a folder, which appears when it is complete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with writing(folder), partial_folder(folder.parent) as partial:
        _write(partial, groups)
        remove_tree(folder)
        partial.rename(folder)


def _write(folder: Path, groups: Sequence[Group]) -> None:
    targets = [[scene.picture_hwc for scene in group.targets] for group in groups]
    coverage = [[_coverage(scene.mask_hw) for scene in group.targets] for group in groups]
    np.save(folder / "photos.npy", np.stack([group.photo.picture_hwc for group in groups]))
    np.save(folder / "masks.npy", np.stack([group.photo.mask_hw for group in groups]))
    np.save(folder / "targets.npy", np.array(targets))
    np.save(folder / "coverage.npy", np.array(coverage))
    texts = {
        "names": [group.name for group in groups],
        "prompts": [group.prompts for group in groups],
        "strengths": [group.strengths for group in groups],
    }
    (folder / "texts.json").write_text(json.dumps(texts), encoding="utf-8")


def read_chunk(folder: Path) -> Chunk:
    """Open what `write_chunk` wrote."""
    photos, masks, targets, coverage = (
        np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("photos", "masks", "targets", "coverage")
    )
    texts = json.loads((folder / "texts.json").read_text(encoding="utf-8"))
    return Chunk(photos, masks, targets, coverage, texts["names"], texts["prompts"], texts["strengths"])


def chunk_folders(data: Path, split: str) -> list[Path]:
    """Return the chunks of a split, "train" or "heldout", in order."""
    return sorted((data / "groups").glob(f"{split}-*"))


def _coverage(mask_hw: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
    cell = SIDE // GRID
    share = mask_hw.reshape(GRID, cell, GRID, cell).mean((1, 3))
    return np.rint(share * 255).astype(np.uint8)
