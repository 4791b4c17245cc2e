"""Cuts the subject out of a picture: on white, centred, at one size, so that only its look is left to compare."""

import numpy as np
import numpy.typing as npt
from PIL import Image

Picture = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.floating] | npt.NDArray[np.bool_]

CUTOUT_SIDE = 64
# A disc's diameter is 2.8 times the root mean square of its pixels' distances from its centre; a line's length, 3.5.
_REACH = 3.6
_LEAST_SIDE = 8.0
# Pixels that the mask is less sure of do not move the window.
_SURE = 0.5


def cutout(picture_hwc: Picture, mask_hw: Mask) -> Picture:
    """Return the subject on white, uint8 [64, 64, RGB]; all white if the mask is empty.

    The window is placed by the mask's centre and spread, which a few stray pixels hardly move.

    Args:
        picture_hwc: uint8 [S, S, RGB].
        mask_hw: bool, or 0..1 [S, S].
    """
    mask = mask_hw.astype(np.float32)
    height, width = mask.shape
    sure = np.where(mask >= _SURE, mask, 0)
    total = float(sure.sum())
    if total == 0:
        return np.full((CUTOUT_SIDE, CUTOUT_SIDE, 3), 255, np.uint8)
    rows, columns = (np.arange(size, dtype=np.float32) + 0.5 for size in (height, width))
    of_rows, of_columns = sure.sum(1) / total, sure.sum(0) / total
    y, x = float(of_rows @ rows), float(of_columns @ columns)
    spread = float(of_rows @ (rows - y) ** 2 + of_columns @ (columns - x) ** 2) ** 0.5
    side = float(np.clip(_REACH * spread, _LEAST_SIDE, min(height, width)))
    on_white = picture_hwc * mask[..., None] + 255 * (1 - mask[..., None])
    # The window may reach beyond the picture.
    margin = round(side)
    canvas = np.full((height + 2 * margin, width + 2 * margin, 3), 255, np.uint8)
    canvas[margin : margin + height, margin : margin + width] = np.rint(on_white)
    left, top = margin + x - side / 2, margin + y - side / 2
    box = (left, top, left + side, top + side)
    image = Image.fromarray(canvas).resize((CUTOUT_SIDE, CUTOUT_SIDE), Image.Resampling.BILINEAR, box=box)
    return np.asarray(image)
