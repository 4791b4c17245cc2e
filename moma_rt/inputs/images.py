"""Photos and masks: read a user's image files and prepare the arrays the networks take.

Any Pillow mode is accepted, and each image's own EXIF or XMP orientation is applied. RGB photos and gray masks are
processed exactly as in MoMA; modes that MoMA cannot read are converted to these first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont, ImageOps

from moma_rt.errors import InputError
from moma_rt.inputs.masks import foreground, percent, to_rgba, warn_of_unlikely
from moma_rt.inputs.reading import (
    ORIENTATION_KEY,
    SIDEWAYS,
    TURNS,
    ImageSource,
    decode_error,
    pillow_warnings_ignored,
    read_image,
)
from moma_rt.messages import warn

MAX_ASPECT_DIFFERENCE = 0.02
VISION_SIZE = 336

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# The key of `Image.info` with a transparent photo's alpha channel.
_ALPHA_KEY = "moma_rt alpha"
# Less of what the mask marks than this is visible in the photo.
_LEAST_VISIBLE = 0.5
_THUMBNAIL_SIDE = 256
_SHEET_COLUMNS = 4
_SHEET_MARGIN = 12
_SHEET_LABEL = 24


@dataclass(frozen=True, eq=False)
class PreparedImages:
    """A photo and its mask as the networks take them; H = W = the `size` given to `prepare`.

    Attributes:
        photo_chw: float32 [1, 3, H, W] in [-1, 1], the photo itself, squashed to the square.
        mask_hw: bool [H, W], true on the subject.
        pixels: float32 [1, 3, vision_size, vision_size], the subject on white, in CLIP's normalization.
        photo_hwc: uint8 [h, w, RGB], a thumbnail in the photo's own aspect ratio, for people.
    """

    photo_chw: npt.NDArray[np.float32]
    mask_hw: npt.NDArray[np.bool_]
    pixels: npt.NDArray[np.float32]
    photo_hwc: npt.NDArray[np.uint8]


def load_photo(source: ImageSource) -> Image.Image:
    """Read a photo of any mode as RGB, upright.

    Transparent pixels are composited over white, as MoMA shows the subject itself on white. 16-bit, 32-bit and
    float images are scaled to 8 bits from the smallest of the ranges 1 (float only), 255, 65535 that holds them.

    Raises:
        InputError: neither a path nor a Pillow image, no such file, a device or pipe, not an image, truncated, or more
            than `moma_rt.inputs.reading.MAX_PIXELS` pixels.
    """
    image = read_image(source, "photo")
    info: dict[str | tuple[int, int], Any] = {ORIENTATION_KEY: image.info[ORIENTATION_KEY]}
    with pillow_warnings_ignored():
        try:
            if image.mode.startswith(("I", "F")):
                image = _scaled_to_8_bits(image)
            if image.has_transparency_data:
                image = to_rgba(image)
        except (TypeError, ValueError) as error:
            raise decode_error("the photo", error) from None
        if image.mode == "RGBA":
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            info[_ALPHA_KEY] = image.getchannel("A")
            image = Image.alpha_composite(white, image)
        photo = image.convert("RGB")
    photo.info = info
    return photo


def load_mask(source: ImageSource) -> Image.Image:
    """Read a mask of any mode as 8-bit gray ("L"), upright; any value above 0 belongs to the subject.

    Whatever is neither black nor transparent belongs to the subject; of a cut-out, everything visible. See
    `moma_rt.inputs.masks`.

    Warns:
        MomaWarning: a partly transparent mask can be understood in two ways, or no pixel is black.

    Raises:
        InputError: as `load_photo`.
    """
    image = read_image(source, "mask")
    try:
        with pillow_warnings_ignored():
            mask = foreground(image)
    except (TypeError, ValueError) as error:
        raise decode_error("the mask", error) from None
    mask.info = {ORIENTATION_KEY: image.info[ORIENTATION_KEY]}
    return mask


def prepare(photo: Image.Image, mask: Image.Image, size: int, vision_size: int = VISION_SIZE) -> PreparedImages:
    """Make the arrays of `PreparedImages` from what `load_photo` and `load_mask` return.

    Args:
        photo: mode RGB.
        mask: mode L, of the photo's aspect ratio but of any size.
        size: side of the square that the diffusion model works on, 512 for SD1.5.
        vision_size: side of the square that the vision encoder sees.

    Warns:
        MomaWarning: the mask marks nearly everything, next to nothing, or little of what is visible in the photo; or it
            fits the photo both upright and as it is stored, and only one of them has an orientation.

    Raises:
        InputError: the aspect ratios differ by more than `MAX_ASPECT_DIFFERENCE`, or the mask has no foreground.
    """
    _check_aspect(photo, mask)
    _warn_if_one_is_turned(photo, mask)
    if mask.getbbox() is None:
        raise InputError(
            "the mask has no foreground: it is black or transparent everywhere (mark the subject in white)"
        )
    square = (size, size)
    mask_hw = np.asarray(mask.resize(square, Image.Resampling.BILINEAR)) > 0
    if not mask_hw.any():
        raise InputError(f"the mask has no foreground left at {size}x{size} pixels: the marked subject is too small")
    warn_of_unlikely(mask, mask_hw)
    if (alpha := photo.info.get(_ALPHA_KEY)) is not None:
        _warn_if_invisible(alpha, mask_hw)
    photo_hwc = np.asarray(photo.resize(square, Image.Resampling.BILINEAR))
    photo_chw = (photo_hwc.astype(np.float32) / 255 * 2 - 1).transpose(2, 0, 1)[np.newaxis]

    on_white = Image.fromarray(np.where(mask_hw[:, :, np.newaxis], photo_hwc, 255).astype(np.uint8))
    vision_hwc = np.asarray(on_white.resize((vision_size, vision_size), Image.Resampling.BICUBIC), dtype=np.float64)
    pixels = ((vision_hwc / 255 - _CLIP_MEAN) / _CLIP_STD).transpose(2, 0, 1)[np.newaxis]

    thumbnail = photo.copy()
    thumbnail.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
    return PreparedImages(
        photo_chw=np.ascontiguousarray(photo_chw),
        mask_hw=mask_hw,
        pixels=np.ascontiguousarray(pixels, dtype=np.float32),
        photo_hwc=np.array(thumbnail),
    )


def contact_sheet(items: Sequence[tuple[str, Image.Image]], side: int = 256) -> Image.Image:
    """Lay out labeled pictures in rows of four, each fitted into a square of `side` pixels; RGB.

    Labels that are wider than their tile are truncated.

    Raises:
        ValueError: `items` is empty.
    """
    if not items:
        raise ValueError("a contact sheet needs at least one picture")
    columns = min(len(items), _SHEET_COLUMNS)
    rows = -(-len(items) // columns)
    cell_width, cell_height = side + _SHEET_MARGIN, side + _SHEET_LABEL + _SHEET_MARGIN
    sheet = Image.new("RGB", (columns * cell_width + _SHEET_MARGIN, rows * cell_height + _SHEET_MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(14)
    for index, (label, image) in enumerate(items):
        left = _SHEET_MARGIN + index % columns * cell_width
        top = _SHEET_MARGIN + index // columns * cell_height
        tile = ImageOps.pad(image.convert("RGB"), (side, side), Image.Resampling.BICUBIC, color=(224, 224, 224))
        sheet.paste(tile, (left, top))
        text = " ".join(label.split())
        if draw.textlength(text, font) > side:
            while text and draw.textlength(text + "…", font) > side:
                text = text[:-1]
            text += "…"
        draw.text((left, top + side + 3), text, "black", font)
    return sheet


def _scaled_to_8_bits(image: Image.Image) -> Image.Image:
    values = np.nan_to_num(np.asarray(image).astype(np.float64), posinf=65535.0, neginf=0.0)
    if image.mode.startswith("I;16"):
        top = 65535.0
    else:
        ranges = (1.0, 255.0) if image.mode == "F" else (255.0,)
        top = next((r for r in ranges if values.max() <= r), 65535.0)
    gray = Image.fromarray(np.rint(np.clip(values / top, 0, 1) * 255).astype(np.uint8))
    if (transparent := image.info.get("transparency")) is not None:
        gray.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return gray


def _aspect_fits(photo_size: tuple[int, int], mask_size: tuple[int, int]) -> bool:
    ratio = (mask_size[0] / mask_size[1]) / (photo_size[0] / photo_size[1])
    return abs(ratio - 1) <= MAX_ASPECT_DIFFERENCE


def _check_aspect(photo: Image.Image, mask: Image.Image) -> None:
    if _aspect_fits(photo.size, mask.size):
        return
    hint = ""
    if _aspect_fits(photo.size, mask.size[::-1]):
        orientations = [(name, image.info.get(ORIENTATION_KEY)) for name, image in (("photo", photo), ("mask", mask))]
        turned = [f"the {name} was turned by its EXIF orientation" for name, value in orientations if value in SIDEWAYS]
        hint = "; ".join(["; it seems turned by 90 degrees", *turned])
    raise InputError(
        f"the mask's aspect ratio is not the photo's: the photo is {photo.width}x{photo.height}, "
        f"the mask {mask.width}x{mask.height}{hint}"
    )


def _warn_if_one_is_turned(photo: Image.Image, mask: Image.Image) -> None:
    """Warn if one was turned by its orientation, the other has none, and they would also fit as they are stored."""
    orientations = {"photo": photo.info.get(ORIENTATION_KEY), "mask": mask.info.get(ORIENTATION_KEY)}
    turned = next((name for name, orientation in orientations.items() if orientation in TURNS), None)
    if turned is None or None not in orientations.values():
        return
    if orientations[turned] in SIDEWAYS and not _aspect_fits(photo.size, mask.size[::-1]):
        return
    other = "mask" if turned == "photo" else "photo"
    warn(
        f"the {turned} was turned upright by its EXIF orientation ({orientations[turned]}), the {other} has none and "
        "was not turned: if the mask was made from the photo without turning it, it marks the wrong place; "
        "save both without an orientation, turned alike"
    )


def _warn_if_invisible(alpha: Image.Image, mask_hw: npt.NDArray[np.bool_]) -> None:
    visible_hw = np.asarray(alpha.resize(mask_hw.shape[::-1], Image.Resampling.BILINEAR)) > 0
    share = float(visible_hw[mask_hw].mean())
    if share < _LEAST_VISIBLE:
        warn(
            f"only {percent(share)} of what the mask marks is visible, the rest of the photo there is transparent: "
            "check that the mask is not inverted"
        )
