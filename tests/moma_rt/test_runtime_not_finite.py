"""NaN and infinity that a network computes: always an error that names the network, never a picture or a subject."""

import numpy as np
import pytest

from moma_rt.errors import MomaError


def spoil(monkeypatch, fakes, name, output, value, where=...):
    """Make a fake network write `value` at `where` of an output."""
    function = fakes.functions[name]

    def spoiled(inputs):
        outputs = function(inputs)
        array = np.array(outputs[output], np.float32)
        array[where] = value
        return {**outputs, output: array}

    monkeypatch.setitem(fakes.functions, name, spoiled)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("output", ["next_latents", "next_foreground_mask"])
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
def test_nan_or_infinite_latents_are_an_error(runtime, subject, fakes, monkeypatch, output, value):
    spoil(monkeypatch, fakes, "denoiser", output, value, (0, 0, 3, 3))
    with pytest.raises(
        MomaError,
        match="picture became NaN or infinity in the denoiser: it computes in fp32, so another",
    ) as caught:
        runtime.generate(subject, "A car.", steps=1)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert runtime.generate(subject, "A car.", steps=2).images


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_decoder_that_gives_nan_is_an_error(runtime, subject, fakes, monkeypatch, value):
    """The picture itself cannot show NaN: 8-bit pixels made of it are black."""
    spoil(monkeypatch, fakes, "vae_decoder", "pixel_mean", value)
    with pytest.raises(
        MomaError,
        match="picture became NaN or infinity in the vae_decoder: it computes in fp32, so another",
    ):
        runtime.generate(subject, "A car.", steps=1)
    monkeypatch.undo()
    assert runtime.generate(subject, "A car.", steps=1).images


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ({"guidance_scale": 90.0}, r"lower guidance_scale \(90\)$"),
        ({"guidance_scale": 31.0, "strength": 2.0}, r"lower guidance_scale \(31\) and strength \(2\)$"),
        ({"latents": np.full((1, 4, 8, 8), 1e30, np.float32)}, r"lower the values in latents \(1e\+30\)$"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
def test_the_advice_names_parameters_that_explain_nan(runtime, subject, fakes, monkeypatch, options, advice):
    spoil(monkeypatch, fakes, "denoiser", "next_latents", np.nan)
    with pytest.raises(MomaError, match=advice):
        runtime.generate(subject, "A car.", steps=1, **options)


@pytest.mark.parametrize(
    ("network", "output"),
    [("text_encoder", "text_tokens"), ("language_model", "embedding"), ("context_projector", "context_tokens")],
)
def test_conditions_of_nan_are_an_error_that_names_the_network(runtime, subject, fakes, monkeypatch, network, output):
    spoil(monkeypatch, fakes, network, output, np.nan, (0, ..., -1))
    with pytest.raises(
        MomaError,
        match=rf"^{network} computed NaN or infinity \({output}\)( from numbers of up to [^ ]+)?: it computes in fp32",
    ):
        runtime.generate(subject, "A car in a place never seen before.", steps=1, negative_prompt="bad")
    monkeypatch.undo()
    assert runtime.generate(subject, "A car in a place never seen before.", steps=1, negative_prompt="bad").images


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    ("network", "output"),
    [
        ("vae_encoder", "latents"),
        ("subject_encoder", "reference_v.up_blocks.1.attentions.0"),
        ("vision_encoder", "image_tokens"),
        ("language_model", "new_kv"),
        ("text_encoder", "text_tokens"),
    ],
)
def test_a_subject_of_nan_is_an_error_that_names_the_network(
    runtime, fakes, monkeypatch, photo, mask, network, output, value
):
    output = next(t.name for t in fakes.specs[network].outputs if t.name.startswith(output.split(".")[0]))
    spoil(monkeypatch, fakes, network, output, value, (0, ..., -1))
    with pytest.raises(
        MomaError,
        match=rf"^{network} computed NaN or infinity \({output}\)( from numbers of up to [^ ]+)?: it computes in fp32",
    ):
        runtime.enroll(photo, mask, "car")
    monkeypatch.undo()
    assert runtime.enroll(photo, mask, "car").name == "car"
