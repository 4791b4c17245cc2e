"""Image files without their metadata: what remains is the part that pixels are decoded from.

Pillow parses Exif data, color profiles, texts and thumbnails while it opens a file, and refuses a picture, or warns,
when any of them is damaged. Nothing in them matters here but the orientation, which is read on the way.
"""

import contextlib
import io
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from PIL import TiffTags

from moma_rt.inputs.orientation import (
    Directory,
    Entry,
    exif_orientation,
    profile_orientation,
    read_directory,
    xmp_orientation,
)
from moma_rt.inputs.spliced import Part, SourceFile, SplicedFile

# Bytes of a metadata block that are searched for the orientation.
_MAX_METADATA = 1 << 20
# The TIFF tags that pixels are decoded with: layout, compression, colors, tiles, JPEG tables, YCbCr, LERC.
_TIFF_TAGS = frozenset(
    {*range(256, 260), 262, 266, 273, *range(277, 280), 284, 292, 293, 317, 320, *range(322, 326), 332, 338, 339, 347}
    | {*range(512, 522), *range(529, 533), 50674}
)
# Those that can be left out without changing a pixel: byte counts, and colors as they usually are.
_TIFF_OPTIONAL = frozenset({279, 325, 529, 532})
_SAMPLES_TAG, _XMP_TAG = 277, 700
_MAX_SAMPLES = 6
_PNG_PREFIX = b"\x89PNG\r\n\x1a\n"
_PNG_TEXT_KEYS = (b"Raw profile type exif", b"Raw profile type APP1")
_XMP_PREFIX = b"http://ns.adobe.com/xap/1.0/\0"
# ICC, Exif and XMP in the flags of a WebP file's header.
_WEBP_METADATA_FLAGS = 0x20 | 0x08 | 0x04


@dataclass
class Content:
    """Parts of a file that are kept, as bytes or as ranges of the file, and the metadata that was left out."""

    parts: list[Part] = field(default_factory=list)
    exif: bytes = b""
    profile: bytes = b""
    xmp: bytes = b""
    tag: int | None = None

    def keep(self, start: int, end: int) -> None:
        if end <= start:
            return
        last = self.parts[-1] if self.parts else None
        if isinstance(last, tuple) and last[1] == start:
            self.parts[-1] = (last[0], end)
        else:
            self.parts.append((start, end))

    @property
    def orientation(self) -> int | None:
        return self.tag or exif_orientation(self.exif) or profile_orientation(self.profile) or xmp_orientation(self.xmp)


def without_metadata(stream: BinaryIO, kind: str) -> tuple[BinaryIO, int | None]:
    """Hide the metadata of an image file.

    Args:
        stream: the whole file.
        kind: Pillow's name of its format.

    Returns:
        The file without metadata, as a stream that reads from `stream`; `stream` itself for a format that has none, or
        if its structure is not understood. And the file's orientation, 1 to 8; None if there is none.

    Raises:
        ValueError: the file is damaged in a part that pixels are decoded with.
    """
    read = _READERS.get(kind)
    size = stream.seek(0, io.SEEK_END)
    if read is not None:
        with contextlib.suppress(struct.error):
            content = read(SourceFile(stream, size))
            return io.BufferedReader(SplicedFile(stream, content.parts)), content.orientation
    stream.seek(0)
    return stream, None


def _jpeg(file: SourceFile) -> Content:
    """Drop all application segments and comments but those that tell how colors are stored."""
    content = Content([b"\xff\xd8"])
    position = 2
    while len(head := file.at(position, 4)) == 4:
        marker = head[1]
        if head[0] != 0xFF:
            position = _find(file, position, b"\xff")
        elif marker == 0xFF:
            position += 1
        elif marker in (0, 1) or 0xD0 <= marker <= 0xD8:
            position += 2
        elif marker in (0xD9, 0xDA) or marker < 0xC0:
            break
        else:
            end = position + 2 + int.from_bytes(head[2:], "big")
            if not (0xE0 <= marker <= 0xEF or marker == 0xFE):
                content.keep(position, min(end, file.size))
            else:
                data = file.at(position + 4, max(0, end - position - 4))
                if (marker == 0xE0 and data.startswith(b"JFIF\0") and len(data) >= 14) or (
                    marker == 0xEE and data.startswith(b"Adobe") and len(data) >= 12
                ):
                    content.keep(position, min(end, file.size))
                elif marker == 0xE1 and data.startswith(b"Exif\0\0"):
                    content.exif = content.exif or data
                elif marker == 0xE1 and data.startswith(_XMP_PREFIX):
                    content.xmp = content.xmp or data
            position = max(end, position + 2)
    content.keep(min(position, file.size), file.size)
    return content


