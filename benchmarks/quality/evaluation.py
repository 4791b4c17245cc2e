"""Evaluates one way of making pictures: makes them, subject by subject, and scores them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from benchmarks.quality.cases import CONTEXT, KEYS, TEXTURE, Ablation, Case, Setup, cases
from benchmarks.quality.generation import Made
from benchmarks.quality.judge import Judge
from benchmarks.quality.scorers.scorer import at_side
from benchmarks.quality.scores import SCORES, Scores
from examples.mini_moma.icons import Icon
from moma_rt.errors import InputError

Make = Callable[[Sequence[Case], Setup, Ablation], list[Made]]


@dataclass(frozen=True)
class Selection:
    """The part of the evaluation to run: the first `count` subjects, and some contexts and textures."""

    count: int
    contexts: tuple[str, ...] = KEYS[CONTEXT]
    textures: tuple[str, ...] = KEYS[TEXTURE]

    def __post_init__(self) -> None:
        if not self.contexts and not self.textures:
            raise InputError("neither a context nor a texture is left to evaluate")

    @property
    def keys(self) -> tuple[str, ...]:
        return (*self.contexts, *self.textures)


@dataclass(frozen=True, eq=False)
class Evaluated:
    """Scores, and each picture [S][K] as uint8 [128, 128, RGB]."""

    scores: Scores
    pictures: Sequence[Sequence[npt.NDArray[np.uint8]]]


def evaluate(
    make: Make,
    judge: Judge,
    subjects: Sequence[Icon],
    selection: Selection,
    setup: Setup,
    variant: tuple[str, Ablation],
) -> Evaluated:
    """Make and score all pictures of a selection.

    Args:
        make: `Maker.make`.
        variant: a name for the progress bar, and what differs from the full model.
    """
    title, ablation = variant
    found: dict[str, list[str]] = {key: [] for key in selection.keys}
    values = {name: np.full((selection.count, len(selection.keys)), np.nan) for name in SCORES}
    pictures = []
    for row in tqdm(range(selection.count), title, disable=None):
        asked = cases(row, subjects[row].name, selection.contexts, selection.textures)
        made = make(asked, setup, ablation)
        for column, (shown, scores) in enumerate(judge.verdicts(asked, made)):
            found[selection.keys[column]].append(shown)
            _fill(values, (row, column), scores)
        pictures.append(list(at_side(np.stack([one.picture_hwc for one in made]))))
    names = tuple(f"{icon.name} ({icon.style})" for icon in subjects[: selection.count])
    return Evaluated(Scores(names, selection.keys, found, values), pictures)


def _fill(values: Mapping[str, npt.NDArray[np.float64]], place: tuple[int, int], scores: Mapping[str, float]) -> None:
    for name, value in scores.items():
        values[name][place] = value
