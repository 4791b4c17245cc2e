import hashlib
import itertools

import numpy as np
import pytest

from moma_rt.errors import InputError
from moma_rt.inputs.noise import MAX_SEED, Stream, check_seed, draw

LATENTS = (1, 4, 64, 64)

# First two numbers of each stream: they may never change, or a seed's picture does.
KNOWN = {
    (0, Stream.INITIAL_LATENTS): [0.059911035001277924, 0.015559634193778038],
    (0, Stream.VAE): [-1.4314630031585693, 1.6707168817520142],
    (0, Stream.REFERENCE): [2.4439878463745117, 0.46205928921699524],
    (0, Stream.STEP): [-0.2006753534078598, -1.124338984489441],
    (MAX_SEED, Stream.INITIAL_LATENTS): [-1.744478702545166, -0.48715826869010925],
    (MAX_SEED, Stream.STEP): [-0.43481144309043884, -0.19352124631404877],
}


@pytest.mark.parametrize(("seed", "stream"), KNOWN)
def test_known_numbers(seed, stream):
    np.testing.assert_array_equal(draw(seed, stream, (2,)), np.array(KNOWN[seed, stream], np.float32))


def test_known_latents_to_the_last_bit():
    content = draw(2, Stream.INITIAL_LATENTS, LATENTS).astype("<f4").tobytes()
    expected = "badb27add8804090903e96cd2225e20364af468ed87cd5ed506be68136cd1ad5"
    assert hashlib.sha256(content).hexdigest() == expected


def test_streams_keep_their_numbers():
    assert [(s.name, s.value) for s in Stream] == [("INITIAL_LATENTS", 0), ("VAE", 1), ("REFERENCE", 2), ("STEP", 3)]


def test_shape_dtype_and_distribution():
    noise = draw(7, Stream.VAE, LATENTS)
    assert noise.shape == LATENTS
    assert noise.dtype == np.float32
    # 16384 numbers: five standard errors of the mean and of the variance.
    assert abs(noise.mean()) < 5 / 128
    assert abs(noise.var() - 1) < 5 * 2**0.5 / 128


def test_empty_and_scalar_shapes():
    assert draw(7, Stream.VAE, (0, 4)).shape == (0, 4)
    assert draw(7, Stream.VAE, ()).shape == ()


def test_a_larger_draw_starts_with_a_smaller_one():
    np.testing.assert_array_equal(draw(7, Stream.STEP, (50, 3))[:20], draw(7, Stream.STEP, (20, 3)))


def test_a_draw_is_repeatable_and_leaves_the_global_generator_alone():
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    first = draw(3, Stream.REFERENCE, LATENTS)
    draw(4, Stream.REFERENCE, LATENTS)
    np.testing.assert_array_equal(draw(3, Stream.REFERENCE, LATENTS), first)
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002


def test_streams_and_neighbouring_seeds_are_independent():
    seeds = [0, 1, 2, 3, MAX_SEED - 1, MAX_SEED]
    draws = [draw(seed, stream, (4096,)) for seed, stream in itertools.product(seeds, Stream)]
    correlation = np.corrcoef(draws)
    np.fill_diagonal(correlation, 0)
    assert np.abs(correlation).max() < 5 / 64


@pytest.mark.parametrize("seed", [-1, MAX_SEED + 1])
def test_seed_out_of_range(seed):
    with pytest.raises(InputError, match=f"seed must be 0 to {MAX_SEED}, not {seed}"):
        draw(seed, Stream.VAE, (1,))


@pytest.mark.parametrize("seed", [1.0, "1", None])
def test_seed_that_is_no_whole_number(seed):
    with pytest.raises(InputError, match="seed must be a whole number"):
        check_seed(seed)


def test_numpy_seed_is_the_same_seed():
    assert check_seed(np.uint64(MAX_SEED)) == MAX_SEED
    np.testing.assert_array_equal(draw(np.int32(5), Stream.VAE, (3,)), draw(5, Stream.VAE, (3,)))
