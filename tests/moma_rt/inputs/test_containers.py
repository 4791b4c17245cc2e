import base64
import contextlib
import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, TiffImagePlugin

from moma_rt.errors import InputError
from moma_rt.inputs.containers import without_metadata
from moma_rt.inputs.images import load_mask, load_photo
from moma_rt.inputs.reading import ORIENTATION_KEY
from tests.moma_rt.inputs.pictures import exif, gradient, png_chunk, subject_mask

TURNED_EXIF = exif([(0x0112, 3, 1, struct.pack("<HH", 6, 0))])
XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
GARBAGE = b"\0\x08\0\x02\x01\x12\0\x03"
# What Pillow writes: the directory first, then the values of its entries, then the pixels.
TIFF_DIRECTORY = 8
# 30x20 gray pixels, orientation 6 and Exif data; Pillow cannot write AVIF everywhere.
AVIF = zlib.decompress(
    base64.b85decode(
        "c-"
        "mc1Jx{|h5Iv_*rKpq^7)l2y5))!*D%6Fk6eg678Od^D^`yAAQY#7@AF7JPpF(0_;ZN{SI6El=Cq2J=cedZz05FvH(eMH#P&ig7BZ"
        "XYX)94z2O;l<*RB<{_vb@g0ps?^SItH!s86#X^riBwX0D-"
        "R%*bDIq=}J8ipAn{r3qOMI3`nFweGe~2(M)IBJ0JaZXt^y>I)Fctr*bofNS4A|I#Y`#H^ld7geE@3rAh0Z$4(Qv21|5>Mi_=fZC*"
        "sPXK1_9fzVmL5LrpL?Lza3N-fN_ZBWujqc*=oZrdz)-"
        "C9w8rxNadr&)~`$8b(61jhFK0|Qkb+J~K1zjrlx3+I=^ad+^wUj2NJJ_B-jA9p@}0rZqZ76"
    )
)


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    """Any warning, Pillow's included, is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(*chunks: bytes, after: bytes = b"", image: Image.Image | None = None) -> bytes:
    """A PNG with these chunks in front of its pixels, and others after them."""
    data = encoded(image or gradient(), "PNG")
    header = data.index(b"IDAT") - 4
    return data[:header] + b"".join(chunks) + data[header:-12] + after + data[-12:]


def jpeg(*segments: tuple[int, bytes], **options: object) -> bytes:
    """A JPEG with these segments at its front."""
    data = encoded(gradient(), "JPEG", quality=95, **options)
    front = b"".join(bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body for marker, body in segments)
    return data[:2] + front + data[2:]


def webp(*chunks: tuple[bytes, bytes], **options: object) -> bytes:
    """A lossless WebP with these chunks at its end."""
    data = encoded(gradient(), "WEBP", lossless=True, **options)
    for name, body in chunks:
        data += struct.pack("<4sI", name, len(body)) + body + b"\0" * (len(body) % 2)
    return data[:4] + struct.pack("<I", len(data) - 8) + data[8:]


def tiff(extra: tuple[int, int, int, int] | None = None, image: Image.Image | None = None, **options: object) -> bytes:
    """A TIFF whose first entry that matters to nobody (Software) is replaced by `extra`: tag, type, count, offset."""
    data = encoded(image or gradient(), "TIFF", software="x", **options)
    if extra is None:
        return data
    at = data.index(struct.pack("<HH", 305, 2), TIFF_DIRECTORY)
    return data[:at] + struct.pack("<HHII", *extra) + data[at + 12 :]


def assert_taken(data: bytes, tmp_path: Path, orientation: int | None = None, tolerance: int = 0) -> None:
    (tmp_path / "photo").write_bytes(data)
    photo = load_photo(tmp_path / "photo")
    assert photo.info[ORIENTATION_KEY] == orientation
    expected = gradient() if orientation is None else gradient().transpose(Image.Transpose.ROTATE_270)
    assert photo.size == expected.size
    assert np.abs(np.asarray(photo).astype(int) - np.asarray(expected)).max() <= tolerance


class TestPng:
    @pytest.mark.parametrize(
        "chunk",
        [
            png_chunk(b"eXIf", GARBAGE),
            png_chunk(b"tEXt", b"Raw profile type exif\0\nexif\n      8\nzzzz\n"),
            png_chunk(b"zTXt", b"Comment\0\1broken"),
            png_chunk(b"zTXt", b"Raw profile type exif\0\0broken"),
            png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0broken"),
            png_chunk(b"iTXt", b"XML:com.adobe.xmp\0"),
            png_chunk(b"iCCP", b""),
            png_chunk(b"iCCP", b"icc\0\1broken"),
            png_chunk(b"iCCP", b"icc\0\0" + zlib.compress(bytes(2**24))),
            png_chunk(b"zTXt", b"bomb\0\0" + zlib.compress(bytes(2**26))),
            png_chunk(b"gAMA", b"\0"),
            png_chunk(b"cHRM", b"\0"),
            png_chunk(b"sRGB", b""),
            png_chunk(b"pHYs", b"\0"),
            png_chunk(b"acTL", b"\0"),
            png_chunk(b"acTL", bytes(8)),
            png_chunk(b"fcTL", b"\0"),
            png_chunk(b"abCd", b"unknown")[:-1] + b"?",
        ],
    )
    def test_damaged_chunks(self, tmp_path: Path, chunk: bytes):
        assert_taken(png(chunk), tmp_path)
        assert_taken(png(after=chunk), tmp_path)

    @pytest.mark.parametrize("chunk", [png_chunk(b"tRNS", b"\0"), png_chunk(b"tRNS", bytes(6))[:-1] + b"?"])
    def test_damaged_transparency(self, tmp_path: Path, chunk: bytes):
        assert_taken(png(chunk), tmp_path)

    @pytest.mark.parametrize(
        "chunk",
        [
            png_chunk(b"eXIf", TURNED_EXIF),
            png_chunk(b"eXIf", b"Exif\0\0" + TURNED_EXIF),
            png_chunk(b"tEXt", f"Raw profile type exif\0\nexif\n{len(TURNED_EXIF):8}\n{TURNED_EXIF.hex()}\n".encode()),
            png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP),
            png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(XMP)),
        ],
    )
    def test_orientation_in_front_of_the_pixels_and_after_them(self, tmp_path: Path, chunk: bytes):
        assert_taken(png(chunk), tmp_path, 6)
        assert_taken(png(after=chunk), tmp_path, 6)

    @pytest.mark.parametrize(
        "exif_chunk", [png_chunk(b"eXIf", TURNED_EXIF), png_chunk(b"eXIf", TURNED_EXIF)[:-1] + b"?"]
    )
    def test_orientation_counts_where_another_chunk_is_damaged(self, tmp_path: Path, exif_chunk: bytes):
        assert_taken(png(exif_chunk, png_chunk(b"zTXt", b"Comment\0\1broken")), tmp_path, 6)
        assert_taken(png(after=png_chunk(b"zTXt", b"Comment\0\1broken") + exif_chunk), tmp_path, 6)

    def test_transparency_is_kept(self, tmp_path: Path):
        for chunks in ([], [png_chunk(b"zTXt", b"Comment\0\1broken")]):
            data = png(*chunks, png_chunk(b"tRNS", bytes(2)), image=subject_mask())
            (tmp_path / "photo.png").write_bytes(data)
            assert load_photo(tmp_path / "photo.png").getpixel((0, 0)) == (255, 255, 255)

    def test_animation_is_its_default_picture(self, tmp_path: Path):
        frames = encoded(gradient(), "PNG", save_all=True, append_images=[gradient().rotate(180)])
        at = frames.index(b"IDAT") - 4
        assert_taken(frames, tmp_path)
        assert_taken(frames[:at] + png_chunk(b"zTXt", b"Comment\0\1broken") + frames[at:], tmp_path)


class TestJpeg:
    @pytest.mark.parametrize(
        "segment",
        [
            (0xE1, b"Exif\0\0" + GARBAGE),
            (0xE1, b"Exif\0\0II*\0\x08\0\0\0\x40\0\x12\x01"),
            (0xE1, b"Exif\0\0"),
            (0xE1, b"http://ns.adobe.com/xap/1.0/\0<broken"),
            (0xE2, b"ICC_PROFILE\0\1\2broken"),
            (0xE2, b"MPF\0II*\0\x08\0\0\0\2\0"),
            (0xE2, b"MPF\0broken"),
            (0xED, b"Photoshop 3.0\x008BIM\x03\xed\0\0\0\0\0\1\0"),
            (0xED, b"Photoshop 3.0\x008BIM\x03\xed"),
            (0xE0, b"JFIF\0\1"),
            (0xEE, b"Adobe\0"),
            (0xFE, b""),
        ],
    )
    def test_damaged_segments(self, tmp_path: Path, segment: tuple[int, bytes]):
        assert_taken(jpeg(segment), tmp_path, tolerance=12)

    def test_orientation(self, tmp_path: Path):
        assert_taken(jpeg((0xE1, b"Exif\0\0" + TURNED_EXIF)), tmp_path, 6, tolerance=12)
        assert_taken(jpeg((0xE1, b"Exif\0\0" + TURNED_EXIF[:-3])), tmp_path, 6, tolerance=12)
        assert_taken(jpeg((0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP)), tmp_path, 6, tolerance=12)

    def test_orientation_counts_where_another_segment_is_damaged(self, tmp_path: Path):
        damaged = (0xED, b"Photoshop 3.0\x008BIM\x03\xed")
        assert_taken(jpeg((0xE1, b"Exif\0\0" + TURNED_EXIF), damaged), tmp_path, 6, tolerance=12)

    @pytest.mark.parametrize("mode", ["L", "CMYK", "RGB"])
    def test_colours_are_what_pillow_reads(self, tmp_path: Path, mode: str):
        path = tmp_path / "photo.jpg"
        gradient().convert(mode).save(path, exif=b"Exif\0\0" + TURNED_EXIF, comment=b"x")
        with Image.open(path) as image:
            expected = image.convert("RGB").transpose(Image.Transpose.ROTATE_270)
        assert load_photo(path).tobytes() == expected.tobytes()


class TestWebp:
    @pytest.mark.parametrize("name", [b"EXIF", b"XMP ", b"ICCP", b"what"])
    def test_damaged_chunks(self, tmp_path: Path, name: bytes):
        assert_taken(webp((name, GARBAGE)), tmp_path)
        assert_taken(webp(exif=GARBAGE, xmp=b"<", icc_profile=b"icc"), tmp_path)

    def test_cut_off_in_metadata(self, tmp_path: Path):
        assert_taken(webp(exif=TURNED_EXIF)[:-4], tmp_path, 6)
        assert_taken(webp(exif=TURNED_EXIF, xmp=b"<" * 99)[:-50], tmp_path, 6)

    def test_orientation(self, tmp_path: Path):
        assert_taken(webp(exif=TURNED_EXIF), tmp_path, 6)
        assert_taken(webp(exif=b"Exif\0\0" + TURNED_EXIF), tmp_path, 6)
        assert_taken(webp(xmp=XMP), tmp_path, 6)

    def test_first_picture_of_an_animation(self, tmp_path: Path):
        data = encoded(
            gradient(), "WEBP", lossless=True, save_all=True, append_images=[gradient().rotate(180)], exif=TURNED_EXIF
        )
        assert_taken(data, tmp_path, 6)
        assert_taken(data[:-4], tmp_path, 6)


class TestTiff:
    @pytest.mark.parametrize(
        "entry",
        [
            (305, 2, 2**31, 8),
            (305, 2, 50, 2**32 - 1),
            (305, 77, 1, 0),
            (34665, 4, 1, 2**32 - 20),
            (34665, 4, 1, 9),
            (700, 1, 2**20, 0),
            (282, 5, 1, 2**32 - 1),
            (296, 3, 2, 0x00020002),
        ],
    )
    @pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
    def test_damaged_entries(self, tmp_path: Path, entry: tuple[int, int, int, int], compression: str):
        assert_taken(tiff(entry, compression=compression), tmp_path)

    @pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate"])
    @pytest.mark.parametrize("big_tiff", [False, True])
    def test_orientation(self, tmp_path: Path, compression: str, big_tiff: bool):
        options = {"compression": compression, "big_tiff": big_tiff}
        assert_taken(encoded(gradient(), "TIFF", exif=Image.Exif(), **options), tmp_path)
        turned = Image.Exif()
        turned[0x0112] = 6
        assert_taken(encoded(gradient(), "TIFF", exif=turned, **options), tmp_path, 6)

    def test_orientation_in_xmp(self, tmp_path: Path):
        info = TiffImagePlugin.ImageFileDirectory_v2()
        info[700] = XMP
        assert_taken(encoded(gradient(), "TIFF", tiffinfo=info), tmp_path, 6)


class TestAvif:
    def test_orientation_is_the_images_own(self, tmp_path: Path):
        if "AVIF" not in Image.registered_extensions().values():
            pytest.skip("this Pillow reads no AVIF")
        for start in (b"MM\0*", b"????"):
            (tmp_path / "photo.avif").write_bytes(AVIF.replace(b"MM\0*", start))
            photo = load_photo(tmp_path / "photo.avif")
            assert (photo.size, photo.info[ORIENTATION_KEY]) == ((20, 30), 6)


class TestTruncated:
    @pytest.mark.parametrize("damage", [b"", GARBAGE])
    @pytest.mark.parametrize("kind", ["PNG", "WEBP"])
    def test_pixels_that_are_cut_off_are_refused(self, tmp_path: Path, kind: str, damage: bytes):
        options = {"exif": damage, "lossless": True} if damage else {}
        data = encoded(gradient(300, 200), kind, **options)
        (tmp_path / "photo").write_bytes(data[: len(data) // 2])
        with pytest.raises(InputError, match=r"is damaged|cannot be decoded|cannot be read"):
            load_photo(tmp_path / "photo")

    @pytest.mark.parametrize("kind", ["AVIF", "GIF", "JPEG", "JPEG2000", "PNG", "TIFF", "WEBP"])
    def test_no_other_error_at_any_length(self, tmp_path: Path, kind: str):
        if kind == "AVIF":
            data = AVIF
        else:
            data = encoded(gradient().quantize(9) if kind == "GIF" else gradient(), kind, exif=TURNED_EXIF)
        for length in range(0, len(data), max(1, len(data) // 150)):
            (tmp_path / "photo").write_bytes(data[:length])
            with contextlib.suppress(InputError):
                load_photo(tmp_path / "photo")

    @pytest.mark.parametrize("prefix", [b"", b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WEBP", b"\0\0\0\x1cftypavif"])
    @pytest.mark.parametrize("rest", [b"", b"\0" * 40, b"\xff" * 40, b"\0\0\0\0tRNS", b"VP8X\0\0\0\0"])
    def test_files_without_structure(self, prefix: bytes, rest: bytes):
        found = without_metadata(io.BytesIO(prefix + rest))
        assert (found is None) == (prefix == b"")


def test_damaged_profile_of_a_mask(tmp_path: Path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = encoded(subject_mask(), "PNG", icc_profile=profile)
    at = data.index(b"iCCP") + 20
    (tmp_path / "mask.png").write_bytes(data[:at] + b"????" + data[at + 4 :])
    assert load_mask(tmp_path / "mask.png").tobytes() == subject_mask().tobytes()


def test_screen_that_a_gif_enlarges_beyond_measure(tmp_path: Path):
    data = bytearray(encoded(gradient().quantize(200), "GIF"))
    at = data.index(b",", 13 + (3 << (data[10] & 7) + 1))
    data[at + 1 : at + 5] = struct.pack("<HH", 12_000, 12_000)
    (tmp_path / "photo.gif").write_bytes(data)
    with pytest.raises(InputError, match="too large: 12030x12020 pixels"):
        load_photo(tmp_path / "photo.gif")
