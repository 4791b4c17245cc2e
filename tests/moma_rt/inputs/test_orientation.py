import struct
import warnings

import pytest
from PIL import Image

from moma_rt.inputs.orientation import exif_orientation, image_orientation, profile_orientation, xmp_orientation
from tests.moma_rt.inputs.pictures import exif, gradient

XMP = '<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" {}/>'


class TestExif:
    @pytest.mark.parametrize("order", ["<", ">"])
    @pytest.mark.parametrize("prefix", [b"", b"Exif\0\0", b"Exif\0\0Exif\0\0"])
    def test_byte_orders_and_prefixes(self, order: str, prefix: bytes):
        assert exif_orientation(prefix + exif([(0x0112, 3, 1, struct.pack(order + "HH", 6, 0))], order)) == 6

    @pytest.mark.parametrize("kind", [1, 3, 4, 6, 8, 9])
    def test_integers_of_any_size(self, kind: int):
        assert exif_orientation(exif([(0x0112, kind, 1, struct.pack("<I", 8))])) == 8

    def test_rational(self):
        data = exif([(0x0112, 5, 1, struct.pack("<I", 26))]) + struct.pack("<II", 12, 2)
        assert exif_orientation(data) == 6
        assert exif_orientation(data[:-4] + bytes(4)) is None
        assert exif_orientation(data[:-1]) is None

    def test_text(self):
        assert exif_orientation(exif([(0x0112, 2, 2, b"6\0\0\0")])) == 6
        assert exif_orientation(exif([(0x0112, 2, 4, b"top\0")])) is None

    @pytest.mark.parametrize("value", [0, 9, 255, 0xFFFF])
    def test_out_of_range(self, value: int):
        assert exif_orientation(exif([(0x0112, 3, 1, struct.pack("<HH", value, 0))])) is None

    def test_other_entries_are_damaged(self):
        entries = [
            (0x010F, 2, 0xFFFFFFFF, struct.pack("<I", 0xFFFFFFFF)),
            (0x0110, 99, 1, bytes(4)),
            (0x0111, 3, 0, bytes(4)),
            (0x0112, 3, 1, struct.pack("<HH", 3, 0)),
            (0x8769, 4, 1, struct.pack("<I", 0xFFFFFFF0)),
        ]
        assert exif_orientation(exif(entries)) == 3
        assert exif_orientation(exif(entries)[:-16]) == 3

    def test_more_entries_announced_than_there_are(self):
        data = exif([(0x0112, 3, 1, struct.pack("<HH", 6, 0))])
        assert exif_orientation(data[:8] + b"\xff\xff" + data[10:]) == 6

    @pytest.mark.parametrize("length", range(26))
    def test_cut_off(self, length: int):
        data = exif([(0x0112, 3, 1, struct.pack("<HH", 6, 0))])[:length]
        assert exif_orientation(data) == (6 if length >= 22 else None)

    @pytest.mark.parametrize("data", [b"", b"garbage", b"II", b"II*\0", b"II+\0\x08\0\0\0", b"MM\0*\xff\xff\xff\xff"])
    def test_no_exif(self, data: bytes):
        assert exif_orientation(data) is None

    def test_profile_in_hexadecimal(self):
        data = b"Exif\0\0" + exif([(0x0112, 3, 1, struct.pack("<HH", 6, 0))])
        assert profile_orientation(f"\nexif\n{len(data):8}\n{data.hex()}\n".encode()) == 6
        assert profile_orientation(b"\nexif\n      8\nzzzz\n") is None
        assert profile_orientation("\nexif\n8\né".encode()) is None


class TestXmp:
    @pytest.mark.parametrize("text", ['tiff:Orientation="6"', "tiff:Orientation = '6'"])
    def test_attribute(self, text: str):
        assert xmp_orientation(XMP.format(text).encode()) == 6

    def test_element(self):
        assert xmp_orientation(b"<tiff:Orientation>8</tiff:Orientation>") == 8

    @pytest.mark.parametrize("text", ["", 'tiff:Orientation="0"', 'tiff:Orientation="9"', 'tiff:Orientation="61"'])
    def test_none(self, text: str):
        assert xmp_orientation(XMP.format(text).encode()) is None


class TestImage:
    def test_what_the_caller_set_counts(self):
        image = gradient()
        image.getexif()[0x0112] = 6
        assert image_orientation(image) == 6
        image.info["exif"] = exif([(0x0112, 3, 1, struct.pack("<HH", 8, 0))])
        assert image_orientation(image) == 6

    def test_exif_then_xmp(self):
        image = gradient()
        image.info["xmp"] = XMP.format('tiff:Orientation="3"').encode()
        assert image_orientation(image) == 3
        image.info["exif"] = b"garbage"
        assert image_orientation(image) == 3
        image.info["exif"] = exif([(0x0112, 3, 1, struct.pack("<HH", 8, 0))])
        assert image_orientation(image) == 8

    def test_nothing_is_known(self):
        assert image_orientation(Image.new("L", (2, 2))) is None

    def test_damage_is_silent(self):
        image = gradient()
        image.info["exif"] = exif([(0x0112, 3, 1, struct.pack("<HH", 6, 0))])[:-3]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert image_orientation(image) == 6
