"""Measures how much two pictures differ."""

import numpy as np


def difference(one: np.ndarray, other: np.ndarray) -> int:
    """Return the largest absolute difference between two uint8 pictures; 255 if their sizes differ."""
    if one.shape != other.shape:
        return 255
    return int((np.maximum(one, other) - np.minimum(one, other)).max())


def psnr(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio of two uint8 pictures in dB, at most 100."""
    error = float(np.mean((found.astype(np.float64) - expected) ** 2))
    return 100.0 if error == 0 else min(100.0, 10 * float(np.log10(255.0**2 / error)))
