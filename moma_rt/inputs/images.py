"""Photos and masks: read a user's image files and prepare the arrays the networks take.

Any Pillow mode is accepted, and each image's own EXIF orientation is applied. RGB photos and RGB or gray masks are
processed exactly as in MoMA; modes that MoMA cannot read are converted to these first.
"""

import contextlib
import os
import stat
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont, ImageOps

from moma_rt.errors import InputError
from moma_rt.messages import first_line

MAX_PIXELS = 64_000_000
MAX_ASPECT_DIFFERENCE = 0.02
VISION_SIZE = 336
# An allowlist, because Pillow passes some formats to other programs (EPS to Ghostscript).
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")

ImageSource = str | Path | Image.Image

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")
# The part of a file by which Pillow's plugins recognize their format.
_PREFIX_BYTES = 16
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
            than `MAX_PIXELS` pixels.
    """
    image = _read(source, "photo")
    if _is_wide(image):
        return _scaled_to_8_bits(image).convert("RGB")
    if _has_alpha(image):
        image = _rgba(image, "photo")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def load_mask(source: ImageSource) -> Image.Image:
    """Read a mask of any mode as 8-bit gray ("L"), upright; any value above 0 is foreground.

    The mask is the first channel of its RGB form, or the alpha channel if that varies and the first does not.

    Raises:
        InputError: as `load_photo`.
    """
    image = _read(source, "mask")
    if _is_wide(image):
        # Scaling to 8 bits would lose small values such as the labels 0 and 1, and any positive value counts.
        return Image.fromarray(np.where(np.asarray(image) > 0, 255, 0).astype(np.uint8))
    if _has_alpha(image):
        image = _rgba(image, "mask")
        first, alpha = image.getchannel("R"), image.getchannel("A")
        return alpha if _is_constant(first) and not _is_constant(alpha) else first
    return image.convert("RGB").getchannel("R")


def prepare(photo: Image.Image, mask: Image.Image, size: int, vision_size: int = VISION_SIZE) -> PreparedImages:
    """Make the arrays of `PreparedImages` from what `load_photo` and `load_mask` return.

    Args:
        photo: mode RGB.
        mask: mode L, of the photo's aspect ratio but of any size.
        size: side of the square that the diffusion model works on, 512 for SD1.5.
        vision_size: side of the square that the vision encoder sees.

    Raises:
        InputError: the aspect ratios differ by more than `MAX_ASPECT_DIFFERENCE`, or the mask has no foreground.
    """
    _check_aspect(photo.size, mask.size)
    if mask.getbbox() is None:
        raise InputError("the mask has no foreground: its first channel is 0 everywhere (mark the subject in white)")
    square = (size, size)
    mask_hw = np.asarray(mask.resize(square, Image.Resampling.BILINEAR)) > 0
    if not mask_hw.any():
        raise InputError(f"the mask has no foreground left at {size}x{size} pixels: the marked subject is too small")
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


def _read(source: object, role: str) -> Image.Image:
    """Open, check and decode an image, and turn it upright. `role` names it in errors, with its path if it has one."""
    if isinstance(source, Image.Image):
        return _decode(source, f"the {role}")
    if not isinstance(source, str | os.PathLike):
        # The argument of `Runtime.enroll` is called image.
        argument = {"photo": "image"}.get(role, role)
        raise InputError(f"{argument} must be a path or a Pillow image, not {type(source).__name__}")
    name = f"{role} {os.fspath(source)!s}"
    try:
        # Opening a pipe would wait for its other end.
        mode = os.stat(source).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise InputError(f"{name} cannot be read: it is a device or pipe, not a file")
        stream = open(source, "rb")  # noqa: SIM115 - closed below, where other errors are expected
    except FileNotFoundError:
        raise InputError(f"{name} does not exist") from None
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise InputError(f"{name} cannot be read: {error}") from None
    with stream:
        return _decode(_open(stream, name), name)


def _open(stream: BinaryIO, name: str) -> Image.Image:
    """`Image.open` without its warning about large images, which cannot be silenced for a single thread.

    Such images exceed this module's own limit, which raises an error of one line.
    """
    Image.init()
    try:
        prefix = stream.read(_PREFIX_BYTES)
        for kind in FORMATS:
            factory, accepts = Image.OPEN.get(kind, (None, None))
            accepted = accepts is None or accepts(prefix)
            # A text means that Pillow was built without the decoder.
            if factory is None or isinstance(accepted, str) or not accepted:
                continue
            stream.seek(0)
            with contextlib.suppress(SyntaxError, IndexError, TypeError, struct.error):
                return factory(stream, "")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise InputError(f"{name} is too large: at most {MAX_PIXELS // 10**6} million pixels") from None
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror or error}") from None
    except Exception as error:
        raise _decode_error(name, error) from None
    raise InputError(f"{name} is not an image of a known format ({', '.join(FORMATS)})")


def _decode(image: Image.Image, name: str) -> Image.Image:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise InputError(
            f"{name} is too large: {width}x{height} pixels, at most {MAX_PIXELS // 10**6} million are accepted"
        )
    if width * height == 0:
        raise InputError(f"{name} has no pixels: its size is {width}x{height}")
    # Decoders raise all kinds of errors for malformed files: OSError, SyntaxError, struct.error, ValueError, ...
    try:
        image.load()
        return ImageOps.exif_transpose(image)
    except Exception as error:
        raise _decode_error(name, error) from None


def _decode_error(name: str, error: Exception) -> InputError:
    return InputError(f"{name} is damaged and cannot be decoded: {first_line(error)}")


def _is_wide(image: Image.Image) -> bool:
    return image.mode.startswith(("I", "F"))


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in _ALPHA_MODES or "transparency" in image.info


def _rgba(image: Image.Image, role: str) -> Image.Image:
    if image.mode == "La":
        # La converts to no other mode.
        image = image.convert("LA")
    try:
        return image.convert("RGBA")
    except (TypeError, ValueError) as error:
        # A transparent color that does not fit the mode.
        raise _decode_error(f"the {role}", error) from None


def _is_constant(channel: Image.Image) -> bool:
    low, high = np.min(np.asarray(channel)), np.max(np.asarray(channel))
    return bool(low == high)


def _scaled_to_8_bits(image: Image.Image) -> Image.Image:
    values = np.nan_to_num(np.asarray(image).astype(np.float64), posinf=65535.0, neginf=0.0)
    if image.mode.startswith("I;16"):
        top = 65535.0
    else:
        ranges = (1.0, 255.0) if image.mode == "F" else (255.0,)
        top = next((r for r in ranges if values.max() <= r), 65535.0)
    return Image.fromarray(np.rint(np.clip(values / top, 0, 1) * 255).astype(np.uint8))


def _check_aspect(photo_size: tuple[int, int], mask_size: tuple[int, int]) -> None:
    photo_ratio, mask_ratio = photo_size[0] / photo_size[1], mask_size[0] / mask_size[1]
    if abs(mask_ratio / photo_ratio - 1) > MAX_ASPECT_DIFFERENCE:
        turned = abs(mask_ratio * photo_ratio - 1) <= MAX_ASPECT_DIFFERENCE
        hint = "; it seems turned by 90 degrees" if turned else ""
        raise InputError(
            f"the mask's aspect ratio is not the photo's: the photo is {photo_size[0]}x{photo_size[1]}, "
            f"the mask {mask_size[0]}x{mask_size[1]}{hint}"
        )
