"""The foreground mask against the original's rules in NumPy; and the update and injection of the denoiser."""

import numpy as np
import pytest
import torch

from export.models.unet import Denoiser, foreground, load_unet
from moma_rt.schedulers.tables import Column, schedule

SIZE = 8
SIDES = (8, 4, 2, 1, 2, 4, 8)


def unit(values: np.ndarray) -> np.ndarray:
    return (values - values.min()) / (values.max() - values.min())


def expected_foreground(saliency_gs: list[np.ndarray], batch: int) -> np.ndarray:
    """Scale each layer and half to [0, 1], upsample to the finest grid, average, and scale both halves jointly."""
    masks = []
    for sample in range(batch):
        rows = range(sample, len(saliency_gs[0]), batch)
        halves = []
        for row in rows:
            maps = []
            for saliency in saliency_gs:
                side = int(np.sqrt(saliency.shape[1]))
                grid = unit(saliency[row]).reshape(side, side)
                maps.append(np.kron(grid, np.ones((SIZE // side, SIZE // side))))
            halves.append(np.mean(maps, axis=0))
        conditional = unit(np.stack(halves))[-1]
        masks.append(np.where(conditional <= 0.2, 0.0, conditional))
    return np.stack(masks)[:, None]


def found_foreground(saliency_gs: list[np.ndarray], batch: int) -> np.ndarray:
    first = torch.arange(batch)
    last = first + len(saliency_gs[0]) - batch
    tensors = [torch.from_numpy(saliency) for saliency in saliency_gs]
    return foreground(tensors, SIZE, first, last).numpy()


@pytest.mark.parametrize("guided", [1, 2])
@pytest.mark.parametrize("batch", [1, 3])
def test_foreground(guided, batch):
    generator = np.random.default_rng(0)
    # Each row has its own range, so that scaling over the wrong rows shows; side 1 would have no range at all.
    sides = [side for side in SIDES if side > 1]
    saliency = [
        generator.random((guided * batch, side * side), np.float32) * generator.uniform(0.01, 1, (guided * batch, 1))
        for side in sides
    ]
    found, expected = found_foreground(saliency, batch), expected_foreground(saliency, batch)
    assert found.shape == (batch, 1, SIZE, SIZE)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert 0 < (found == 0).mean() < 1
    if guided == 1:
        assert found.max(axis=(1, 2, 3)).tolist() == [1.0] * batch


def test_the_unconditional_half_can_hold_the_maximum():
    # Halves scaled apart would give the conditional one a maximum of 1.
    saliency = np.stack([np.linspace(0, 1, 64), np.r_[np.zeros(63), 1.0]]).astype(np.float32)
    other = np.stack([np.linspace(0, 1, 64), np.r_[1.0, np.zeros(63)]]).astype(np.float32)
    found = found_foreground([saliency, other], 1)
    assert found.max() == pytest.approx(0.5)
    np.testing.assert_allclose(found, expected_foreground([saliency, other], 1), atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_a_constant_saliency_is_no_foreground(value):
    found = found_foreground([np.full((2, side * side), value, np.float32) for side in SIDES], 1)
    assert found.tolist() == np.zeros((1, 1, SIZE, SIZE)).tolist()


def test_one_constant_layer_leaves_the_others():
    generator = np.random.default_rng(1)
    layers = [generator.random((2, 16), np.float32), np.full((2, 4), 0.5, np.float32)]
    found = found_foreground(layers, 1)
    assert np.isfinite(found).all()
    # A map of zeros only halves the mean, and the joint scaling undoes that.
    np.testing.assert_allclose(found, found_foreground(layers[:1], 1), atol=1e-6)


def test_the_threshold_itself_is_background():
    values = np.array([[0.0, 0.2, 0.20001, 1.0]], np.float32)
    assert found_foreground([values], 1)[0, 0, ::4, ::4].ravel() == pytest.approx([0, 0, 0.20001, 1])


@pytest.fixture(scope="module")
def denoiser(tiny_checkpoint, tiny_geometry):
    unet = load_unet(tiny_checkpoint.unet.config, tiny_checkpoint.unet.load())
    return Denoiser(unet, tiny_checkpoint.adapters.load(), tiny_geometry)


def denoise(denoiser, geometry, row, batch=1, guided=2, **changes):
    """One step on seeded inputs; `changes` replace inputs by name."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    size, tokens = geometry.latent_size, 3
    inputs = {
        **{name: random(batch, 4, size, size) for name in ("latents", "history", "noise")},
        "schedule_row": torch.from_numpy(row),
        "strength": torch.ones(batch),
        "text_tokens": random(guided * batch, 77, geometry.text_width),
        "context_tokens": random(guided * batch, 4, geometry.text_width),
        "subject_weights": torch.eye(77)[3:4].repeat(batch, 1),
        "foreground_mask": torch.rand((batch, 1, size, size), generator=generator),
        "object_masks": tuple(torch.ones(batch, tokens) for _ in geometry.grids),
        "reference_k": tuple(random(batch, tokens, layer.channels) for layer in geometry.self_attention),
        "reference_v": tuple(random(batch, tokens, layer.channels) for layer in geometry.self_attention),
    }
    with torch.inference_mode():
        return [tensor.numpy() for tensor in denoiser(**{**inputs, **changes})]


def relative(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def test_a_schedule_row_defines_the_update(denoiser, tiny_geometry):
    """The update is linear in the row: each column's contribution is measured alone, then they are combined."""
    columns = (Column.LATENTS, Column.HISTORY, Column.NOISE, Column.EPS)
    base = np.zeros(64, np.float32)
    base[[Column.TIMESTEP, Column.GUIDANCE, Column.INJECTION]] = 500, 2.0, 1.0

    def run(**values):
        row = base.copy()
        for name, value in values.items():
            row[Column[name]] = value
        return denoise(denoiser, tiny_geometry, row)

    parts = [run(**{column.name: 1.0})[0] for column in columns]
    together = run(LATENTS=0.5, HISTORY=-2.0, NOISE=3.0, EPS=0.25)
    assert relative(together[0], 0.5 * parts[0] - 2.0 * parts[1] + 3.0 * parts[2] + 0.25 * parts[3]) < 1e-6
    history = run(HISTORY_LATENTS=0.5, HISTORY_EPS=-2.0, HISTORY_HISTORY=3.0)[1]
    assert relative(history, 0.5 * parts[0] - 2.0 * parts[3] + 3.0 * parts[1]) < 1e-6
    assert not together[1].any()


def test_no_injection_outside_its_window(denoiser, tiny_geometry):
    row = schedule("ddim", 20, 7.5)[10]
    assert row[Column.INJECTION] == 1
    injected = denoise(denoiser, tiny_geometry, row)[0]
    without = denoise(denoiser, tiny_geometry, row, strength=torch.zeros(1))[0]
    closed = row.copy()
    closed[Column.INJECTION] = 0
    np.testing.assert_allclose(denoise(denoiser, tiny_geometry, closed)[0], without, atol=1e-6)
    assert relative(injected, without) > 1e-3
