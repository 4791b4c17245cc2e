"""Renders for training and testing the scorers: photos, and pictures with what they show."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from benchmarks.quality.scorers.cutouts import Picture, cutout
from benchmarks.quality.scorers.scorer import GROUNDS, MATERIALS
from examples.mini_moma.backgrounds import CONTEXTS, STUDIO, background
from examples.mini_moma.groups import BackgroundPool
from examples.mini_moma.icons import Icon
from examples.mini_moma.scenes import TEXTURES, Draw, photo, random_context, random_texture, target, textured, varied

SCENES = 4
# Of the scenes after the first of a subject: in a context, on a plain ground, and of a material on either.
_IN_CONTEXT, _PLAIN, _MATERIAL_PLAIN = 0.6, 0.7, 0.9
_BACKGROUNDS = 40


@dataclass(frozen=True, eq=False)
class Samples:
    """N subjects with a photo and K pictures each; the first of these is in a context and of no material.

    Attributes:
        photos_nhwc: cut-outs of the photos, uint8 [N, 64, 64, RGB].
        pictures_nkhwc: uint8 [N, K, 128, 128, RGB].
        masks_nkhw: bool [N, K, 128, 128].
        grounds_nk, materials_nk: int64 [N, K], indices into `GROUNDS` and `MATERIALS`.
    """

    photos_nhwc: Picture
    pictures_nkhwc: Picture
    masks_nkhw: npt.NDArray[np.bool_]
    grounds_nk: npt.NDArray[np.int64]
    materials_nk: npt.NDArray[np.int64]


def draw_backgrounds(rng: np.random.Generator, count: int = _BACKGROUNDS) -> BackgroundPool:
    """Draw backgrounds of every context beforehand: drawing one takes longer than composing a picture."""
    return BackgroundPool(np.stack([[background(key, rng) for _ in range(count)] for key in (*CONTEXTS, STUDIO)]))


def render(icons: Sequence[Icon], rng: np.random.Generator, draw: Draw = background) -> Samples:
    """Render each icon, recoloured now and then, as a photo and `SCENES` random pictures."""
    made = [_rendered(varied(icon.rgba_hwc, rng), rng, draw) for icon in tqdm(icons, "render", disable=None)]
    photos, pictures, masks, grounds, materials = zip(*made, strict=True)
    return Samples(*(np.stack(part) for part in (photos, pictures, masks)), np.array(grounds), np.array(materials))


def render_all(icons: Sequence[Icon], rng: np.random.Generator, draw: Draw = background) -> Samples:
    """Render each icon in its own colours: a photo, each context and each material; the order of both is fixed."""
    photos, pictures, masks = [], [], []
    for icon in icons:
        shown = photo(icon.rgba_hwc, rng, random_context(rng)[0], draw)
        scenes = [target(icon.rgba_hwc, context, rng, draw) for context in CONTEXTS]
        scenes += [target(textured(icon.rgba_hwc, texture, rng), STUDIO, rng, draw) for texture in TEXTURES]
        photos.append(cutout(shown.picture_hwc, shown.mask_hw))
        pictures.append([scene.picture_hwc for scene in scenes])
        masks.append([scene.mask_hw for scene in scenes])
    grounds = [*range(len(CONTEXTS)), *[GROUNDS.index(STUDIO)] * len(TEXTURES)]
    materials = [*[MATERIALS.index("none")] * len(CONTEXTS), *range(len(TEXTURES))]
    count = len(icons)
    return Samples(
        np.stack(photos),
        np.array(pictures),
        np.array(masks),
        np.array([grounds] * count),
        np.array([materials] * count),
    )


def _rendered(
    rgba: Picture, rng: np.random.Generator, draw: Draw
) -> tuple[Picture, Picture, npt.NDArray[np.bool_], list[int], list[int]]:
    shown = photo(rgba, rng, random_context(rng)[0] if rng.random() < 0.5 else None, draw)
    pictures, masks, grounds, materials = [], [], [], []
    for index in range(SCENES):
        kind = 0.0 if index == 0 else rng.random()
        ground = random_context(rng)[0] if kind < _IN_CONTEXT or kind >= _MATERIAL_PLAIN else STUDIO
        material = random_texture(rng)[0] if kind >= _PLAIN else "none"
        scene = target(rgba if material == "none" else textured(rgba, material, rng), ground, rng, draw)
        pictures.append(scene.picture_hwc)
        masks.append(scene.mask_hw)
        grounds.append(GROUNDS.index(ground))
        materials.append(MATERIALS.index(material))
    return cutout(shown.picture_hwc, shown.mask_hw), np.stack(pictures), np.stack(masks), grounds, materials
