import contextlib
import io
import os
import struct
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moma_rt.errors import InputError
from moma_rt.inputs import reading
from moma_rt.inputs.images import load_mask, load_photo
from moma_rt.inputs.reading import MAX_PIXELS, ORIENTATION_KEY, pillow_warnings_ignored
from tests.moma_rt.inputs.pictures import exif, gradient, png_header


def load_error(path: Path) -> str:
    with pytest.raises(InputError) as photo_error:
        load_photo(path)
    with pytest.raises(InputError) as mask_error:
        load_mask(path)
    for error in (photo_error, mask_error):
        assert "\n" not in str(error.value)
        assert str(path).replace("\0", "\\x00") in str(error.value)
    return str(photo_error.value)


def encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


class TestUnusableFiles:
    def test_missing(self, tmp_path: Path):
        assert "does not exist" in load_error(tmp_path / "none.png")

    def test_folder(self, tmp_path: Path):
        assert "cannot be read: Is a directory" in load_error(tmp_path)

    @pytest.mark.parametrize("content", [b"", b"hello", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
    def test_not_an_image(self, tmp_path: Path, content: bytes):
        (tmp_path / "file.png").write_bytes(content)
        assert "not an image of a known format" in load_error(tmp_path / "file.png")

    def test_format_that_pillow_decodes_only_in_part(self, tmp_path: Path):
        data = bytearray(encoded(gradient(), "JPEG"))
        # The bits of a sample.
        data[data.index(b"\xff\xc0") + 4] = 12
        (tmp_path / "file.jpg").write_bytes(data)
        assert "starts as JPEG but cannot be decoded: cannot handle 12-bit layers" in load_error(tmp_path / "file.jpg")

    @pytest.mark.parametrize("suffix", ["png", "jpg", "tiff", "webp", "bmp"])
    def test_truncated(self, tmp_path: Path, suffix: str):
        path = tmp_path / f"photo.{suffix}"
        gradient(300, 200).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        load_error(path)

    @pytest.mark.parametrize("seed", range(20))
    def test_corrupted_files_never_raise_anything_else(self, tmp_path: Path, seed: int):
        content = np.frombuffer(encoded(gradient(64, 64), ("PNG", "TIFF", "JPEG", "GIF")[seed % 4]), np.uint8).copy()
        rng = np.random.default_rng(seed)
        content[rng.integers(8, len(content), 40)] = rng.integers(0, 256, 40)
        (tmp_path / "file").write_bytes(content.tobytes())
        with contextlib.suppress(InputError):
            assert load_photo(tmp_path / "file").mode == "RGB"

    @pytest.mark.parametrize(("width", "height"), [(8001, 8000), (10_000, 10_000), (30_000, 30_000), (2**31 - 1, 1)])
    def test_bomb_is_refused_before_it_is_decoded(self, tmp_path: Path, width: int, height: int, monkeypatch):
        monkeypatch.setattr(Image.Image, "load", lambda _: pytest.fail("decoded"))
        (tmp_path / "bomb.png").write_bytes(png_header(width, height))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            message = load_error(tmp_path / "bomb.png")
        assert "too large" in message
        assert "64 million" in message

    def test_pipe_does_not_wait(self, tmp_path: Path):
        os.mkfifo(tmp_path / "pipe")
        assert "pipe cannot be read: it is a device or pipe, not a file" in load_error(tmp_path / "pipe")
        assert "device or pipe" in load_error(Path("/dev/null"))

    @pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
    def test_impossible_name(self, tmp_path: Path, name: str):
        assert "cannot be read" in load_error(tmp_path / name)

    @pytest.mark.parametrize("source", [np.zeros((20, 30, 3), np.uint8), b"photo.png", None, 3])
    def test_source_of_another_type(self, source: object):
        with pytest.raises(InputError) as error:
            load_photo(source)  # type: ignore[arg-type]
        assert str(error.value) == f"image must be a path or a Pillow image, not {type(source).__name__}"
        with pytest.raises(InputError, match="^mask must be a path or a Pillow image, not "):
            load_mask(source)  # type: ignore[arg-type]

    @pytest.mark.parametrize("transparency", ["x", None, bytes(256)])
    def test_transparency_that_does_not_fit_the_mode(self, transparency: object):
        source = gradient()
        source.info["transparency"] = transparency
        for load in (load_photo, load_mask):
            with pytest.raises(InputError, match="is damaged and cannot be decoded"):
                load(source)

    def test_limit_is_inclusive(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(reading, "MAX_PIXELS", 600)
        assert load_photo(gradient(30, 20)).size == (30, 20)
        with pytest.raises(InputError, match="31x20"):
            load_photo(gradient(31, 20))
        assert MAX_PIXELS == 64_000_000

    def test_image_without_pixels(self):
        with pytest.raises(InputError, match="the photo has no pixels: its size is 0x5"):
            load_photo(Image.new("RGB", (0, 5)))


class TestOrientation:
    @pytest.mark.parametrize("order", ["<", ">"])
    @pytest.mark.parametrize("prefix", [b"", b"Exif\0\0", b"Exif\0\0Exif\0\0"])
    def test_byte_orders_and_prefixes(self, order: str, prefix: bytes):
        assert orientation(prefix + exif([(0x0112, 3, 1, struct.pack(order + "HH", 6, 0))], order)) == 6

    def test_whole_rational(self):
        data = exif([(0x0112, 5, 1, struct.pack("<I", 26))])
        assert orientation(data + struct.pack("<II", 12, 2)) == 6
        assert orientation(data + struct.pack("<II", 13, 2)) is None
        assert orientation(data + bytes(8)) is None

    @pytest.mark.parametrize("value", [0, 9, 255, 0xFFFF])
    def test_out_of_range(self, value: int):
        assert orientation(exif([(0x0112, 3, 1, struct.pack("<HH", value, 0))])) is None

    def test_text(self):
        assert orientation(exif([(0x0112, 2, 4, b"top\0")])) is None

    def test_one_is_known(self):
        assert orientation(exif([(0x0112, 3, 1, struct.pack("<HH", 1, 0))])) == 1

    @pytest.mark.parametrize("data", [b"", b"garbage", b"II", b"II*\0", b"MM\0*\xff\xff\xff\xff"])
    def test_exif_that_cannot_be_read(self, data: bytes):
        assert orientation(data) is None

    def test_damage_after_it(self):
        entries = [(0x0112, 3, 1, struct.pack("<HH", 3, 0)), (0x8769, 4, 1, struct.pack("<I", 0xFFFFFFF0))]
        assert orientation(exif(entries)) == 3
        assert orientation(exif(entries)[:-3]) == 3

    def test_what_the_caller_set_counts(self):
        image = gradient()
        image.getexif()[0x0112] = 6
        assert load_photo(image).size == (20, 30)

    @pytest.mark.parametrize("suffix", ["png", "webp", "tiff", "jpg"])
    def test_pillow_turns_nothing_twice(self, tmp_path: Path, suffix: str):
        turned = Image.Exif()
        turned[0x0112] = 3
        gradient().save(tmp_path / f"photo.{suffix}", exif=turned, lossless=True, quality=95)
        expected = np.asarray(gradient().rotate(180)).astype(int)
        with Image.open(tmp_path / f"photo.{suffix}") as lazy, Image.open(tmp_path / f"photo.{suffix}") as loaded:
            loaded.load()
            for source in (tmp_path / f"photo.{suffix}", lazy, loaded):
                assert np.abs(np.asarray(load_photo(source)) - expected).max() <= 12


def orientation(data: bytes) -> int | None:
    """What is read from a photo with these Exif data."""
    image = gradient()
    image.info["exif"] = data
    return load_photo(image).info[ORIENTATION_KEY]


class TestPillowWarnings:
    def test_none_is_shown(self, tmp_path: Path):
        (tmp_path / "photo.jpg").write_bytes(damaged_jpeg())
        code = "import sys; from moma_rt.inputs.images import load_photo; load_photo(sys.argv[1])"
        for options in ([], ["-Werror"], ["-Walways"]):
            command = [sys.executable, *options, "-c", code, str(tmp_path / "photo.jpg")]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            assert (result.returncode, result.stderr) == (0, "")

    def test_lazy_image_of_the_caller(self, tmp_path: Path):
        gradient().quantize(4).save(tmp_path / "palette.png", transparency=bytes([0, 99, 255]))
        (tmp_path / "photo.jpg").write_bytes(damaged_jpeg())
        for name in ("palette.png", "photo.jpg"):
            for load in (load_photo, load_mask):
                with pillow_warnings_ignored():
                    image = Image.open(tmp_path / name)
                with image, warnings.catch_warnings():
                    warnings.simplefilter("error")
                    load(image)

    def test_filters_are_what_they_were(self, tmp_path: Path):
        (tmp_path / "photo.jpg").write_bytes(damaged_jpeg())
        (tmp_path / "text.png").write_bytes(b"text")
        before = list(warnings.filters)
        threads = [threading.Thread(target=load_photo, args=(tmp_path / "photo.jpg",)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        load_error(tmp_path / "text.png")
        assert warnings.filters == before

    def test_other_modules_still_warn(self):
        def warn_elsewhere() -> None:
            warnings.warn_explicit("mine", UserWarning, "mine.py", 1, "PILgrim")

        def warn_as_pillow() -> None:
            warnings.warn_explicit("theirs", UserWarning, "theirs.py", 1, "PIL.TiffImagePlugin")

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with pillow_warnings_ignored():
                for target in (warn_elsewhere, warn_as_pillow):
                    thread = threading.Thread(target=target)
                    thread.start()
                    thread.join()
        assert [str(warning.message) for warning in caught] == ["mine"]

    def test_windows_in_one_another(self):
        with pillow_warnings_ignored(), pillow_warnings_ignored():
            pass

    def test_lock_that_a_fork_left_locked(self, monkeypatch: pytest.MonkeyPatch):
        locked = threading.Lock()
        locked.acquire()
        monkeypatch.setattr(reading, "_FILTERS_LOCK", locked)
        monkeypatch.setattr(reading, "_FILTERS_SECONDS", 0)
        assert load_photo(gradient()).size == (30, 20)
        assert locked.locked()


def damaged_jpeg() -> bytes:
    """A JPEG whose Exif data announce more than they hold: Pillow warns."""
    segment = b"Exif\0\0" + exif([(0x0110, 2, 99, struct.pack("<I", 99))])
    data = encoded(gradient(), "JPEG")
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + data[2:]
