"""The exported networks in fp16 against the original's fp32, from a photo to a picture, on ONNX Runtime."""

import json
from pathlib import Path

import numpy as np
import pytest

from moma_rt.bundle.specs import Precision
from moma_rt.runtime import Runtime

SETS = ["small", pytest.param("large", marks=pytest.mark.slow)]
CASES = ["context", "texture"]


@pytest.fixture(scope="module", params=SETS)
def runtime_and_folder(request) -> tuple[Runtime, Path]:
    prefix = "" if request.param == "small" else "large_"
    bundle = request.getfixturevalue(f"{prefix}golden_bundle_fp16")
    return Runtime.load(bundle, "onnxruntime"), request.getfixturevalue(f"{prefix}goldens")


@pytest.mark.parametrize("name", CASES)
def test_the_picture_and_its_mask_are_those_of_fp32(runtime_and_folder, name):
    runtime, root = runtime_and_folder
    folder = root / name
    meta, trace = json.loads((folder / "meta.json").read_text()), np.load(folder / "trace.npz")
    noises = {"vae_noise": trace["vae_noise"], "reference_noise": trace["ref_noise"]}
    subject = runtime.enroll(folder / "image.png", folder / "mask.png", meta["subject"], **noises)
    assert all(k.dtype == np.float16 for k in subject.reference_k.values())
    result = runtime.generate(
        subject, meta["prompt"], strength=meta["strength"], steps=meta["steps"], latents=trace["init_latents"]
    )
    final = np.load(folder / "final_image.npz")["final_image_f16"][0].transpose(1, 2, 0).astype(np.float64)
    found = np.asarray(result.images[0], np.float64) / 255
    decibels = -10 * np.log10(np.mean((found - final) ** 2))
    assert decibels >= 30
    expected = trace["final_mask_64"][0, 0].repeat(8, 0).repeat(8, 1) > 0
    mask = result.foreground_masks[0] > 0
    overlap = (mask & expected).sum() / (mask | expected).sum()
    print(f"{name}: {decibels:.1f} dB, masks' IoU {overlap:.4f}")
    assert overlap >= 0.98


def test_what_is_kept_in_fp32(runtime_and_folder):
    runtime, _ = runtime_and_folder
    precisions = {name: entry.precision for name, entry in runtime.bundle.manifest.networks.items()}
    assert {name for name, precision in precisions.items() if precision is not Precision.FP16} == {"context_projector"}
    denoiser = runtime.bundle.network("denoiser").spec
    small = {t.name for t in (*denoiser.inputs, *denoiser.outputs) if t.dtype == "float32"}
    assert small >= {"latents", "history", "schedule_row", "foreground_mask", "next_latents", "next_foreground_mask"}
    assert denoiser.tensor("text_tokens").dtype == "float16"
