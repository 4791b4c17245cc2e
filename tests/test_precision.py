"""The exported networks in fp16 against the original's fp32, from a photo to a picture, on ONNX Runtime."""

from pathlib import Path

import numpy as np
import pytest

from moma_rt.bundle.specs import Precision
from moma_rt.runtime import Runtime
from tests.recorded import Case

SETS = ["small", pytest.param("large", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=SETS)
def runtime_and_folder(request) -> tuple[Runtime, Path]:
    prefix = "" if request.param == "small" else "large_"
    bundle = request.getfixturevalue(f"{prefix}golden_bundle_fp16")
    return Runtime.load(bundle, "onnxruntime"), request.getfixturevalue(f"{prefix}goldens")


def overlap(mask: np.ndarray, expected: np.ndarray) -> float:
    """Intersection over union of what is above zero."""
    mask, expected = mask > 0, expected > 0
    return (mask & expected).sum() / (mask | expected).sum()


@pytest.mark.parametrize("name", ["context", "texture"])
def test_the_picture_and_its_mask_are_those_of_fp32(runtime_and_folder, name):
    runtime, folder = runtime_and_folder
    case = Case(folder / name, runtime)
    assert all(k.dtype == np.float16 for k in case.subject.reference_k.values())
    result = case.generate()
    decibels, shared = case.decibels(result.images[0]), overlap(result.foreground_masks[0], case.final_mask())
    print(f"{name}: {decibels:.1f} dB, masks' IoU {shared:.4f}")
    assert decibels >= 30
    assert shared >= 0.98


def test_what_is_kept_in_fp32(runtime_and_folder):
    runtime, _ = runtime_and_folder
    precisions = {name: entry.precision for name, entry in runtime.bundle.manifest.networks.items()}
    assert {name for name, precision in precisions.items() if precision is not Precision.FP16} == {"context_projector"}
    denoiser = runtime.bundle.network("denoiser").spec
    small = {t.name for t in (*denoiser.inputs, *denoiser.outputs) if t.dtype == "float32"}
    assert small >= {"latents", "history", "schedule_row", "foreground_mask", "next_latents", "next_foreground_mask"}
    assert denoiser.tensor("text_tokens").dtype == "float16"
