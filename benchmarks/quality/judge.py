"""Scores generated pictures with the scorers."""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from benchmarks.quality.cases import CONTEXT, Case
from benchmarks.quality.generation import Made
from benchmarks.quality.scorers.cutouts import cutout
from benchmarks.quality.scorers.scorer import Scorers, at_side
from benchmarks.quality.subjects import photo_of
from examples.mini_moma.icons import Icon

# The mask weights the injection, so a cell is the subject's where it counts at least half. Below the other threshold
# the original ignores it.
_HALF, _ORIGINAL = 0.5, 0.2


class Judge:
    """Knows the photos of all subjects, also of those that are not evaluated: chance is always 1 in 50."""

    def __init__(self, scorers: Scorers, subjects: Sequence[Icon]) -> None:
        self._scorers = scorers
        scenes = [photo_of(subjects, index) for index in range(len(subjects))]
        self._photos = scorers.embed(np.stack([cutout(scene.picture_hwc, scene.mask_hw) for scene in scenes]))

    def verdicts(self, cases: Sequence[Case], made: Sequence[Made]) -> list[tuple[str, Mapping[str, float]]]:
        """Return what each picture shows, and its scores.

        The subject is cut out by the mask that the reader sees in the picture, not by the model's foreground mask:
        where the model believes that it drew the subject is no evidence that it did.
        """
        pictures = at_side(np.stack([one.picture_hwc for one in made]))
        reading = self._scorers.read(pictures)
        side = reading.masks_nhw.shape[1]
        cutouts = [cutout(*pair) for pair in zip(pictures, reading.masks_nhw, strict=True)]
        embedded = self._scorers.embed(np.stack(cutouts))
        similarities = embedded @ self._photos.T
        verdicts = []
        for index, case in enumerate(cases):
            grid = made[index].foreground_gg.shape[0]
            coverage = (reading.masks_nhw[index] >= _HALF).reshape(grid, side // grid, grid, side // grid).mean((1, 3))
            found = (reading.grounds if case.kind == CONTEXT else reading.materials)[index]
            own = similarities[index, case.subject]
            scores = {"prompt" if case.kind == CONTEXT else "texture": float(found == case.key)}
            if case.kind == CONTEXT:
                rank = 1 + int((similarities[index] > own).sum())
                scores |= {"subject": float(rank == 1), "rank": float(rank), "similarity": float(own)}
                scores["foreground"] = _overlap(made[index].foreground_gg, coverage, _HALF)
                scores["foreground_at_0.2"] = _overlap(made[index].foreground_gg, coverage, _ORIGINAL)
            verdicts.append((found, scores))
        return verdicts


def _overlap(one: npt.NDArray[np.floating], other: npt.NDArray[np.floating], threshold: float) -> float:
    """Intersection over union of two masks, 0..1, above a threshold; 0 if both are empty."""
    first, second = one > threshold, other > threshold
    return float((first & second).sum() / max(1, (first | second).sum()))
