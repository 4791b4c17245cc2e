"""Measures the scorers on renders of held-out subjects: how far their verdicts can be trusted."""

import numpy as np
import torch

from benchmarks.quality.scorers.cutouts import Picture, cutout
from benchmarks.quality.scorers.samples import Samples
from benchmarks.quality.scorers.scorer import GROUNDS, MATERIALS, Floats, Scorers
from benchmarks.quality.scorers.softening import Softener, hue_turned

_ANGLES = (2 * np.pi / 3, 4 * np.pi / 3)


def accuracy(scorers: Scorers, samples: Samples, soften: Softener | None = None) -> dict[str, float]:
    """Score renders of `samples.render_all`, as they are or softened.

    Returns:
        context, material: share of right answers. Contexts of plain subjects are one of 13 answers, materials on a
        plain ground one of 5.
        mask_iou: mean intersection over union of the subject's mask, at half.
        retrieval: share of pictures in a context whose nearest photo is that of their own subject.
        retrieval_gray: the same without colours, so that only shape and shading are left.
        retrieval_recoloured: share of pictures that are nearer to their own photo than to the same in two other hues.
    """
    count, kinds = samples.grounds_nk.shape
    pictures = samples.pictures_nkhwc.reshape(count * kinds, *samples.pictures_nkhwc.shape[2:])
    if soften is not None:
        planes, _ = soften(torch.from_numpy(pictures).permute(0, 3, 1, 2).float())
        pictures = planes.permute(0, 2, 3, 1).to(torch.uint8).numpy()
    # Softening may bend a picture, so only masks of unbent ones are compared.
    reading = scorers.read(pictures)
    grounds = np.array([GROUNDS.index(name) for name in reading.grounds]).reshape(count, kinds)
    materials = np.array([MATERIALS.index(name) for name in reading.materials]).reshape(count, kinds)
    plain = samples.materials_nk[0] == MATERIALS.index("none")
    cutouts = [cutout(picture, mask) for picture, mask in zip(pictures, reading.masks_nhw, strict=True)]
    shown = np.stack(cutouts).reshape(count, kinds, *cutouts[0].shape)[:, plain]
    found = {
        "context": (grounds == samples.grounds_nk)[:, plain].mean(),
        "material": (materials == samples.materials_nk)[:, ~plain].mean(),
        "retrieval": _retrieval(scorers, samples.photos_nhwc, shown),
        "retrieval_gray": _retrieval(scorers, _gray(samples.photos_nhwc), _gray(shown)),
        "retrieval_recoloured": _own_hue(scorers, samples.photos_nhwc, shown),
    }
    if soften is None:
        masks = reading.masks_nhw.reshape(samples.masks_nkhw.shape) >= 0.5
        found["mask_iou"] = intersection_over_union(masks, samples.masks_nkhw).mean()
    return {name: round(float(value), 4) for name, value in found.items()}


def intersection_over_union(one: np.ndarray, other: np.ndarray) -> Floats:
    """Compare masks, bool [..., H, W]; returns [...], 0 where both are empty."""
    both, either = (one & other).sum((-2, -1)), (one | other).sum((-2, -1))
    return (both / np.maximum(either, 1)).astype(np.float32)


def _retrieval(scorers: Scorers, photos_nhwc: Picture, shown_nkhwc: Picture) -> float:
    count, kinds = shown_nkhwc.shape[:2]
    pictures = scorers.embed(shown_nkhwc.reshape(count * kinds, *shown_nkhwc.shape[2:]))
    nearest = (pictures @ scorers.embed(photos_nhwc).T).argmax(1).reshape(count, kinds)
    return float((nearest == np.arange(count)[:, None]).mean())


def _own_hue(scorers: Scorers, photos_nhwc: Picture, shown_nkhwc: Picture) -> float:
    count, kinds = shown_nkhwc.shape[:2]
    planes = torch.from_numpy(photos_nhwc).permute(0, 3, 1, 2).float()
    turned = [hue_turned(planes, torch.full((count,), angle)) for angle in _ANGLES]
    photos = [photos_nhwc, *(part.round().to(torch.uint8).permute(0, 2, 3, 1).numpy() for part in turned)]
    of_photos = np.stack([scorers.embed(np.ascontiguousarray(part)) for part in photos], axis=1)
    pictures = scorers.embed(shown_nkhwc.reshape(count * kinds, *shown_nkhwc.shape[2:])).reshape(count, kinds, -1)
    return float((np.einsum("nke,nce->nkc", pictures, of_photos).argmax(2) == 0).mean())


def _gray(pictures: Picture) -> Picture:
    return np.repeat(np.rint(pictures.mean(-1, keepdims=True)), 3, -1).astype(np.uint8)
