import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from moma_rt.errors import InputError, MomaWarning
from moma_rt.inputs.images import contact_sheet, load_mask, load_photo, prepare
from tests.moma_rt.inputs.pictures import gradient, subject_mask

CASES = ("context", "texture")
ORIENTATION = 0x0112


class TestParity:
    @pytest.mark.parametrize("case", CASES)
    def test_vision_pixels_equal_the_original(self, goldens: Path, case: str):
        folder = goldens / case
        prepared = prepare(load_photo(folder / "image.png"), load_mask(folder / "mask.png"), 512)
        with np.load(folder / "mllm.npz") as golden:
            assert np.abs(prepared.pixels - golden["pixel_values"]).max() <= 1e-6

    @pytest.mark.parametrize("case", CASES)
    def test_photo_is_squashed_bilinearly_and_keeps_its_background(self, goldens: Path, case: str):
        folder = goldens / case
        prepared = prepare(load_photo(folder / "image.png"), load_mask(folder / "mask.png"), 512)
        with Image.open(folder / "image.png") as image:
            squashed = np.asarray(image.convert("RGB").resize((512, 512), Image.Resampling.BILINEAR))
        assert prepared.photo_chw.dtype == np.float32
        assert np.abs(prepared.photo_chw[0] - (squashed.transpose(2, 0, 1) / 127.5 - 1)).max() <= 1e-6

    @pytest.mark.parametrize("case", CASES)
    def test_mask_grows_by_its_resized_edge(self, goldens: Path, case: str):
        folder = goldens / case
        prepared = prepare(load_photo(folder / "image.png"), load_mask(folder / "mask.png"), 512)
        with Image.open(folder / "mask.png") as image:
            gray = np.asarray(image.getchannel(0).resize((512, 512), Image.Resampling.BILINEAR))
        assert prepared.mask_hw.dtype == np.bool_
        np.testing.assert_array_equal(prepared.mask_hw, gray > 0)


class TestPhotoModes:
    @pytest.mark.parametrize("mode", ["RGB", "RGBA", "CMYK", "YCbCr", "RGBX", "HSV", "LAB"])
    def test_colour_modes_keep_the_picture(self, mode: str):
        photo = gradient() if mode != "LAB" else Image.new("RGB", (30, 20), "gray")
        source = photo.convert(mode) if mode != "LAB" else Image.new("LAB", (30, 20), (137, 128, 128))
        loaded = load_photo(source)
        assert loaded.mode == "RGB"
        assert np.abs(np.asarray(loaded).astype(int) - np.asarray(photo)).max() <= 12

    @pytest.mark.parametrize("mode", ["L", "LA", "La", "RGBa", "1", "I;16", "I;16B", "I", "F"])
    def test_gray_modes_are_gray_in_all_channels(self, mode: str):
        gray = np.zeros((20, 30), np.uint8)
        gray[5:, :] = 255
        if mode in ("I;16", "I;16B"):
            wide = gray.astype(np.uint16) * 257
            source = Image.frombytes(mode, (30, 20), wide.astype("<u2" if mode == "I;16" else ">u2").tobytes())
        else:
            # The modes with premultiplied alpha are reached only from those without.
            source = Image.fromarray(gray).convert({"La": "LA", "RGBa": "RGBA"}.get(mode, mode)).convert(mode)
        np.testing.assert_array_equal(np.asarray(load_photo(source)), np.repeat(gray[:, :, np.newaxis], 3, axis=2))

    @pytest.mark.parametrize(
        ("values", "expected"),
        [
            (np.array([[0, 257, 32896, 65535]], np.uint16), [0, 1, 128, 255]),
            (np.array([[0, 1, 128, 255]], np.uint16), [0, 0, 0, 1]),
            (np.array([[0, 1, 128, 255]], np.int32), [0, 1, 128, 255]),
            (np.array([[-5, 257, 32896, 70000]], np.int32), [0, 1, 128, 255]),
            (np.array([[0, 0.5, 1]], np.float32), [0, 128, 255]),
            (np.array([[0, 1, 255]], np.float32), [0, 1, 255]),
            (np.array([[np.nan, -np.inf, 32896, np.inf]], np.float32), [0, 0, 128, 255]),
        ],
    )
    def test_wide_values_are_scaled_to_8_bits(self, values: np.ndarray, expected: list[int]):
        assert np.asarray(load_photo(Image.fromarray(values)))[0, :, 0].tolist() == expected

    def test_16_bit_png_file(self, tmp_path: Path):
        Image.fromarray(np.full((4, 6), 32896, np.uint16)).save(tmp_path / "gray.png")
        assert set(np.unique(np.asarray(load_photo(tmp_path / "gray.png")))) == {128}

    def test_palette(self):
        source = Image.new("P", (2, 1))
        source.putpalette([10, 20, 30, 200, 100, 50])
        source.putdata([0, 1])
        assert np.asarray(load_photo(source)).tolist() == [[[10, 20, 30], [200, 100, 50]]]

    def test_transparent_pixels_become_white(self):
        source = Image.new("RGBA", (3, 1), (100, 0, 200, 255))
        source.putpixel((1, 0), (100, 0, 200, 0))
        source.putpixel((2, 0), (0, 0, 0, 128))
        assert np.asarray(load_photo(source)).tolist() == [[[100, 0, 200], [255, 255, 255], [127, 127, 127]]]

    def test_transparent_value_of_16_bits_becomes_white(self):
        source = Image.fromarray(np.array([[0, 32896]], np.uint16))
        source.info["transparency"] = 0
        assert np.asarray(load_photo(source))[0, :, 0].tolist() == [255, 128]

    def test_transparent_palette_entry_becomes_white(self, tmp_path: Path):
        source = Image.new("P", (2, 1))
        source.putpalette([10, 20, 30, 200, 100, 50])
        source.putdata([0, 1])
        source.save(tmp_path / "palette.png", transparency=1)
        assert np.asarray(load_photo(tmp_path / "palette.png")).tolist() == [[[10, 20, 30], [255, 255, 255]]]

    def test_source_is_not_changed(self):
        source = gradient().convert("RGBA")
        before = source.tobytes()
        loaded = load_photo(source)
        loaded.putpixel((0, 0), (1, 2, 3))
        assert source.mode == "RGBA"
        assert source.tobytes() == before


