"""Small pictures and files for the tests of photos and masks."""

import struct
import zlib

import numpy as np
from PIL import Image, ImageDraw


def gradient(width: int = 30, height: int = 20) -> Image.Image:
    """RGB, different in every pixel and channel."""
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x * 8, y * 12, (x + y) * 4], axis=-1).astype(np.uint8))


def subject_mask(width: int = 30, height: int = 20) -> Image.Image:
    mask = Image.new("L", (width, height))
    ImageDraw.Draw(mask).rectangle((5, 5, 14, 14), fill=255)
    return mask


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""

    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(b"\0")) + png_chunk(b"IEND", b"")


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def exif(entries: list[tuple[int, int, int, bytes]], order: str = "<") -> bytes:
    """Exif data of one directory; an entry is its tag, type, count and four bytes of value or offset."""
    data = {"<": b"II", ">": b"MM"}[order] + struct.pack(order + "HIH", 42, 8, len(entries))
    for tag, kind, count, value in entries:
        data += struct.pack(order + "HHI", tag, kind, count) + value
    return data + bytes(4)
