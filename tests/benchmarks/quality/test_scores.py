"""Means, intervals and paired differences."""

import json

import numpy as np
import pytest

from benchmarks.quality.scores import SCORES, Scores, mean_with_interval, paired_difference


def scores(prompt: list[list[float]], subjects: tuple[str, ...], keys: tuple[str, ...] = ("beach", "gold")) -> Scores:
    values = {name: np.full((len(subjects), len(keys)), np.nan) for name in SCORES}
    values["prompt"] = np.array(prompt, dtype=float)
    return Scores(subjects, keys, {key: ("night",) * len(subjects) for key in keys}, values)


def test_an_interval_knows_that_pictures_of_a_subject_go_together():
    sure = mean_with_interval(np.full(50, 0.5))
    assert sure == {"mean": 0.5, "interval": [0.5, 0.5]}
    unsure = mean_with_interval(np.array([0.0, 1.0] * 25))
    assert unsure["mean"] == 0.5
    low, high = unsure["interval"]
    assert 0.3 < low < 0.42
    assert 0.58 < high < 0.7
    assert unsure == mean_with_interval(np.array([0.0, 1.0] * 25)), "the same every time"


def test_scores_that_were_not_taken_are_left_out():
    one = scores([[1.0, np.nan], [0.0, np.nan]], ("a", "b"))
    assert set(one.summary()) == {"prompt"}
    assert one.summary()["prompt"]["mean"] == 0.5
    assert one.by_key() == {"beach": {"prompt": 0.5}, "gold": {}}


def test_differences_are_paired_over_what_both_have():
    one = scores([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]], ("a", "b", "c"))
    other = scores([[0.0, 1.0], [1.0, 0.0]], ("c", "a"), ("beach", "night"))
    found = paired_difference(one, other, "prompt")
    assert found is not None
    assert found["mean"] == -0.5, "a: 1 - 1, c: 0 - 1, at the beach"
    assert paired_difference(one, other, "subject") is None
    assert paired_difference(one, scores([[1.0, 1.0]], ("z",)), "prompt") is None


def test_files_hold_everything():
    one = scores([[1.0, np.nan], [0.0, np.nan]], ("a", "b"))
    again = Scores.from_json(json.loads(json.dumps(one.as_json())))
    assert (again.subjects, again.keys, again.found) == (one.subjects, one.keys, one.found)
    np.testing.assert_array_equal(again.values["prompt"], one.values["prompt"])
    with pytest.raises(KeyError):
        Scores.from_json({})