class TestMaskModes:
    @pytest.mark.parametrize("mode", ["L", "1", "RGB", "RGBA", "LA", "P", "CMYK", "I", "F"])
    def test_every_mode_gives_the_same_foreground(self, mode: str):
        loaded = load_mask(subject_mask().convert(mode))
        assert loaded.mode == "L"
        np.testing.assert_array_equal(np.asarray(loaded) > 0, np.asarray(subject_mask()) > 0)

    def test_first_channel_is_the_mask_if_the_others_do_not_vary(self):
        source = Image.merge("RGB", (subject_mask(), Image.new("L", (30, 20), 255), Image.new("L", (30, 20), 9)))
        assert load_mask(source).tobytes() == subject_mask().tobytes()

    @pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (7, 80, 200)])
    def test_alpha_is_the_mask_where_colour_says_nothing(self, colour: tuple[int, int, int]):
        source = Image.new("RGB", (30, 20), colour)
        source.putalpha(subject_mask())
        assert load_mask(source).tobytes() == subject_mask().tobytes()

    def test_colour_is_the_mask_where_both_vary(self):
        source = Image.merge("RGB", (subject_mask(),) * 3)
        source.putalpha(Image.linear_gradient("L").resize((30, 20)))
        assert load_mask(source).tobytes() == subject_mask().tobytes()

    @pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
    def test_label_one_of_a_wide_mode_is_foreground(self, dtype: type):
        labels = (np.asarray(subject_mask()) > 0).astype(dtype)
        assert load_mask(Image.fromarray(labels)).tobytes() == subject_mask().tobytes()

    def test_faintest_value_counts(self):
        mask = subject_mask().point(lambda v: 1 if v else 0)
        assert prepare(gradient(), load_mask(mask), 64).mask_hw.any()


