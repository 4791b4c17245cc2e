"""Open, decode and turn upright one image, from a file or from Pillow."""

import os
import stat
import struct
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from moma_rt.errors import InputError
from moma_rt.inputs.containers import without_metadata
from moma_rt.inputs.orientation import TURNS, image_orientation
from moma_rt.messages import first_line

MAX_PIXELS = 64_000_000
# An allowlist, because Pillow passes some formats to other programs (EPS to Ghostscript).
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")

ImageSource = str | Path | Image.Image

# The key of `Image.info` with the orientation that was applied: 1 to 8, or None if the image said nothing.
ORIENTATION_KEY = "moma_rt orientation"

# The part of a file by which Pillow's plugins recognize their format.
_PREFIX_BYTES = 16


def read_image(source: object, role: str) -> Image.Image:
    """Read an image of any mode, upright; its `info` has `ORIENTATION_KEY`.

    Metadata that is damaged is ignored.

    Args:
        source: a path or a Pillow image, which is not changed.
        role: names it in errors, with its path if it has one.

    Raises:
        InputError: neither a path nor a Pillow image, no such file, a device or pipe, not an image, truncated, or more
            than `MAX_PIXELS` pixels.
    """
    if isinstance(source, Image.Image):
        return _decode(source, f"the {role}", None)
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
        image, orientation = _open(stream, name)
        return _decode(image, name, orientation)


def decode_error(name: str, error: Exception) -> InputError:
    """Error for an image whose pixels cannot be decoded."""
    return InputError(f"{name} is damaged and cannot be decoded: {first_line(error)}")


def _open(stream: BinaryIO, name: str) -> tuple[Image.Image, int | None]:
    """`Image.open` without its warnings, which cannot be silenced for a single thread, and the file's orientation.

    Pillow warns about damaged metadata, which it does not see here, and about large images, which exceed this module's
    own limit.
    """
    Image.init()
    refusal: InputError | None = None
    try:
        prefix = stream.read(_PREFIX_BYTES)
        for kind in FORMATS:
            factory, accepts = Image.OPEN.get(kind, (None, None))
            accepted = accepts is None or accepts(prefix)
            # A text means that Pillow was built without the decoder.
            if factory is None or isinstance(accepted, str) or not accepted:
                continue
            bare, orientation = without_metadata(stream, kind)
            try:
                return factory(bare, ""), orientation
            except (SyntaxError, IndexError, TypeError, struct.error) as error:
                refusal = InputError(f"{name} starts as {kind} but cannot be decoded: {first_line(error)}")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise InputError(f"{name} is too large: at most {MAX_PIXELS // 10**6} million pixels") from None
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror or error}") from None
    except Exception as error:
        raise decode_error(name, error) from None
    raise refusal or InputError(f"{name} is not an image of a known format ({', '.join(FORMATS)})")


def _decode(image: Image.Image, name: str, orientation: int | None) -> Image.Image:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise InputError(
            f"{name} is too large: {width}x{height} pixels, at most {MAX_PIXELS // 10**6} million are accepted"
        )
    if width * height == 0:
        raise InputError(f"{name} has no pixels: its size is {width}x{height}")
    # Pillow itself turns a TIFF file while it loads it, and forgets the orientation.
    stored = orientation or image_orientation(image)
    # Decoders raise all kinds of errors for malformed files: OSError, SyntaxError, struct.error, ValueError, ...
    try:
        image.load()
    except Exception as error:
        raise decode_error(name, error) from None
    left = orientation or image_orientation(image)
    turn = TURNS.get(left or 1)
    upright = image.copy() if turn is None else image.transpose(turn)
    upright.info[ORIENTATION_KEY] = stored or left
    return upright
