"""The orientation of an image file, from Exif or XMP data that may be damaged.

Pillow's reader is not used for this: it raises, or warns, about damage anywhere in the data.
"""

import contextlib
import io
import re
import struct
from dataclasses import dataclass
from typing import Any, BinaryIO

from PIL import Image

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
ORIENTATION_TAG = 0x0112

# struct's codes of TIFF's data types; a rational is read as its two numbers.
_TYPES = {
    1: "B",
    2: "s",
    3: "H",
    4: "L",
    5: "LL",
    6: "b",
    7: "B",
    8: "h",
    9: "l",
    10: "ll",
    11: "f",
    12: "d",
    13: "L",
    16: "Q",
    17: "q",
    18: "Q",
}
_MAX_ENTRIES = 4096
_XMP_ORIENTATION = re.compile(rb"tiff:Orientation\s*(?:=\s*[\"']|>)\s*([1-8])\s*[\"'<]")


@dataclass(frozen=True)
class Entry:
    """One entry of a TIFF directory.

    Attributes:
        kind: TIFF's number of its data type.
        value: the first value; None for a rational that is no number, for text that is no digit, and if not `intact`.
        data: its bytes.
        intact: whether there are values of a known type, inside the file.
        size: number of bytes of all values.
        offset: where they are, if not in the entry itself.
        raw: the whole entry.
    """

    tag: int
    kind: int
    count: int
    value: float | None
    data: bytes
    size: int
    offset: int | None
    intact: bool
    raw: bytes


@dataclass(frozen=True)
class Directory:
    """The first directory of a TIFF file.

    Attributes:
        order: byte order of `struct`.
        big: whether the file is a BigTIFF.
        start: position of the directory.
        complete: whether all entries that it announces are inside the file.
    """

    order: str
    big: bool
    start: int
    complete: bool
    entries: tuple[Entry, ...]

    @property
    def orientation(self) -> int | None:
        return next((_valid(entry.value) for entry in self.entries if entry.tag == ORIENTATION_TAG), None)


def read_directory(stream: BinaryIO) -> Directory:
    """Read the first directory of a TIFF file or of Exif data.

    Raises:
        struct.error: it is no TIFF data, or there is no directory where its header says.
    """
    size = stream.seek(0, io.SEEK_END)
    header = _at(stream, 0, 16)
    order = {b"II": "<", b"MM": ">"}.get(header[:2], "")
    version = struct.unpack_from(order + "H", header, 2)[0] if order else 0
    if version not in (42, 43):
        raise struct.error("no TIFF header")
    big = version == 43
    offset_code, count_code, field = ("Q", "Q", 8) if big else ("L", "H", 4)
    (start,) = struct.unpack_from(order + offset_code, header, 8 if big else 4)
    count_size = struct.calcsize(order + count_code)
    (count,) = struct.unpack(order + count_code, _at(stream, start, count_size))
    entry_size = 4 + 2 * field
    table = _at(stream, start + count_size, min(count, _MAX_ENTRIES) * entry_size)
    entries = []
    for position in range(0, len(table) // entry_size * entry_size, entry_size):
        raw = table[position : position + entry_size]
        tag, kind, values = struct.unpack_from(f"{order}HH{offset_code}", raw)
        value_size = struct.calcsize(order + _TYPES.get(kind, ""))
        data, where, value = raw[4 + field :], None, None
        if values * value_size > field:
            (where,) = struct.unpack(order + offset_code, data)
            data = _at(stream, where, value_size)
        intact = 0 < values * value_size and (where or 0) + values * value_size <= size
        if intact:
            data = data[:value_size]
            value = _number(struct.unpack(order + _TYPES[kind], data))
        entries.append(Entry(tag, kind, values, value, data, values * value_size, where, intact, raw))
    return Directory(order, big, start, len(entries) == count, tuple(entries))


def exif_orientation(exif: bytes) -> int | None:
    """Orientation, 1 to 8, in Exif data with or without its prefix; None if there is none or it cannot be read."""
    data = re.sub(b"^(Exif\0\0){1,2}", b"", exif)
    with contextlib.suppress(struct.error):
        return read_directory(io.BytesIO(data)).orientation
    return None


def xmp_orientation(xmp: bytes) -> int | None:
    """Orientation, 1 to 8, in an XMP packet; None if there is none."""
    match = _XMP_ORIENTATION.search(xmp)
    return int(match[1]) if match else None


def profile_orientation(text: bytes) -> int | None:
    """Orientation in a "Raw profile type exif", Exif data as hexadecimal text below three lines."""
    digits = b"".join(text.split(b"\n")[3:])
    try:
        return exif_orientation(bytes.fromhex(digits.decode("ascii")))
    except ValueError:
        return None


def image_orientation(image: Image.Image) -> int | None:
    """Orientation that a Pillow image still has to be turned by; None if it says nothing, or nothing readable."""
    if getattr(image, "_exif", None) is not None:
        # Pillow has parsed it already and the caller may have changed it.
        with contextlib.suppress(Exception):
            return _valid(image.getexif().get(ORIENTATION_TAG))
        return None
    if "tag_v2" in vars(image):
        return _valid(vars(image)["tag_v2"].get(ORIENTATION_TAG))
    exif, profile = image.info.get("exif"), image.info.get("Raw profile type exif")
    xmp = image.info.get("XML:com.adobe.xmp") or image.info.get("xmp")
    found = exif_orientation(exif) if isinstance(exif, bytes) else None
    if found is None and isinstance(profile, str):
        found = profile_orientation(profile.encode("ascii", "replace"))
    if found is None and xmp:
        found = xmp_orientation(xmp if isinstance(xmp, bytes) else str(xmp).encode())
    return found


def _valid(value: object) -> int | None:
    return next((orientation for orientation in range(1, 9) if value == orientation), None)


def _number(values: tuple[Any, ...]) -> float | None:
    if len(values) == 2:
        return values[0] / values[1] if values[1] else None
    value = values[0]
    if isinstance(value, bytes):
        return int(value) if value.isdigit() else None
    return float(value) if isinstance(value, float) else int(value)


def _at(stream: BinaryIO, position: int, count: int) -> bytes:
    if position >= 2**63:
        return b""
    stream.seek(position)
    return stream.read(count)