class TestOrientation:
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_photo_and_mask_are_turned_by_their_own_exif(self, tmp_path: Path, orientation: int):
        turns = {
            2: Image.Transpose.FLIP_LEFT_RIGHT,
            3: Image.Transpose.ROTATE_180,
            4: Image.Transpose.FLIP_TOP_BOTTOM,
            5: Image.Transpose.TRANSPOSE,
            6: Image.Transpose.ROTATE_270,
            7: Image.Transpose.TRANSVERSE,
            8: Image.Transpose.ROTATE_90,
        }
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        for name, image in (("photo.png", gradient()), ("mask.png", subject_mask())):
            image.save(tmp_path / name, exif=exif)
        photo, mask = gradient(), subject_mask()
        if orientation in turns:
            photo, mask = photo.transpose(turns[orientation]), mask.transpose(turns[orientation])
        assert load_photo(tmp_path / "photo.png").tobytes() == photo.tobytes()
        assert load_mask(tmp_path / "mask.png").tobytes() == mask.tobytes()

    def test_upright_mask_fits_a_turned_photo(self, tmp_path: Path):
        exif = Image.Exif()
        exif[ORIENTATION] = 6
        gradient(60, 40).save(tmp_path / "photo.jpg", exif=exif)
        photo = load_photo(tmp_path / "photo.jpg")
        assert photo.size == (40, 60)
        assert prepare(photo, load_mask(subject_mask(20, 30)), 64).mask_hw.any()
        with pytest.raises(
            InputError, match=r"40x60.*30x20.*turned by 90 degrees; the photo was turned by its EXIF orien"
        ):
            prepare(photo, load_mask(subject_mask(30, 20)), 64)

    @pytest.mark.parametrize("turned", ["photo", "mask"])
    @pytest.mark.parametrize(("orientation", "size"), [(3, (30, 20)), (2, (30, 20)), (6, (40, 40)), (5, (201, 200))])
    def test_one_is_turned_and_both_ways_fit(
        self, tmp_path: Path, turned: str, orientation: int, size: tuple[int, int]
    ):
        for name, image in (("photo", gradient(*size)), ("mask", subject_mask(*size))):
            exif = Image.Exif()
            if name == turned:
                exif[ORIENTATION] = orientation
            image.save(tmp_path / f"{name}.png", exif=exif)
        text = (
            rf"^the {turned} was turned upright by its EXIF orientation \({orientation}\), the (?!{turned})\w+ has none"
        )
        with pytest.warns(MomaWarning, match=text):
            prepare(load_photo(tmp_path / "photo.png"), load_mask(tmp_path / "mask.png"), 64)

    @pytest.mark.parametrize("orientations", [(3, 3), (3, 1), (1, 3), (1, None), (None, 1), (None, None), (0, None)])
    def test_both_or_none_say_how_they_are_turned(self, tmp_path: Path, orientations: tuple[int | None, int | None]):
        for name, image, orientation in zip(("photo", "mask"), (gradient(), subject_mask()), orientations, strict=True):
            exif = Image.Exif()
            if orientation is not None:
                exif[ORIENTATION] = orientation
            image.save(tmp_path / f"{name}.png", exif=exif)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            prepare(load_photo(tmp_path / "photo.png"), load_mask(tmp_path / "mask.png"), 64)

    @pytest.mark.parametrize("suffix", ["png", "tiff", "jpg"])
    def test_pillow_images_are_turned_and_compared_too(self, tmp_path: Path, suffix: str):
        exif = Image.Exif()
        exif[ORIENTATION] = 6
        gradient(40, 40).save(tmp_path / f"photo.{suffix}", exif=exif)
        with Image.open(tmp_path / f"photo.{suffix}") as image:
            photo = load_photo(image)
        assert photo.tobytes() == load_photo(tmp_path / f"photo.{suffix}").tobytes()
        with pytest.warns(MomaWarning, match="^the photo was turned upright"):
            prepare(photo, load_mask(subject_mask(40, 40)), 64)

    @pytest.mark.parametrize("mode", ["I;16", "P", "LA", "1"])
    def test_modes_that_need_conversion_are_turned_too(self, tmp_path: Path, mode: str):
        exif = Image.Exif()
        exif[ORIENTATION] = 6
        gradient().convert("L").convert(mode).save(tmp_path / "photo.png", exif=exif)
        assert load_photo(tmp_path / "photo.png").size == (20, 30)
        assert load_mask(tmp_path / "photo.png").size == (20, 30)


