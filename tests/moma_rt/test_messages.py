"""Values and warnings as people read them."""

import warnings

import numpy as np
import pytest

from moma_rt.errors import MomaWarning
from moma_rt.messages import first_line, short_repr, warn


class Unshowable:
    def __repr__(self):
        raise RuntimeError("mine")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "None"),
        ("a\nb", r"'a\nb'"),
        (np.zeros((2, 1)), "array([[0.], [0.]])"),
        ("x" * 200, "'" + "x" * 79 + "..."),
        (Unshowable(), "<Unshowable>"),
    ],
)
def test_a_value_is_one_short_line(value, text):
    assert short_repr(value) == text


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one\ntwo"), "one"),
        (ValueError("\n  one \n"), "one"),
        (ValueError(), "ValueError"),
        (ValueError("\n"), "ValueError"),
    ],
)
def test_an_error_is_its_first_line(error, line):
    assert first_line(error) == line


def test_a_warning_is_placed_at_its_caller():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        warn("cut")
        warn("cut")
    assert [(str(w.message), w.category, w.filename) for w in caught] == [("cut", MomaWarning, __file__)] * 2
