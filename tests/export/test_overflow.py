"""VAEs whose values leave half precision's range, as those of some fine-tunes do."""

import dataclasses
import math

import pytest
import torch

from export.networks import NETWORKS, Precisions
from export.overflow import LIMIT, peaks
from moma_rt.bundle.specs import Precision
from moma_rt.errors import CheckpointError
from tests.export.bundles import build, checkpoint_of

HALVES = ("vae_encoder", "vae_decoder")
HALF = Precisions(Precision.FP16, Precision.FP16)


def scaled(checkpoint, factor, *names, limit=math.inf):
    """The checkpoint with some of its VAE's tensors multiplied, and clamped to a limit."""

    def load(wanted=None):
        tensors = checkpoint.vae.load(wanted)
        return {name: (t * factor).clamp(-limit, limit) if name in names else t for name, t in tensors.items()}

    vae = dataclasses.replace(checkpoint.vae, load=load, sha256=f"{factor}{names}")
    return dataclasses.replace(checkpoint, vae=vae)


def first(half):
    return [f"{half}.conv_in.{part}" for part in ("weight", "bias")]


def exact(checkpoint, geometry, name, inputs, precision):
    module = NETWORKS[name].module(checkpoint, geometry, precision)
    with torch.inference_mode():
        result = module(*inputs)
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_the_peak_is_what_decides_overflow(tiny_checkpoint, tiny_geometry, half):
    name = f"vae_{half}"
    usual = peaks(tiny_checkpoint, tiny_geometry, HALVES)
    assert 0 < usual[name] < LIMIT
    noise = torch.randn(1, 4, tiny_geometry.latent_size, tiny_geometry.latent_size)
    side = tiny_geometry.image_size
    inputs = (noise,) if half == "decoder" else (torch.rand(1, 3, side, side) * 2 - 1, noise)
    # Weights of 6e4 are finite in half precision; what the first convolution makes of them is not.
    large = scaled(tiny_checkpoint, 3e5, *first(half), limit=6e4)
    assert peaks(large, tiny_geometry, HALVES)[name] > LIMIT
    assert not exact(large, tiny_geometry, name, inputs, Precision.FP16)[-1].isfinite().all()
    assert exact(large, tiny_geometry, name, inputs, Precision.FP32)[-1].isfinite().all()


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_a_weight_beyond_half_precision_counts_whatever_is_made_of_it(tiny_checkpoint, tiny_geometry, half):
    weight = f"{half}.conv_out.weight"
    assert peaks(scaled(tiny_checkpoint, 1e9, weight, limit=7e4), tiny_geometry, HALVES)[f"vae_{half}"] >= 7e4


def test_an_encoder_out_of_range_says_nothing_about_the_decoder(tiny_checkpoint, tiny_geometry):
    usual = peaks(tiny_checkpoint, tiny_geometry, HALVES)
    found = peaks(scaled(tiny_checkpoint, math.inf, *first("encoder")), tiny_geometry, HALVES)
    assert math.isnan(found["vae_encoder"])
    assert found["vae_decoder"] == pytest.approx(usual["vae_decoder"], rel=1e-3)


def test_the_answer_for_one_half_does_not_depend_on_the_other(tiny_checkpoint, tiny_geometry):
    both = peaks(tiny_checkpoint, tiny_geometry, HALVES)
    assert {name: peaks(tiny_checkpoint, tiny_geometry, (name,))[name] for name in HALVES} == both


def test_only_the_half_that_overflows_stays_in_fp32(tmp_path, exports):
    reports = []
    checkpoint = scaled(checkpoint_of(HALVES), 3e5, *first("decoder"))
    plan = {"precisions": HALF}
    bundle = build(tmp_path, HALVES, checkpoint, lambda *said: reports.append(said), **plan)
    found = {name: entry.precision.value for name, entry in bundle.manifest.networks.items()}
    assert found == {"vae_encoder": "fp16", "vae_decoder": "fp32"}
    (note,) = (said for name, said in reports if name == "vae_decoder" and said.startswith("note"))
    assert note.startswith("note: stays in fp32, since its values reach ")
    # The next build finds the same.
    again = build(tmp_path, HALVES, checkpoint, **plan)
    assert again.manifest == bundle.manifest


def test_bf16_and_fp32_are_not_probed(tmp_path, exports, monkeypatch):
    monkeypatch.setattr("export.bundling.peaks", lambda *_: pytest.fail("probed"))
    for precision in (Precision.BF16, Precision.FP32):
        build(tmp_path / precision.value, HALVES, precisions=Precisions(precision, precision))


def test_a_half_that_is_in_the_store_is_not_probed_again(tmp_path, exports, monkeypatch):
    plan = {"precisions": HALF}
    first_build = build(tmp_path, HALVES, **plan)
    monkeypatch.setattr("export.bundling.peaks", lambda *_: pytest.fail("probed"))
    assert build(tmp_path, HALVES, **plan).manifest == first_build.manifest


def test_a_vae_that_is_unusable_in_fp32_is_refused(tmp_path, exports):
    checkpoint = scaled(checkpoint_of(HALVES), math.inf, *first("decoder"))
    with pytest.raises(CheckpointError, match="its decoder makes NaN or infinity even in fp32"):
        build(tmp_path, HALVES, checkpoint, precisions=HALF)
    assert not (tmp_path / "manifest.json").exists()
