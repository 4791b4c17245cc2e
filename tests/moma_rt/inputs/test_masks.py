import warnings
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from moma_rt.errors import InputError, MomaWarning
from moma_rt.inputs.images import load_mask, load_photo, prepare
from moma_rt.inputs.masks import percent

SIZE = (60, 40)
VOC = [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0, 0, 0, 128]


def ellipse() -> Image.Image:
    """The subject, white on black."""
    mask = Image.new("L", SIZE)
    ImageDraw.Draw(mask).ellipse((10, 8, 40, 32), fill=255)
    return mask


def halves(left: tuple[int, ...], right: tuple[int, ...], mode: str = "RGB") -> Image.Image:
    """Two colours side by side, both of which the subject shows."""
    image = Image.new(mode, SIZE, right)
    image.paste(left, (0, 0, 25, SIZE[1]))
    return image


def on(ground: tuple[int, ...], subject: Image.Image) -> Image.Image:
    return Image.composite(subject, Image.new(subject.mode, SIZE, ground), ellipse())


def labels(palette: list[int]) -> Image.Image:
    """A palette image with label 1 in the left half of the subject and 2 in the right one."""
    indices = np.where(np.asarray(ellipse()) > 0, np.where(np.arange(SIZE[0]) < 25, 1, 2), 0).astype(np.uint8)
    image = Image.fromarray(indices).convert("P")
    image.putpalette(palette)
    return image


def cut_out(colours: Image.Image, below: Image.Image | tuple[int, int, int]) -> Image.Image:
    """`colours` where the subject is; transparent elsewhere, with `below` under the transparency."""
    ground = Image.new("RGB", SIZE, below) if isinstance(below, tuple) else below
    image = Image.composite(colours, ground, ellipse())
    image.putalpha(ellipse())
    return image


def photo() -> Image.Image:
    y, x = np.mgrid[0 : SIZE[1], 0 : SIZE[0]]
    return Image.fromarray(np.stack([x * 4, y * 6, 255 - x * 4], axis=-1).astype(np.uint8))


def marked(mask: Image.Image) -> np.ndarray:
    return np.asarray(load_mask(mask)) > 0


def assert_marks_the_subject(mask: Image.Image) -> None:
    np.testing.assert_array_equal(marked(mask), np.asarray(ellipse()) > 0)


