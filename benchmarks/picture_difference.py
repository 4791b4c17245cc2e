"""How far two pictures are apart."""

import numpy as np


def difference(one: np.ndarray, other: np.ndarray) -> int:
    """The largest difference of two uint8 pictures in one value; 255 where they have different sizes."""
    if one.shape != other.shape:
        return 255
    return int((np.maximum(one, other) - np.minimum(one, other)).max())


def psnr(found: np.ndarray, expected: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 pictures, 100 at most."""
    error = float(np.mean((found.astype(np.float64) - expected) ** 2))
    return 100.0 if error == 0 else min(100.0, 10 * float(np.log10(255.0**2 / error)))
