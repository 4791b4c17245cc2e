"""How a package's step is judged against eager PyTorch, and how uncaptured graphs are reported."""

import numpy as np
import pytest

from benchmarks.gpu.denoiser import errors, not_captured, relative_errors
from moma_rt.bundle.specs import Precision


def outputs(latents, mask=1.0):
    return {
        "next_latents": np.full((1, 4, 2, 2), latents, np.float32),
        "next_foreground_mask": np.full((1, 1, 2, 2), mask, np.float32),
    }


def test_an_error_is_relative():
    found = relative_errors(outputs(1.01, 0.0), outputs(1.0))
    assert found["next_latents"] == pytest.approx(0.01, rel=1e-4)
    assert found["next_foreground_mask"] == 1.0
    assert relative_errors(outputs(0.0), outputs(0.0))["next_latents"] == 0.0


@pytest.mark.parametrize(
    ("package", "eager", "precision", "is_right"),
    [
        (1.019, 1.01, Precision.FP16, True),
        (1.021, 1.01, Precision.FP16, False),
        # Rounding alone, where eager PyTorch happens to be exact.
        (1.0019, 1.0, Precision.FP16, True),
        (1.0019, 1.0, Precision.FP32, False),
        (float("nan"), 1.01, Precision.FP16, False),
    ],
)
def test_a_package_may_be_twice_as_far_off_as_eager(package, eager, precision, is_right):
    found = errors(outputs(package), outputs(eager), outputs(1.0), precision)
    assert found["is_right"] == is_right


def test_errors_of_the_thresholded_mask_are_ignored():
    """The smallest rounding error can move a pixel across the threshold."""
    assert errors(outputs(1.0, 0.0), outputs(1.0), outputs(1.0), Precision.FP16)["is_right"]


def test_every_graph_that_was_not_captured_is_named():
    cases = [{"halves": 2, "why_not": {"step": "one"}}, {"halves": 1, "why_not": {"generation": "two", "step": ""}}]
    assert not_captured(cases) == "guided step: one; unguided generation: two; unguided step: "
    assert not_captured([{"halves": 2, "why_not": {}}, {"halves": 1, "why_not": {}}]) == ""