class TestColours:
    @pytest.mark.parametrize("colour", [(0, 128, 0), (0, 0, 1), (224, 224, 192), (255, 0, 255), (1, 1, 1)])
    @pytest.mark.parametrize("mode", ["RGB", "RGBX", "RGBA", "YCbCr", "HSV"])
    def test_any_colour_on_black(self, colour: tuple[int, int, int], mode: str):
        if colour in ((0, 0, 1), (1, 1, 1)) and mode == "YCbCr":
            pytest.skip("YCbCr does not hold it")
        assert_marks_the_subject(on((0, 0, 0), Image.new("RGB", SIZE, colour)).convert(mode))

    def test_parts_in_different_colours(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert_marks_the_subject(on((0, 0, 0), halves((255, 0, 0), (0, 255, 0))))

    @pytest.mark.parametrize("palette", [VOC, [0, 0, 0, 0, 128, 0, 224, 224, 192], [0, 0, 0, 0, 0, 255, 0, 64, 0]])
    def test_label_maps(self, palette: list[int]):
        assert_marks_the_subject(labels(palette))

    def test_palette_whose_first_colour_is_white(self):
        inverted = ellipse().point(lambda v: 0 if v else 1).convert("L")
        image = Image.frombytes("P", SIZE, inverted.tobytes())
        image.putpalette([255, 255, 255, 0, 0, 0])
        assert_marks_the_subject(image)

    def test_gray_label_one(self):
        assert_marks_the_subject(ellipse().point(lambda v: 1 if v else 0))

    @pytest.mark.parametrize("mode", ["L", "RGB", "1"])
    def test_gray_is_unchanged(self, mode: str):
        soft = ellipse().filter(ImageFilter.GaussianBlur(2)).convert(mode)
        expected = np.asarray(soft.convert("RGB"))[:, :, 0]
        np.testing.assert_array_equal(np.asarray(load_mask(soft)), expected)

    def test_jpeg_of_a_gray_mask_is_what_the_original_reads(self, tmp_path):
        ellipse().convert("RGB").save(tmp_path / "mask.jpg", quality=60)
        with Image.open(tmp_path / "mask.jpg") as stored:
            np.testing.assert_array_equal(np.asarray(load_mask(tmp_path / "mask.jpg")), np.asarray(stored)[:, :, 0])

    def test_channel_that_is_the_same_everywhere_says_nothing(self):
        assert_marks_the_subject(on((0, 0, 9), Image.new("RGB", SIZE, (250, 0, 9))))
        with pytest.warns(MomaWarning, match="is black: G = 0, B = 90 everywhere is taken as black"):
            assert_marks_the_subject(on((0, 0, 90), Image.new("RGB", SIZE, (250, 0, 90))))
        assert marked(Image.new("RGB", SIZE, (0, 0, 90))).all()

    def test_black_of_lab(self):
        assert_marks_the_subject(on((0, 128, 128), Image.new("LAB", SIZE, (120, 128, 128))))

    def test_negative_and_undefined_values_are_background(self):
        values = np.where(np.asarray(ellipse()) > 0, 0.01, -1).astype(np.float32)
        values[0, 0] = np.nan
        assert_marks_the_subject(Image.fromarray(values))

    def test_transparent_value_of_16_bits(self):
        image = Image.fromarray(np.where(np.asarray(ellipse()) > 0, 300, 7).astype(np.uint16))
        image.info["transparency"] = 7
        assert_marks_the_subject(image)


class TestTransparency:
    @pytest.mark.parametrize("colour", [(255, 255, 255), (0, 0, 0), (30, 144, 255)])
    @pytest.mark.parametrize("below", [(0, 0, 0), (255, 255, 255), (9, 9, 9)])
    def test_silhouette(self, colour: tuple[int, int, int], below: tuple[int, int, int]):
        assert_marks_the_subject(cut_out(Image.new("RGB", SIZE, colour), below))

    def test_overlay_of_constant_opacity(self):
        image = Image.new("RGB", SIZE, (30, 144, 255))
        image.putalpha(ellipse().point(lambda v: 153 if v else 0))
        assert_marks_the_subject(image)

    @pytest.mark.parametrize("below", [photo(), (0, 0, 0), (255, 255, 255)])
    def test_cut_out_with_black_parts(self, below):
        subject = photo()
        ImageDraw.Draw(subject).rectangle((20, 15, 30, 25), fill=(0, 0, 0))
        assert_marks_the_subject(cut_out(subject, below))
        assert_marks_the_subject(cut_out(halves((0, 40, 200), (200, 180, 30)), below))

    @pytest.mark.parametrize("dark", [(0, 0, 0), (0, 0, 9)])
    @pytest.mark.parametrize("light", [(90, 90, 90), (255, 255, 255), (200, 0, 0)])
    @pytest.mark.filterwarnings("ignore::moma_rt.MomaWarning")
    def test_silhouette_of_two_tones(self, dark: tuple[int, int, int], light: tuple[int, int, int]):
        assert_marks_the_subject(cut_out(halves(dark, light), (0, 0, 0)))

    @pytest.mark.parametrize("mode", ["LA", "La", "RGBa", "PA"])
    def test_other_modes_with_alpha(self, mode: str):
        image = cut_out(Image.new("RGB", SIZE, "white"), (0, 0, 0))
        assert_marks_the_subject(image.convert({"La": "LA", "RGBa": "RGBA"}.get(mode, mode)).convert(mode))

    def test_transparent_palette_entry(self, tmp_path):
        labels([200, 10, 10, 0, 0, 0, 0, 128, 0]).save(tmp_path / "mask.png", transparency=0)
        np.testing.assert_array_equal(np.asarray(load_mask(tmp_path / "mask.png")) > 0, np.asarray(ellipse()) > 0)

    def test_palette_with_alpha(self):
        image = labels(VOC)
        image.putpalette([255, 255, 255, 0, 0, 0, 0, 255, 0, 128, 0, 255], "RGBA")
        assert_marks_the_subject(image)

    def test_opaque_alpha_says_nothing(self):
        image = ellipse().convert("RGB")
        image.putalpha(255)
        assert_marks_the_subject(image)
        image.putalpha(Image.linear_gradient("L").resize(SIZE).point(lambda v: 40 + v // 2))
        assert_marks_the_subject(image)

    @pytest.mark.parametrize(("white", "black"), [(255, 0), (250, 0), (255, 1), (230, 25)])
    def test_white_on_a_black_ground_with_a_transparent_margin(self, white: int, black: int):
        """Neither needs to be exact: files with losses keep neither."""
        image = ellipse().point(lambda value: white if value else black).convert("RGB")
        margin = Image.new("L", SIZE)
        margin.paste(255, (5, 5, 55, 36))
        image.putalpha(margin)
        with pytest.warns(MomaWarning, match=r"\d+\.\d % of what is visible is black: taken as background"):
            assert_marks_the_subject(image)

    def test_colour_on_a_black_ground_with_a_transparent_margin_is_ambiguous(self):
        image = on((0, 0, 0), Image.new("RGB", SIZE, (200, 0, 0)))
        margin = Image.new("L", SIZE)
        margin.paste(255, (5, 5, 55, 36))
        image.putalpha(margin)
        with pytest.warns(MomaWarning, match="is black: taken as the subject's, like all that is visible"):
            np.testing.assert_array_equal(marked(image), np.asarray(margin) > 0)

    def test_black_and_white_cut_out_is_ambiguous(self):
        with pytest.warns(MomaWarning, match="is black: taken as the subject's, like all that is visible"):
            assert_marks_the_subject(cut_out(halves((0, 0, 0), (255, 255, 255)), (0, 0, 0)))

    @pytest.mark.parametrize("colour", ["white", "black"])
    def test_nothing_visible(self, colour: str):
        image = Image.new("RGB", SIZE, colour)
        image.putalpha(0)
        with pytest.raises(InputError, match="no foreground: it is black or transparent everywhere"):
            prepare(photo(), load_mask(image), 64)


class TestWarnings:
    @pytest.mark.parametrize(
        "make",
        [
            ellipse,
            lambda: labels(VOC),
            lambda: cut_out(photo(), photo()),
            lambda: ellipse().filter(ImageFilter.GaussianBlur(2)),
            lambda: ellipse().point(lambda v: 1 if v else 0),
        ],
    )
    def test_usual_masks_are_silent(self, make: Callable[[], Image.Image]):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            prepare(load_photo(photo()), load_mask(make()), 64)

    def test_portrait_that_is_cut_off_by_the_photo_is_silent(self):
        mask = Image.new("L", SIZE)
        mask.paste(255, (8, 4, 52, 40))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            prepare(photo(), load_mask(mask), 64)

    def test_nearly_everything(self):
        mask = Image.new("L", SIZE, 255)
        mask.paste(0, (0, 0, 10, 8))
        with pytest.warns(MomaWarning, match=r"^the mask marks 97\.\d % of the photo as the subject"):
            prepare(photo(), load_mask(mask), 64)

    def test_noise_that_is_nearly_black(self):
        mask = ellipse().point(lambda v: v or 2)
        with pytest.warns(MomaWarning, match="^the mask marks 100 % of the photo"):
            prepare(photo(), load_mask(mask), 64)

    @pytest.mark.parametrize("kind", ["erased", "inverted"])
    def test_inverted(self, kind: str):
        mask = ellipse().point(lambda v: 255 - v)
        if kind == "erased":
            mask, alpha = photo(), mask
            mask.putalpha(alpha)
        with pytest.warns(MomaWarning, match=r"marks 7\d\.\d % of the photo .*100 % of its edge: it seems"):
            prepare(photo(), load_mask(mask), 64)

    def test_stray_pixels(self):
        mask = Image.new("L", (512, 512))
        mask.paste(255, (100, 100, 110, 110))
        with pytest.warns(MomaWarning, match=r"marks only 0\.038 % of the photo"):
            prepare(Image.new("RGB", (512, 512)), load_mask(mask), 512)

    def test_noise_around_a_bright_subject(self):
        mask = Image.new("L", SIZE)
        mask.paste(3, (10, 5, 50, 35))
        mask.paste(255, (20, 10, 35, 25))
        with pytest.warns(MomaWarning, match=r"^81\.\d % of what the mask marks is nearly black or transparent"):
            prepare(photo(), load_mask(mask), 64)

    def test_photo_that_is_transparent_where_the_mask_is(self):
        cut = photo()
        cut.putalpha(ellipse().point(lambda v: 255 - v))
        with pytest.warns(MomaWarning, match=r"^only \d.* % of what the mask marks is visible"):
            prepare(load_photo(cut), load_mask(ellipse()), 64)

    def test_cut_out_as_photo_and_mask_is_silent(self):
        both = cut_out(photo(), (0, 0, 0))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert prepare(load_photo(both), load_mask(both), 64).mask_hw.any()


@pytest.mark.parametrize(
    ("share", "text"), [(0, "0 %"), (0.0005, "0.05 %"), (0.5, "50.0 %"), (0.9999, "99.9 %"), (1, "100 %")]
)
def test_percent_is_neither_0_nor_100_unless_it_is(share: float, text: str):
    assert percent(share) == text
