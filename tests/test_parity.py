"""The exported networks, on ONNX Runtime in fp32, against what the original MoMA computed from the same weights.

The bounds are the promised ones; the original itself varies by 1e-5 between library versions.
"""

import numpy as np
import pytest

from moma_rt.runtime import Runtime
from moma_rt.schedulers.tables import ROW_LENGTH, Column, schedule
from moma_rt.timing import StageTimer
from tests.recorded import Case

GUIDANCE = 7.5
SETS = ["small", pytest.param("large", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=SETS)
def runtime_and_folder(request, goldens):
    is_large = request.param == "large"
    bundle = request.getfixturevalue("large_golden_bundle" if is_large else "golden_bundle")
    return Runtime.load(bundle, "onnxruntime"), request.getfixturevalue("large_goldens") if is_large else goldens


@pytest.fixture(scope="module", params=["context", "texture"])
def case(request, runtime_and_folder) -> Case:
    runtime, folder = runtime_and_folder
    return Case(folder / request.param, runtime)


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    assert found.shape == expected.shape
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def noise_row(case: Case, number: int, guidance: float) -> np.ndarray:
    """A schedule row whose next latents are the predicted noise: unconditional at guidance 0, conditional at 1."""
    row = np.zeros(ROW_LENGTH, np.float32)
    recorded = schedule("ddim", case.meta["steps"], GUIDANCE)[number]
    row[[Column.TIMESTEP, Column.INJECTION]] = recorded[[Column.TIMESTEP, Column.INJECTION]]
    row[Column.EPS], row[Column.GUIDANCE] = 1.0, guidance
    return row


def test_vision_and_language(case):
    stages = StageTimer()
    pixels = case.language["pixel_values"]
    image_tokens = case.networks.run("vision_encoder", {"pixels": pixels}, stages)["image_tokens"]
    assert relative_error(image_tokens, case.language["projected"]) < 1e-4
    embedding = case.runtime.context_embedding(case.subject, case.meta["prompt"])
    assert relative_error(embedding, case.language["mapped_last_token"].reshape(-1)) < 1e-4


def test_context_tokens(case):
    unconditional, conditional = case.conditions["context_tokens"]
    assert relative_error(conditional[None], case.trace["ip_cond"]) < 1e-4
    assert relative_error(unconditional[None], case.trace["ip_uncond"]) < 1e-4


def test_text_tokens_and_subject_positions(case):
    assert relative_error(case.conditions["text_tokens"], case.trace["text_embeds_uncond_cond"]) < 1e-4
    reference, _ = case.runtime._conditioner.text_tokens(case.meta["subject"], StageTimer())
    assert relative_error(reference[None], case.trace["ref_text_embeds"]) < 1e-4
    assert np.flatnonzero(case.conditions["subject_weights"]).tolist() == case.meta["subject_idxs"][0]


def test_reference_keys_and_values(case):
    photo = {"noise": case.trace["vae_noise"], "image": photo_of(case)}
    latents = case.networks.run("vae_encoder", photo, StageTimer())["latents"]
    assert relative_error(latents, case.trace["vae_sample"] * 0.18215) < 1e-4
    inputs = {"latents": latents, "noise": case.trace["ref_noise"], "text_tokens": case.trace["ref_text_embeds"]}
    outputs = case.networks.run("subject_encoder", inputs, StageTimer())
    compared = 0
    for name, expected in np.load(case.folder / "ref_kv.npz").items():
        path, kind = name.split(".transformer_blocks.")[0], name.rsplit(".", 1)[1][0]
        heads, tokens, width = expected.shape
        found = outputs[f"reference_{kind}.{path}"][0, :tokens].reshape(tokens, heads, width).transpose(1, 0, 2)
        assert relative_error(found, expected) < 1e-4, name
        compared += 1
    assert compared == 2 * len(case.runtime.bundle.manifest.geometry.self_attention)


def photo_of(case: Case) -> np.ndarray:
    from moma_rt.inputs.images import load_mask, load_photo, prepare

    return prepare(load_photo(case.folder / "image.png"), load_mask(case.folder / "mask.png"), 512).photo_chw


@pytest.mark.parametrize(("half", "guidance"), [(0, 0.0), (1, 1.0)], ids=["unconditional", "conditional"])
def test_first_noise_prediction(case, half, guidance):
    step = case.recorded_steps[0]
    found = case.denoise(step, noise_row(case, 0, guidance))["next_latents"]
    assert relative_error(found[0], step["noise"][half]) < 1e-4


def test_every_step_from_the_originals_own_state(case):
    rows = schedule("ddim", case.meta["steps"], GUIDANCE)
    for step in case.recorded_steps:
        found = case.denoise(step, rows[step["number"]])
        assert relative_error(found["next_latents"], step["next_latents"]) < 1e-3, step["number"]
        wrong = np.abs(found["next_foreground_mask"][0] - step["next_foreground_mask"][0]) > 1e-3
        assert wrong.mean() <= 1e-3, step["number"]


def test_a_whole_generation_makes_the_same_picture(case):
    result = case.generate()
    assert case.decibels(result.images[0]) >= 50
    assert (np.abs(result.foreground_masks[0] - case.final_mask()) > 1e-3).mean() <= 1e-3
