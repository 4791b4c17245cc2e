"""Open, decode and turn upright one image, from a file or from Pillow."""

import contextlib
import io
import logging
import os
import stat
import struct
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from PIL import ExifTags, Image

from moma_rt.errors import InputError
from moma_rt.inputs.containers import without_metadata
from moma_rt.messages import first_line

MAX_PIXELS = 64_000_000
# An allowlist, because Pillow passes some formats to other programs (EPS to Ghostscript).
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Orientations that exchange width and height.
SIDEWAYS = (5, 6, 7, 8)

ImageSource = str | Path | Image.Image

# The key of `Image.info` with the orientation that was applied: 1 to 8, or None if the image said nothing.
ORIENTATION_KEY = "moma_rt orientation"

# The part of a file by which Pillow's plugins recognize their format.
_PREFIX_BYTES = 16

# Python's warning filters belong to the process, so the lock that guards them does, too: two threads that restore them
# out of order would leave one's filters behind.
_FILTERS_LOCK = threading.RLock()
# Longer than any picture takes. A process that was forked while another thread held the lock never gets it.
_FILTERS_SECONDS = 10


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
        with pillow_warnings_ignored():
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
    with stream, pillow_warnings_ignored():
        try:
            return _decode(_open(stream, name), name)
        except InputError:
            bare = _without_metadata(stream)
            if bare is None:
                raise
        data, exif = bare
        image = _open(io.BytesIO(data), name)
        if exif:
            image.info["exif"] = exif
        return _decode(image, name)


@contextlib.contextmanager
def pillow_warnings_ignored() -> Iterator[None]:
    """Show none of Pillow's own Python warnings, which tell of damaged metadata and large images, in the meantime.

    Those of other modules are shown as always, in all threads. What Pillow logs goes to the program's own handlers, if
    it has any: without one, Python prints it on stderr.
    """
    logger = logging.getLogger("PIL")
    if not logger.hasHandlers():
        logger.addHandler(logging.NullHandler())
    locked = _FILTERS_LOCK.acquire(timeout=_FILTERS_SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL(\.|$)")
            yield
    finally:
        if locked:
            _FILTERS_LOCK.release()


def decode_error(name: str, error: Exception) -> InputError:
    """Error for an image whose pixels cannot be decoded."""
    return InputError(f"{name} is damaged and cannot be decoded: {first_line(error)}")


def _open(stream: BinaryIO, name: str) -> Image.Image:
    """`Image.open` for `FORMATS`, whatever the size: this module's own limit is checked later and has its own error."""
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
            stream.seek(0)
            try:
                return factory(stream, "")
            except (SyntaxError, IndexError, TypeError, struct.error) as error:
                refusal = InputError(f"{name} starts as {kind} but cannot be decoded: {first_line(error)}")
    except Image.DecompressionBombError:
        raise InputError(f"{name} is too large: at most {MAX_PIXELS // 10**6} million pixels") from None
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror or error}") from None
    except Exception as error:
        raise decode_error(name, error) from None
    raise refusal or InputError(f"{name} is not an image of a known format ({', '.join(FORMATS)})")


def _without_metadata(stream: BinaryIO) -> tuple[bytes, bytes] | None:
    try:
        stream.seek(0)
        return without_metadata(stream)
    except OSError:
        return None


def _decode(image: Image.Image, name: str) -> Image.Image:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise InputError(
            f"{name} is too large: {width}x{height} pixels, at most {MAX_PIXELS // 10**6} million are accepted"
        )
    if width * height == 0:
        raise InputError(f"{name} has no pixels: its size is {width}x{height}")
    # Pillow turns a TIFF file itself while it loads it, and forgets the orientation. Other files may state theirs after
    # the pixels.
    stored = _orientation(image) if image.format == "TIFF" else None
    # Decoders raise all kinds of errors for malformed files: OSError, SyntaxError, struct.error, ValueError, ...
    try:
        image.load()
    except Exception as error:
        raise decode_error(name, error) from None
    left = _orientation(image)
    # ImageOps.exif_transpose would also write the Exif data anew, which fails where they are damaged.
    upright = image.transpose(TURNS[left]) if left in TURNS else image.copy()
    upright.info[ORIENTATION_KEY] = stored or left
    return upright


def _orientation(image: Image.Image) -> int | None:
    """1 to 8; None if the image says nothing, or nothing that can be read."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged metadata raises all kinds of errors, too
        return None
    return next((orientation for orientation in range(1, 9) if value == orientation), None)
