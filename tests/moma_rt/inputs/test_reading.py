import contextlib
import io
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moma_rt.errors import InputError
from moma_rt.inputs import reading
from moma_rt.inputs.images import load_mask, load_photo
from moma_rt.inputs.reading import MAX_PIXELS
from tests.moma_rt.inputs.pictures import gradient, png_header


def load_error(path: Path) -> str:
    with pytest.raises(InputError) as photo_error:
        load_photo(path)
    with pytest.raises(InputError) as mask_error:
        load_mask(path)
    for error in (photo_error, mask_error):
        assert "\n" not in str(error.value)
        assert str(path) in str(error.value)
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

    def test_warnings_of_other_threads_are_left_alone(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        gradient().save(tmp_path / "photo.png")
        monkeypatch.setattr(warnings, "catch_warnings", lambda: pytest.fail("it changes all threads' filters"))
        assert load_photo(tmp_path / "photo.png").size == (30, 20)

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
