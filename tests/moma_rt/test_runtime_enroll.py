"""Enrollment, with fake networks."""

import warnings

import numpy as np
import pytest
from PIL import Image

from moma_rt.bundle.manifest import Bundle
from moma_rt.errors import InputError, MomaWarning
from moma_rt.inputs.noise import Stream, draw
from moma_rt.pipeline.enrollment import keep_masked_tokens
from moma_rt.runtime import Runtime
from moma_rt.subject import Subject


def full_reference(fakes, seed=0):
    rng = np.random.default_rng(seed)
    return {
        f"reference_{kind}.{layer.name}": rng.standard_normal((1, layer.grid**2, layer.channels), dtype=np.float32)
        for layer in fakes.layers
        for kind in "kv"
    }


def test_exactly_the_tokens_whose_sampled_pixel_is_inside_the_mask_are_kept(fakes):
    mask = np.random.default_rng(1).random((64, 64)) < 0.3
    full = full_reference(fakes)
    reference = keep_masked_tokens(fakes.geometry, mask, full)
    for layer in fakes.layers:
        stride = 64 // layer.grid
        kept = [
            y * layer.grid + x for y in range(layer.grid) for x in range(layer.grid) if mask[y * stride, x * stride]
        ]
        assert 0 < len(kept) < layer.grid**2
        np.testing.assert_array_equal(reference.keys[layer.name], full[f"reference_k.{layer.name}"][0, kept])
        np.testing.assert_array_equal(reference.values[layer.name], full[f"reference_v.{layer.name}"][0, kept])
        np.testing.assert_array_equal(reference.object_mask[layer.grid], np.ones(len(kept)))


def test_a_level_without_a_token_gets_zero_keys_all_values_and_a_full_mask(fakes):
    mask = np.zeros((64, 64), bool)
    mask[8:16, 8:16] = True  # one token of the 8x8 grid, between the pixels that the 4x4 grid samples
    full = full_reference(fakes)
    reference = keep_masked_tokens(fakes.geometry, mask, full)
    fine, coarse = fakes.layers[0], fakes.layers[1]
    assert reference.keys[fine.name].shape == (1, 4)
    assert not reference.keys[coarse.name].any()
    np.testing.assert_array_equal(reference.values[coarse.name], full[f"reference_v.{coarse.name}"][0])
    np.testing.assert_array_equal(reference.object_mask[coarse.grid], np.ones(16))


def test_a_mask_that_only_coarse_grids_miss_gives_no_warning(fakes):
    mask = np.zeros((64, 64), bool)
    mask[8, 8] = True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        keep_masked_tokens(fakes.geometry, mask, full_reference(fakes))


def test_a_mask_that_every_grid_misses_warns_and_averages_the_photo(runtime, photo):
    mask = np.zeros((64, 64), np.uint8)
    mask[3, 5] = 255
    with pytest.warns(MomaWarning, match="none of the 8x8 sampled points .* plain average") as caught:
        subject = runtime.enroll(photo, Image.fromarray(mask), "car")
    assert caught[0].filename == __file__
    assert not any(keys.any() for keys in subject.reference_k.values())
    assert subject.token_counts() == {8: 64, 4: 16}
    assert runtime.generate(subject, "A car.", steps=1).images


def test_enrolling_feeds_each_network_what_the_one_before_made(runtime, backend, photo, mask, fakes):
    subject = runtime.enroll(photo, mask, "teddy bear", seed=5)
    assert [name for name, _ in backend.runs] == [
        "text_encoder",
        "vae_encoder",
        "subject_encoder",
        "vision_encoder",
        "language_model",
    ]
    (vae,), (encoder,) = backend.inputs_of("vae_encoder"), backend.inputs_of("subject_encoder")
    np.testing.assert_array_equal(vae["noise"], draw(5, Stream.VAE, (1, 4, 8, 8)))
    np.testing.assert_array_equal(encoder["noise"], draw(5, Stream.REFERENCE, (1, 4, 8, 8)))
    np.testing.assert_allclose(encoder["latents"], fakes.functions["vae_encoder"](vae)["latents"], rtol=1e-6)
    (text,) = backend.inputs_of("text_encoder")
    length = len("teddy bear") + 2
    assert text["token_ids"][0, length - 1 :].tolist() == [1] * (78 - length), "the bare name, then the end token"
    assert subject.photo.dtype == np.uint8
    assert subject.mask.shape == (64, 64)
    assert set(subject.seconds) == {"loading", *(name for name, _ in backend.runs)}


