import numpy as np
import pytest

from examples.mini_moma.backgrounds import CONTEXTS, STUDIO, background, gradient, smooth_noise


@pytest.mark.parametrize("context", [*CONTEXTS, STUDIO])
def test_a_place_is_drawn_from_a_seed(context):
    first, again, other = (background(context, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert (first.shape, first.dtype) == ((128, 128, 3), np.uint8)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    if context == STUDIO:
        assert np.ptp(first, axis=1).max() == 0
    else:
        assert first.std() > 10


def test_places_can_be_told_apart():
    means = {
        context: np.mean([background(context, np.random.default_rng(seed)) for seed in range(3)], axis=(0, 1, 2))
        for context in CONTEXTS
    }
    assert means["night"].sum() < means["snow"].sum() / 2
    assert means["grass"][1] > means["grass"][2]
    assert means["water"][2] > means["water"][0]
    assert means["brick"][0] > means["brick"][2]


def test_phrases_are_of_one_place_only():
    phrases = [phrase for names in CONTEXTS.values() for phrase in names]
    assert len(CONTEXTS) == 12
    assert len(set(phrases)) == len(phrases) == 36


def test_gradient_passes_through_its_stops():
    colors = gradient([(0, (0, 0, 0)), (0.5, (100, 50, 0)), (1, (0, 0, 200))], 5)
    assert colors.tolist() == [[0, 0, 0], [50, 25, 0], [100, 50, 0], [50, 25, 100], [0, 0, 200]]


def test_noise_is_smooth():
    noise = smooth_noise(np.random.default_rng(0), 96, 64, 16)
    assert noise.shape == (96, 64)
    assert 0.5 < noise.std() < 1.3
    assert np.abs(np.diff(noise, axis=0)).max() < 0.5
