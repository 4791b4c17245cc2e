"""The layers in training against the original's, as the benchmarks' baseline has them, on the same weights."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from benchmarks.latency import original_attention as original
from examples.mini_moma.attention import Photos, Pictures, min_max, on_grid
from examples.mini_moma.joint import threshold
from export.checkpoints.presets import MINI

SIDE, GRID = 128, 16


@pytest.fixture(scope="module")
def original_unet(model):
    adapters = {}
    for name, processor in model.unet.attn_processors.items():
        layer = name.removesuffix(".processor")
        adapters |= {f"attention.{layer}.{key}": tensor for key, tensor in processor.state_dict().items()}
    unet = UNet2DConditionModel.from_config(dict(MINI.unet)).requires_grad_(False)
    unet.load_state_dict({k: t for k, t in model.unet.state_dict().items() if ".processor." not in k})
    original.set_processors(unet, adapters)
    return unet


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def reference(model, original_unet, tokens):
    """Both references of one photo, from the model's pass and the original's."""
    latents, ids = normal(1, 4, GRID, GRID), tokens.text("teapot")[None]
    photos = model.read_photos(latents, ids)
    reference = original.ReferencePass()
    text = model.encode_text(ids)[:, :73]
    original_unet(latents, 0, text, cross_attention_kwargs={"step": reference})
    return photos, reference


def photo_mask(kind):
    mask = torch.zeros(1, 1, SIDE, SIDE)
    mask[..., 50:100, 40:90] = 1
    if kind == "with a hole":
        # At the coarsest level only (64, 64) is looked at inside the subject.
        mask[..., 60:68, 60:68] = 0
    assert bool(mask[..., ::64, ::64].any()) == (kind == "whole")
    assert mask[..., ::32, ::32].any()
    return mask


def both(model, original_unet, reference, *, mask, strength, foreground, injects=True):
    """Noise and saliency of both guidance halves from the model, and from the original."""
    photos, kept = reference
    latents, text, context = normal(2, 4, GRID, GRID, seed=1), normal(2, 77, 128, seed=2), normal(2, 4, 128, seed=3)
    state = Pictures(
        photos=photos,
        photo_b=torch.zeros(2, dtype=torch.long),
        mask_pn=mask[0, :, ::8, ::8].flatten(1),
        foreground_bs=foreground.flatten(1).expand(2, -1),
        strength_b=torch.full((2,), strength if injects else 0.0),
        context_bmc=context,
        subject_bt=torch.zeros(2, 77).index_fill(1, torch.tensor([4, 7, 20]), 1.0),
    )
    eps, saliency = model(latents, torch.tensor([400, 400]), text, state)
    step = original.GenerationStep(
        reference=kept,
        object_mask=mask,
        foreground=foreground,
        strength=strength,
        injects=injects,
        context_gmc=context,
        subject_tokens=torch.tensor([4, 7, 20]),
    )
    expected = original_unet(latents, 400, text, cross_attention_kwargs={"step": step}).sample
    return (eps, saliency), (expected, step.saliency)


def worst(actual, expected):
    return float((actual - expected).abs().max() / expected.abs().max())


def test_the_photos_pass_is_the_originals(model, reference):
    photos, kept = reference
    layers = [name.removesuffix(".processor") for name in model.unet.attn_processors]
    assert len(kept.keys) == 16
    assert {layers[index] for index in photos.keys_values} == set(kept.keys)
    for index, (keys, values) in photos.keys_values.items():
        assert worst(keys, kept.keys[layers[index]]) < 1e-5
        assert worst(values, kept.values[layers[index]]) < 1e-5


def test_the_photos_pass_reads_73_tokens(model, tokens, reference):
    ids = tokens.text("teapot")[None]
    longer = Photos()
    kwargs = {"state": longer}
    model.unet(normal(1, 4, GRID, GRID), 0, model.encode_text(ids), cross_attention_kwargs=kwargs)
    assert any(worst(longer.keys_values[i][0], keys) > 1e-4 for i, (keys, _) in reference[0].keys_values.items())


@pytest.mark.parametrize(("kind", "strength"), [("whole", 1.0), ("whole", 0.4), ("with a hole", 1.0)])
def test_a_pass_on_pictures_is_the_originals(model, original_unet, reference, kind, strength):
    soft = normal(1, 1, GRID, GRID, seed=4).sigmoid()
    (eps, _), (expected, _) = both(
        model, original_unet, reference, mask=photo_mask(kind), strength=strength, foreground=threshold(soft)
    )
    assert worst(eps, expected) < 2e-5


def test_without_injection(model, original_unet, reference):
    given = {"mask": photo_mask("whole"), "strength": 1.0, "foreground": torch.ones(1, 1, GRID, GRID)}
    (eps, _), (expected, _) = both(model, original_unet, reference, **given, injects=False)
    (with_it, _), _ = both(model, original_unet, reference, **given)
    assert worst(eps, expected) < 2e-5
    assert worst(with_it, expected) > 1e-2


def test_saliency_leads_to_the_originals_next_foreground(model, original_unet, reference):
    soft = normal(1, 1, GRID, GRID, seed=4).sigmoid()
    (_, saliency), (_, kept) = both(
        model, original_unet, reference, mask=photo_mask("whole"), strength=1.0, foreground=soft
    )
    expected = original.next_foreground(kept, GRID, SIDE)[0, :, ::8, ::8].flatten(1)
    # Over both guidance halves together.
    joint = min_max(saliency.flatten()[None]).view_as(saliency)
    assert 0 < float((expected == 0).float().mean()) < 1
    torch.testing.assert_close(threshold(joint)[1:], expected, atol=2e-5, rtol=0)


def test_pictures_of_several_photos_do_not_mix(model, tokens):
    latents, ids = normal(2, 4, GRID, GRID, seed=5), torch.stack([tokens.text("teapot"), tokens.text("car")])
    mask = torch.zeros(2, GRID * GRID)
    mask[0, :100], mask[1, 120:] = 1, 1

    def predicted(photos, photo_b, mask_pn, rows):
        state = Pictures(
            photos=photos,
            photo_b=torch.tensor(photo_b),
            mask_pn=mask_pn,
            foreground_bs=normal(3, GRID * GRID, seed=6).sigmoid()[rows],
            strength_b=torch.tensor([1.0, 0.4, 1.2])[rows],
            context_bmc=normal(3, 4, 128, seed=7)[rows],
            subject_bt=torch.eye(77)[[4, 5, 6]][rows],
        )
        noised, text = normal(3, 4, GRID, GRID, seed=8)[rows], normal(3, 77, 128, seed=9)[rows]
        return model(noised, torch.tensor([100, 500, 900])[rows], text, state)[0]

    together = predicted(model.read_photos(latents, ids), [0, 1, 0], mask, [0, 1, 2])
    for row, photo in enumerate((0, 1, 0)):
        alone = model.read_photos(latents[photo : photo + 1], ids[photo : photo + 1])
        assert worst(together[row : row + 1], predicted(alone, [0], mask[photo : photo + 1], [row])) < 2e-5


def test_coarser_grids_sample_the_nearest_cell():
    fine = torch.arange(64.0)[None]
    assert on_grid(fine, 64) is fine
    assert on_grid(fine, 16).tolist() == [[0, 2, 4, 6, 16, 18, 20, 22, 32, 34, 36, 38, 48, 50, 52, 54]]
    assert on_grid(fine, 4).tolist() == [[0, 4, 32, 36]]


def test_min_max_scales_each_row():
    scaled = min_max(torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]]))
    assert scaled.tolist() == [[0, 0.5, 1], [0, 0, 0]]
