"""Image files without the parts that no pixel depends on, for a second try at what Pillow refused.

Pillow refuses a whole JPEG, PNG, WebP or AVIF file when a text, a profile or Exif data in it is damaged.
"""

import math
import re
import struct
import zlib
from types import MappingProxyType
from typing import BinaryIO

_JPEG_PREFIX = b"\xff\xd8"
# The markers of a JPEG file's application data and comments, and of its pixels.
_JPEG_OPTIONAL, _JPEG_PIXELS = (*range(0xE0, 0xF0), 0xFE), 0xDA
# Those that tell how colors are stored (JFIF, Adobe), and their least lengths.
_JPEG_COLORS = MappingProxyType({0xE0: 18, 0xEE: 16})
_PNG_PREFIX = b"\x89PNG\r\n\x1a\n"
_PNG_COLOR_TYPE = slice(25, 26)
# In the name of a PNG chunk: the decoder may ignore it.
_PNG_ANCILLARY = 0x20
# ICC, Exif and XMP in the flags of a WebP file's header.
_WEBP_METADATA_FLAGS = 0x20 | 0x08 | 0x04
_AVIF_BRANDS = (b"avif", b"avis", b"mif1", b"msf1")
# An entry of the item list of an AVIF file, up to its type: versions 2 and 3 differ in the size of the identifier.
_AVIF_METADATA_ITEM = re.compile(rb"(infe(?:\x02.{7}|\x03.{9}))(?:Exif|mime)", re.DOTALL)


def without_metadata(stream: BinaryIO) -> tuple[bytes, bytes] | None:
    """Leave out whatever decoders may ignore.

    Args:
        stream: a file at its start.

    Returns:
        The rest of the file, which may still be damaged, and the Exif data that was left out, empty if there is none or
        if the file states its orientation elsewhere, as AVIF does. None for other formats than those four.
    """
    prefix = stream.read(12)
    if prefix.startswith(_JPEG_PREFIX):
        return _jpeg(prefix + stream.read())
    if prefix.startswith(_PNG_PREFIX):
        return _png(prefix + stream.read())
    if prefix[:4] == b"RIFF" and prefix[8:] == b"WEBP":
        return _webp(prefix + stream.read())
    if prefix[4:8] == b"ftyp" and prefix[8:] in _AVIF_BRANDS:
        return _AVIF_METADATA_ITEM.sub(rb"\1skip", prefix + stream.read()), b""
    return None


def _jpeg(data: bytes) -> tuple[bytes, bytes]:
    kept, exif, position = [_JPEG_PREFIX], b"", len(_JPEG_PREFIX)
    while position + 4 <= len(data) and data[position] == 0xFF and data[position + 1] != _JPEG_PIXELS:
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        segment = data[position:end]
        # Decoders ignore a segment of colors that is too short; Pillow refuses it.
        if segment[1] not in _JPEG_OPTIONAL or len(segment) >= _JPEG_COLORS.get(segment[1], math.inf):
            kept.append(segment)
        elif segment[4:10] == b"Exif\0\0":
            exif = exif or segment[4:]
        position = end
    return b"".join((*kept, data[position:])), exif


def _png(data: bytes) -> tuple[bytes, bytes]:
    kept, exif, position = [_PNG_PREFIX], b"", len(_PNG_PREFIX)
    while position + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, position)
        chunk = data[position : position + 12 + length]
        if not name[0] & _PNG_ANCILLARY or (name == b"tRNS" and _is_intact(chunk, data[_PNG_COLOR_TYPE])):
            kept.append(chunk)
        elif name == b"eXIf":
            exif = chunk[8 : 8 + length]
        position += 12 + length
    return b"".join(kept), exif


def _is_intact(transparency: bytes, color_type: bytes) -> bool:
    content, checksum = transparency[4:-4], transparency[-4:]
    length = len(content) - 4
    fits = {b"\0": length == 2, b"\2": length == 6, b"\3": length <= 256}.get(color_type, False)
    return fits and zlib.crc32(content).to_bytes(4, "big") == checksum


def _webp(data: bytes) -> tuple[bytes, bytes]:
    kept, exif, position = [b"WEBP"], b"", 12
    while position + 8 <= len(data):
        name, length = struct.unpack_from("<4sI", data, position)
        end = position + 8 + length + length % 2
        chunk = bytearray(data[position:end])
        if name == b"VP8X":
            chunk[8:9] = bytes(flags & ~_WEBP_METADATA_FLAGS for flags in chunk[8:9])
        if name in (b"VP8X", b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF"):
            kept.append(bytes(chunk))
        elif name == b"EXIF":
            exif = bytes(chunk[8 : 8 + length])
        position = end
    content = b"".join(kept)
    return b"RIFF" + (len(content) % 2**32).to_bytes(4, "little") + content, exif