def test_given_noise_is_used_instead_of_the_seed(runtime, backend, photo, mask):
    vae, reference = np.full((1, 4, 8, 8), 2.0), np.full((1, 4, 8, 8), 3.0)
    runtime.enroll(photo, mask, "car", vae_noise=vae, reference_noise=reference)
    np.testing.assert_array_equal(backend.inputs_of("vae_encoder")[0]["noise"], vae)
    np.testing.assert_array_equal(backend.inputs_of("subject_encoder")[0]["noise"], reference)


def test_the_prefix_starts_with_an_empty_past_and_covers_the_photo(runtime, backend, subject, photo, mask, fakes):
    subject = runtime.enroll(photo, mask, "car", seed=1)
    (inputs,) = backend.inputs_of("language_model")
    assert inputs["past_kv"].shape == (2, 2, 1, 0, 3)
    ids = inputs["token_ids"][0]
    np.testing.assert_array_equal(inputs["positions"][0], np.arange(len(ids)))
    vocabulary = fakes.language.vocabulary
    assert ids[ids >= vocabulary].tolist() == list(range(vocabulary, vocabulary + 7))
    np.testing.assert_array_equal(subject.prefix.ids, ids)
    assert subject.prefix.kv.shape == (2, 2, 1, len(ids), 3)


@pytest.mark.parametrize("missing", ["vision_encoder", "language_model"])
def test_without_a_language_model_there_is_no_prefix(tmp_path, fakes, backend, photo, mask, missing):
    runtime = Runtime(Bundle.open(fakes.make_bundle(tmp_path, without=(missing,))), backend)
    subject = runtime.enroll(photo, mask, "car")
    assert subject.prefix is None
    assert "vision_encoder" not in backend.loads
    subject.save(tmp_path / "car.subject")
    assert Subject.load(tmp_path / "car.subject").identity == subject.identity


def test_enrolling_again_gives_an_equal_subject_and_another_seed_does_not(runtime, photo, mask):
    first, second = runtime.enroll(photo, mask, "car"), runtime.enroll(photo, mask, "car")
    assert first.identity == second.identity
    assert runtime.enroll(photo, mask, "car", seed=1).identity != first.identity
    assert runtime.enroll(photo, mask, "cat").identity != first.identity


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": ""}, "subject name is empty"),
        ({"name": "word " * 79 + "word"}, "80 words"),
        ({"name": None}, "subject name must be a text, not None"),
        ({"name": "car\x1b[31m"}, "must not contain control characters"),
        ({"vae_noise": np.zeros((1, 4, 8, 8), complex)}, "vae_noise is not an array of real numbers but of complex128"),
        ({"seed": -1}, "seed must be 0 to"),
        ({"vae_noise": np.zeros((1, 4, 8, 9))}, r"vae_noise has shape \[1, 4, 8, 9\]: it must be \[1, 4, 8, 8\]"),
        ({"reference_noise": np.full((1, 4, 8, 8), np.inf)}, "reference_noise contains NaN or infinity"),
        ({"vae_noise": "loud"}, "vae_noise is not an array of real numbers but str"),
        ({"mask": Image.new("L", (96, 96))}, "no foreground"),
        ({"mask": Image.new("L", (96, 48), 255)}, "aspect ratio"),
    ],
)
def test_wrong_input_is_refused_before_any_network_runs(runtime, backend, photo, mask, changes, message):
    arguments = {"image": photo, "mask": mask, "name": "car", **changes}
    with pytest.raises(InputError, match=message) as caught:
        runtime.enroll(**arguments)
    assert "\n" not in str(caught.value)
    assert backend.runs == []
    assert backend.loads == []