def _find(file: SourceFile, position: int, byte: bytes) -> int:
    while block := file.at(position, 1 << 16):
        if (found := block.find(byte)) >= 0:
            return position + found
        position += len(block)
    return file.size


def _png(file: SourceFile) -> Content:
    """Keep the critical chunks, whose names are capitalized, and an intact tRNS."""
    content = Content([_PNG_PREFIX])
    position, color_type = len(_PNG_PREFIX), 0
    while position + 8 <= file.size:
        length, name = struct.unpack(">I4s", file.at(position, 8))
        end = position + 12 + length
        if name == b"IHDR":
            (color_type,) = file.unpack("B", position + 17)
        if name[:1].isupper() or (name == b"tRNS" and _is_intact(file, position, length, color_type)):
            content.keep(position, min(end, file.size))
        elif name == b"eXIf":
            content.exif = file.at(position + 8, min(length, _MAX_METADATA))
        elif name in (b"tEXt", b"zTXt", b"iTXt"):
            _png_text(content, name, file.at(position + 8, min(length, _MAX_METADATA)))
        position = end
        if name == b"IEND":
            break
    return content


def _is_intact(file: SourceFile, position: int, length: int, color_type: int) -> bool:
    """Whether a tRNS chunk is one that libpng accepts; it ignores others."""
    fits = {0: length == 2, 2: length == 6, 3: 0 < length <= 256}.get(color_type, False)
    (checksum,) = file.unpack(">I", position + 8 + length)
    return fits and zlib.crc32(file.at(position + 4, 4 + length)) == checksum


def _png_text(content: Content, name: bytes, data: bytes) -> None:
    key, _, text = data.partition(b"\0")
    compressed = name == b"zTXt"
    if name == b"iTXt":
        compressed = text[:1] == b"\1"
        text = b"".join(text[2:].split(b"\0", 2)[2:])
    elif compressed:
        text = text[1:]
    if key not in (*_PNG_TEXT_KEYS, b"exif", b"XML:com.adobe.xmp"):
        return
    if compressed:
        try:
            text = zlib.decompressobj().decompress(text, _MAX_METADATA)
        except zlib.error:
            return
    if key == b"exif":
        content.exif = content.exif or text
    elif key in _PNG_TEXT_KEYS:
        content.profile = content.profile or text
    else:
        content.xmp = content.xmp or text