class TestPrepare:
    def test_shapes_and_ranges(self):
        prepared = prepare(gradient(), subject_mask(), 64, vision_size=28)
        assert prepared.photo_chw.shape == (1, 3, 64, 64)
        assert prepared.photo_chw.flags.c_contiguous
        assert -1 <= prepared.photo_chw.min() < prepared.photo_chw.max() <= 1
        assert prepared.mask_hw.shape == (64, 64)
        assert prepared.pixels.shape == (1, 3, 28, 28)
        assert prepared.pixels.dtype == np.float32
        assert prepared.photo_hwc.dtype == np.uint8

    def test_black_and_white_are_the_ends_of_the_range(self):
        photo = Image.new("RGB", (8, 8))
        assert (prepare(photo, subject_mask(8, 8), 8).photo_chw == -1).all()
        photo.paste((255, 255, 255), (0, 0, 8, 8))
        assert (prepare(photo, subject_mask(8, 8), 8).photo_chw == 1).all()

    @pytest.mark.parametrize("size", [(1, 1), (1, 700), (2000, 3), (513, 511)])
    def test_any_size(self, size: tuple[int, int]):
        prepared = prepare(gradient(*size), Image.new("L", size, 255), 64)
        assert prepared.photo_chw.shape == (1, 3, 64, 64)
        assert prepared.mask_hw.all()

    def test_thumbnail_keeps_the_aspect_ratio(self):
        assert prepare(gradient(600, 400), subject_mask(600, 400), 64).photo_hwc.shape == (171, 256, 3)
        assert prepare(gradient(30, 20), subject_mask(), 64).photo_hwc.shape == (20, 30, 3)

    def test_subject_is_put_on_white(self):
        photo, mask = Image.new("RGB", (64, 64)), Image.new("L", (64, 64))
        ImageDraw.Draw(mask).rectangle((0, 0, 31, 63), fill=255)
        pixels = prepare(photo, mask, 64, vision_size=64).pixels
        black, white = prepare(photo, Image.new("L", (64, 64), 255), 64, vision_size=64).pixels, pixels[..., 40:]
        np.testing.assert_array_equal(pixels[..., :32], black[..., :32])
        assert (white > 1.9).all()

    def test_mask_without_foreground(self):
        with pytest.raises(InputError, match="no foreground"):
            prepare(gradient(), Image.new("L", (30, 20)), 64)

    def test_subject_that_vanishes_when_resized(self):
        mask = Image.new("L", (4000, 4000))
        mask.putpixel((2000, 2000), 255)
        with pytest.raises(InputError, match="no foreground left at 64x64"):
            prepare(gradient(100, 100), mask, 64)

    @pytest.mark.parametrize("mask_size", [(300, 200), (150, 100), (1200, 800), (303, 200), (297, 200)])
    def test_mask_of_another_size_but_the_same_shape(self, mask_size: tuple[int, int]):
        assert prepare(gradient(300, 200), subject_mask(*mask_size), 64).mask_hw.any()

    @pytest.mark.parametrize("mask_size", [(200, 300), (308, 200), (292, 200), (512, 512)])
    def test_mask_of_another_shape(self, mask_size: tuple[int, int]):
        with pytest.raises(InputError) as error:
            prepare(gradient(300, 200), subject_mask(*mask_size), 64)
        assert "300x200" in str(error.value)
        assert f"{mask_size[0]}x{mask_size[1]}" in str(error.value)


class TestContactSheet:
    def test_one_row_of_four(self):
        items = [
            ("photo", gradient(600, 400)),
            ("mask", subject_mask()),
            ("result", gradient()),
            ("foreground", subject_mask()),
        ]
        sheet = contact_sheet(items, side=64)
        assert sheet.mode == "RGB"
        assert sheet.size == (4 * (64 + 12) + 12, 64 + 24 + 12 + 12)

    def test_more_pictures_go_to_the_next_row(self):
        one_row, two_rows = (contact_sheet([("a", gradient())] * n, side=64) for n in (4, 5))
        assert two_rows.width == one_row.width
        assert two_rows.height > one_row.height

    def test_tiles_and_labels_are_drawn(self):
        sheet = np.asarray(contact_sheet([("label", Image.new("RGB", (10, 10), (200, 30, 40)))], side=64))
        assert sheet[12 + 32, 12 + 32].tolist() == [200, 30, 40]
        assert (sheet[12 + 64 :] < 128).any()

    @pytest.mark.parametrize("label", ["", "x" * 500, "two\nlines", "名前 ☕"])
    def test_any_label_stays_in_its_column(self, label: str):
        sheet = np.asarray(contact_sheet([(label, gradient()), ("", gradient())], side=64))
        assert (sheet[12 + 64 :, 12 + 64 + 6 :] == 255).all()

    @pytest.mark.parametrize("mode", ["1", "L", "RGBA", "P"])
    def test_any_mode(self, mode: str):
        assert contact_sheet([("a", gradient().convert(mode))]).mode == "RGB"

    def test_nothing_to_show(self):
        with pytest.raises(ValueError, match="at least one"):
            contact_sheet([])
