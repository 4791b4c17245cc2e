"""Randomness: one counter-based generator on the host, so that a seed means the same picture on every backend."""

import enum
import operator

import numpy as np
import numpy.typing as npt

from moma_rt.errors import InputError

MAX_SEED = 2**64 - 1


class Stream(enum.IntEnum):
    """The purpose of a draw. Streams of one seed are independent; the numbers are part of the format, never reused."""

    INITIAL_LATENTS = 0
    VAE = 1
    REFERENCE = 2
    STEP = 3


def check_seed(seed: int) -> int:
    """Check a seed and return it as a plain int.

    Raises:
        InputError: not a whole number from 0 to 2**64 - 1.
    """
    try:
        number = operator.index(seed)
    except TypeError:
        raise InputError(f"seed must be a whole number, 0 to {MAX_SEED}, not {seed!r}") from None
    if not 0 <= number <= MAX_SEED:
        raise InputError(f"seed must be 0 to {MAX_SEED}, not {number}")
    return number


def draw(seed: int, stream: Stream, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Draw standard normal numbers that depend only on `seed`, `stream` and the position in C order.

    For a batch of pictures, draw once per seed and stack, so that each picture is what it would be alone.

    Args:
        seed: 0 to 2**64 - 1.
        stream: what the numbers are for.
        shape: of the result; a larger draw starts with the numbers of a smaller one.

    Returns:
        float32 array of `shape`, mean 0, variance 1.

    Raises:
        InputError: the seed is outside its range.
    """
    key = np.array([check_seed(seed), int(stream)], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).standard_normal(shape, dtype=np.float32)
