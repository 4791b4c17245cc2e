"""Which pixels of a mask image belong to the subject, and warnings about masks that are probably not meant so.

A pixel belongs to the subject if it is neither black nor transparent. A channel that is the same everywhere, such as
the blue of red on dark blue, says nothing. For gray masks this equals the original's rule, the first channel above 0.

Where a part is transparent, the mask is a cut-out or a silhouette: all that is visible belongs to the subject, its
black parts too. The exception is white that is surrounded by black where the transparent part begins: a usual mask on a
black ground, of which only the white belongs to the subject.
"""

import functools

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageChops

from moma_rt.messages import warn

# White on black: so much of what is not black is white, which leaves room for soft edges, and so much of what adjoins
# the transparent part is black.
_MOSTLY_WHITE = 0.75
_BLACK_EDGE = 0.75
# From here on a mask marks nearly everything. No subject covers most of the photo's edge, but its background does.
_MOST_OF_PHOTO = 0.95
_MOST_OF_EDGE = 0.75
# 262 pixels of 512x512: four of the 64x64 places at which the photo's appearance is kept.
_LEAST_OF_PHOTO = 0.001
# Values that only noise and very soft edges have: the darkest color of usual palettes is 32.
_FAINT = 31
_CLEAR = 128
# A mask of the same pixels in white would be half as large.
_MOST_OF_MASK = 0.5


def foreground(image: Image.Image) -> Image.Image:
    """Make 8-bit gray ("L") of a mask of any mode: 0 is background, any other value belongs to the subject.

    Gray and colors keep their brightest channel, cut-outs their alpha channel.

    Raises:
        TypeError, ValueError: a transparent color does not fit the mode.
    """
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image)
        # Scaling to 8 bits would lose small values such as the labels 0 and 1, and any positive value counts.
        marked = values > 0
        if (transparent := image.info.get("transparency")) is not None:
            marked &= values != transparent
        return Image.fromarray(np.where(marked, 255, 0).astype(np.uint8))
    if image.mode == "LAB":
        # Its black is no exact black in RGB.
        return image.getchannel("L")
    if not image.has_transparency_data:
        return _brightest(image.convert("RGB"))
    rgba = to_rgba(image)
    alpha = rgba.getchannel("A")
    visible_hw = np.asarray(alpha) > 0
    if visible_hw.all():
        return _brightest(rgba)
    if not _is_white_on_black(rgba, visible_hw):
        return alpha
    brightest_hw = np.asarray(_brightest(rgba))
    # The ground need not be exactly black.
    return Image.fromarray(np.where(visible_hw & (brightest_hw > _FAINT), brightest_hw, 0).astype(np.uint8))


def to_rgba(image: Image.Image) -> Image.Image:
    """Convert an image with transparency to RGBA.

    Raises:
        TypeError, ValueError: a transparent color does not fit the mode.
    """
    # La converts to no other mode.
    return (image.convert("LA") if image.mode == "La" else image).convert("RGBA")


def warn_of_unlikely(mask: Image.Image, mask_hw: npt.NDArray[np.bool_]) -> None:
    """Warn if a mask marks nearly everything, next to nothing, or mostly noise.

    Args:
        mask: from `foreground`.
        mask_hw: bool [H, W], the mask at the size that the model works on.
    """
    share = float(mask_hw.mean())
    edge = np.concatenate([mask_hw[0], mask_hw[-1], mask_hw[:, 0], mask_hw[:, -1]])
    rule = "everything that is neither black nor transparent counts"
    histogram = np.array(mask.histogram())
    faint, clear = histogram[1 : _FAINT + 1].sum(), histogram[_CLEAR:].sum()
    if share >= _MOST_OF_PHOTO:
        warn(f"the mask marks {percent(share)} of the photo as the subject: {rule}, however dark")
    elif edge.mean() >= _MOST_OF_EDGE:
        warn(
            f"the mask marks {percent(share)} of the photo as the subject, and {percent(edge.mean())} of its edge: "
            f"it seems to be inverted ({rule})"
        )
    elif share < _LEAST_OF_PHOTO:
        warn(f"the mask marks only {percent(share)} of the photo as the subject: crop the photo around the subject")
    if clear and faint > _MOST_OF_MASK * histogram[1:].sum():
        warn(
            f"{percent(faint / histogram[1:].sum())} of what the mask marks is nearly black or transparent (values "
            f"of 1 to {_FAINT} of 255) and counts as the subject: if it is noise or a soft edge, make it black"
        )


def _brightest(image: Image.Image) -> Image.Image:
    """Largest value of red, green and blue, of those that vary if any does; warns if that makes up a ground."""
    channels = {name: image.getchannel(name) for name in "RGB"}
    constant = {name: np.max(values) for name in "RGB" if np.ptp(values := np.asarray(channels[name])) == 0}
    if len(constant) == len(channels):
        return functools.reduce(ImageChops.lighter, channels.values())
    if any(value > _FAINT for value in constant.values()):
        ground = ", ".join(f"{name} = {value}" for name, value in constant.items())
        warn(f"no pixel of the mask is black: {ground} everywhere is taken as black")
    return functools.reduce(ImageChops.lighter, (channels[name] for name in channels if name not in constant))


def _is_white_on_black(rgba: Image.Image, visible_hw: npt.NDArray[np.bool_]) -> bool:
    """Whether what is visible is a mask on a black ground; warns if it may be, for that is a guess."""
    channels = [rgba.getchannel(name) for name in "RGB"]
    black_hw = visible_hw & (np.asarray(functools.reduce(ImageChops.lighter, channels)) <= _FAINT)
    white_hw = visible_hw & (np.asarray(functools.reduce(ImageChops.darker, channels)) >= 255 - _FAINT)
    visible, black, white = (int(region_hw.sum()) for region_hw in (visible_hw, black_hw, white_hw))
    if black in (0, visible):
        return False
    is_white = white >= _MOSTLY_WHITE * (visible - black)
    black_edge = bool(black_hw[visible_hw & _beside(~visible_hw)].mean() >= _BLACK_EDGE)
    part = percent(black / visible)
    if is_white and black_edge:
        warn(
            f"the mask is partly transparent, and {part} of what is visible is black: taken as background "
            "(fill it with another color if it belongs to the subject)"
        )
    elif is_white or black_edge:
        warn(
            f"the mask is partly transparent, and {part} of what is visible is black: taken as the subject's, like all "
            "that is visible (fill the transparent part with black if it is background)"
        )
    return is_white and black_edge


def _beside(region_hw: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Pixels with one of their four neighbours in the region."""
    padded = np.pad(region_hw, 1)
    return padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]


def percent(share: float) -> str:
    """A share that neither reads as 0 nor as 100 % unless it is."""
    percent = 100 * share
    if percent == 100:
        return "100 %"
    return f"{percent:.2g} %" if percent < 1 else f"{min(percent, 99.9):.1f} %"