def _webp(file: SourceFile) -> Content:
    """Keep the header, pixels and animation."""
    content, position, length = Content(), 12, 4
    while position + 8 <= file.size:
        name, size = struct.unpack("<4sI", file.at(position, 8))
        end = position + 8 + size + size % 2
        if name == b"VP8X":
            header = bytearray(file.at(position, end - position))
            header[8] &= ~_WEBP_METADATA_FLAGS
            content.parts.append(bytes(header))
            length += end - position
        elif name in (b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF"):
            content.keep(position, min(end, file.size))
            length += end - position
        elif name == b"EXIF":
            content.exif = content.exif or file.at(position + 8, min(size, _MAX_METADATA))
        elif name == b"XMP ":
            content.xmp = content.xmp or file.at(position + 8, min(size, _MAX_METADATA))
        position = end
    content.parts.insert(0, struct.pack("<4sI4s", b"RIFF", min(length, 2**32 - 1), b"WEBP"))
    return content


def _tiff(file: SourceFile) -> Content:
    """Keep the entries of the first directory that pixels are decoded with, and no other directory.

    Raises:
        ValueError: such an entry is damaged: Pillow would decode other pixels without it.
    """
    directory = read_directory(file.stream)
    if not directory.complete:
        raise ValueError("its TIFF directory is cut off")
    content = Content(tag=directory.orientation)
    kept: dict[int, bytes] = {}
    for entry in directory.entries:
        if entry.tag == _XMP_TAG and entry.intact and entry.offset is not None:
            content.xmp = file.at(entry.offset, min(entry.size, _MAX_METADATA))
        elif entry.tag not in _TIFF_TAGS or entry.tag in kept:
            continue
        elif entry.tag == _SAMPLES_TAG and (entry.value or 0) > _MAX_SAMPLES:
            # Pillow would also log this to stderr.
            raise ValueError(f"it has {entry.value:.0f} samples per pixel")
        elif entry.intact:
            kept[entry.tag] = _single(directory, entry)
        elif entry.tag not in _TIFF_OPTIONAL:
            raise ValueError(f"its TIFF tag {entry.tag} ({TiffTags.lookup(entry.tag).name}) cannot be read")
    count_size, field_size = (8, 8) if directory.big else (2, 4)
    table = len(kept).to_bytes(count_size, "little" if directory.order == "<" else "big")
    table += b"".join(kept.values()) + bytes(field_size)
    content.keep(0, directory.start)
    content.parts.append(table)
    content.keep(directory.start + len(table), file.size)
    return content


def _single(directory: Directory, entry: Entry) -> bytes:
    """The entry with its first value only, if its tag has a single one by definition: Pillow warns about others."""
    is_text = entry.kind in (TiffTags.BYTE, TiffTags.ASCII, TiffTags.UNDEFINED)
    if entry.count == 1 or is_text or TiffTags.lookup(entry.tag).length != 1:
        return entry.raw
    layout = directory.order + ("Q" if directory.big else "L")
    return entry.raw[:4] + struct.pack(layout, 1) + entry.data.ljust(struct.calcsize(layout), b"\0")


def _boxes(file: SourceFile, position: int, end: int) -> Iterator[tuple[bytes, int, int, int]]:
    """Name, start, start of the content, and end of each ISO box."""
    while position + 8 <= end:
        size, name = struct.unpack(">I4s", file.at(position, 8))
        body = position + 8
        if size == 1:
            (size,) = file.unpack(">Q", body)
            body += 8
        stop = end if size == 0 else position + size
        if stop < body or stop > end:
            raise struct.error("a box exceeds its parent")
        yield name, position, body, stop
        position = stop


def _avif(file: SourceFile) -> Content:
    """Rename the items that hold metadata: decoders ignore unknown ones. The orientation is a property of the image."""
    renamed = []
    for name, _, body, end in _boxes(file, 0, file.size):
        if name == b"meta":
            for inner, _, inner_body, inner_end in _boxes(file, body + 4, end):
                if inner == b"iinf":
                    count_size = 2 if file.at(inner_body, 1) == b"\0" else 4
                    for entry, _, start, _ in _boxes(file, inner_body + 4 + count_size, inner_end):
                        kind = start + (8 if file.at(start, 1) == b"\2" else 10)
                        if entry == b"infe" and file.at(kind, 4) in (b"Exif", b"mime"):
                            renamed.append(kind)
    content, position = Content(), 0
    for kind in renamed:
        content.keep(position, kind)
        content.parts.append(b"skip")
        position = kind + 4
    content.keep(position, file.size)
    return content


def _jpeg2000(file: SourceFile) -> Content:
    """Keep the header without its resolution, and the code stream."""
    content = Content()
    if file.at(0, 2) == b"\xff\x4f":
        content.keep(0, file.size)
        return content
    for name, start, body, end in _boxes(file, 0, file.size):
        if name == b"jp2h":
            kept = [(s, e) for inner, s, _, e in _boxes(file, body, end) if inner != b"res "]
            content.parts.append(struct.pack(">I4s", 8 + sum(e - s for s, e in kept), name))
            for inner_start, inner_end in kept:
                content.keep(inner_start, inner_end)
        elif name in (b"jP  ", b"ftyp", b"jp2c"):
            content.keep(start, end)
    return content


def _gif(file: SourceFile) -> Content:
    """Drop the comments and application data before the first picture; later pictures are not read."""
    content = Content()
    header = file.at(0, 13)
    width, height, flags = struct.unpack_from("<HHB", header, 6)
    position = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    content.keep(13, position)
    while file.at(position, 1) == b"!":
        end = position + 2
        while length := file.at(end, 1).strip(b"\0"):
            end += 1 + length[0]
        if file.at(position + 1, 1) == b"\xf9":
            content.keep(position, end + 1)
        position = end + 1
    if file.at(position, 1) == b",":
        # Pillow enlarges the screen for a picture that exceeds it, and warns if that makes it very large.
        left, top, frame_width, frame_height = file.unpack("<4H", position + 1)
        width, height = max(width, left + frame_width), max(height, top + frame_height)
    screen = (min(side, 0xFFFF) for side in (width, height))
    content.parts.insert(0, header[:6] + struct.pack("<HH", *screen) + header[10:])
    content.keep(position, file.size)
    return content


_READERS: dict[str, Callable[[SourceFile], Content]] = {
    "AVIF": _avif,
    "GIF": _gif,
    "JPEG": _jpeg,
    "JPEG2000": _jpeg2000,
    "PNG": _png,
    "TIFF": _tiff,
    "WEBP": _webp,
}
