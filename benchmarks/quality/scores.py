"""Scores of many pictures, and how sure they are: intervals from resampled subjects, differences of paired ones."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.quality.cases import CONTEXT, TEXTURE

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Score:
    """A score: for which kind of prompts it is taken, a line about it, and whether less is better."""

    kind: str
    about: str
    is_less_better: bool = False


SCORES: Mapping[str, Score] = MappingProxyType(
    {
        "prompt": Score(CONTEXT, "share of pictures in the context that was asked for"),
        "texture": Score(TEXTURE, "share of subjects of the material that was asked for"),
        "subject": Score(CONTEXT, "share of pictures whose nearest photo of 50 is that of their own subject"),
        "rank": Score(CONTEXT, "mean rank of the own photo among the 50", is_less_better=True),
        "similarity": Score(CONTEXT, "cosine of the embeddings of picture and photo"),
        "foreground": Score(CONTEXT, "IoU of the foreground mask and the picture's own subject, both at 0.5"),
        "foreground_at_0.2": Score(CONTEXT, "the same at 0.2, the original's threshold"),
    }
)
_DRAWS = 4000


@dataclass(frozen=True, eq=False)
class Scores:
    """The scores of S subjects' pictures of K keys.

    Attributes:
        subjects: their names with their styles.
        keys: contexts and materials.
        found: what was recognized in each picture, [K][S].
        values: for each of `SCORES`, [S, K]; NaN where it is not taken.
    """

    subjects: tuple[str, ...]
    keys: tuple[str, ...]
    found: Mapping[str, Sequence[str]]
    values: Mapping[str, Numbers]

    def of_subjects(self, score: str, keys: Sequence[str] | None = None) -> Numbers:
        """Return a score's mean for each subject, [S]; empty if it was taken of no picture."""
        columns = [index for index, key in enumerate(self.keys) if keys is None or key in keys]
        taken = self.values[score][:, columns]
        taken = taken[:, ~np.isnan(taken).all(0)]
        return taken.mean(1) if taken.shape[1] else np.empty(0)

    def summary(self) -> dict[str, Any]:
        """Return mean and 95 % interval of each score that was taken."""
        return {name: mean_with_interval(of) for name in SCORES if len(of := self.of_subjects(name))}

    def by_key(self) -> dict[str, dict[str, float]]:
        """Return the means of each context and material."""
        return {
            key: {name: round(float(of.mean()), 4) for name in SCORES if len(of := self.of_subjects(name, [key]))}
            for key in self.keys
        }

    def as_json(self) -> dict[str, Any]:
        """Return everything, to be written to a file: a line of numbers for each subject, "-" for a missing one."""
        values = {
            name: [" ".join("-" if np.isnan(v) else f"{v:.4g}" for v in row) for row in table]
            for name, table in self.values.items()
        }
        found = {key: " ".join(shown) for key, shown in self.found.items()}
        return {"subjects": list(self.subjects), "keys": list(self.keys), "found": found, "values": values}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Scores":
        """Read what `as_json` returned."""
        values = {
            name: np.array([[float("nan" if v == "-" else v) for v in row.split()] for row in table])
            for name, table in content["values"].items()
        }
        found = {key: tuple(shown.split()) for key, shown in content["found"].items()}
        return cls(tuple(content["subjects"]), tuple(content["keys"]), found, values)


def mean_with_interval(of_subjects: Numbers) -> dict[str, Any]:
    """Return {"mean", "interval"}: the 95 % bootstrap interval of the mean, from resampled subjects.

    Subjects are resampled, not pictures: those of one subject succeed or fail together.
    """
    draws = np.random.default_rng(0).integers(0, len(of_subjects), (_DRAWS, len(of_subjects)))
    low, high = np.percentile(of_subjects[draws].mean(1), (2.5, 97.5))
    return {"mean": round(float(of_subjects.mean()), 4), "interval": [round(float(low), 4), round(float(high), 4)]}


def paired_difference(one: Scores, other: Scores, score: str) -> dict[str, Any] | None:
    """Return mean and interval of `other` minus `one`, paired by subject, over the pictures that both have.

    None if they share none of that score.
    """
    subjects = [name for name in one.subjects if name in other.subjects]
    keys = [key for key in one.keys if key in other.keys]
    before, after = (_restricted(scores, subjects, keys, score) for scores in (one, other))
    return mean_with_interval(after - before) if len(before) and len(after) else None


def _restricted(scores: Scores, subjects: Sequence[str], keys: Sequence[str], score: str) -> Numbers:
    if score not in scores.values or not subjects or not keys:
        return np.empty(0)
    of_subjects = scores.of_subjects(score, keys)
    return of_subjects[[scores.subjects.index(name) for name in subjects]] if len(of_subjects) else of_subjects
