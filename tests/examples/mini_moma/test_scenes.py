import numpy as np
import pytest

from examples.mini_moma.scenes import (
    CONTEXTS,
    STUDIO,
    TEXTURES,
    context_prompt,
    photo,
    random_context,
    random_texture,
    recolored,
    target,
    texture_prompt,
    textured,
    varied,
    with_article,
)

GRAY = 200


def plain(context, rng):
    return np.full((128, 128, 3), GRAY, np.uint8)


def generator(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("teapot", "a teapot"),
        ("owl", "an owl"),
        ("unicorn", "a unicorn"),
        ("one piece swimsuit", "a one piece swimsuit"),
        ("umbrella", "an umbrella"),
        ("Apple", "an Apple"),
    ],
)
def test_articles(name, expected):
    assert with_article(name) == expected


def test_prompts_are_sentences():
    assert context_prompt("teapot", "on a beach") == "A teapot on a beach."
    assert context_prompt("owl", "at night") == "An owl at night."
    assert texture_prompt("teapot", "made of gold") == "A teapot made of gold."
    assert texture_prompt("owl", "golden") == "A golden owl."
    assert texture_prompt("teapot", "as a statue") == "A teapot as a statue."
    for phrases in TEXTURES.values():
        for phrase in phrases:
            prompt = texture_prompt("owl", phrase)
            assert prompt.endswith(".")
            assert not prompt.endswith(" .")
            assert "owl" in prompt
            assert phrase in prompt


@pytest.mark.parametrize(
    "make", [lambda rgba, rng: photo(rgba, rng, "beach"), lambda rgba, rng: target(rgba, "city", rng)]
)
def test_a_seed_gives_one_scene(icons, make):
    first, again, other = (make(icons[0].rgba_hwc, generator(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first.picture_hwc, again.picture_hwc)
    assert np.array_equal(first.mask_hw, again.mask_hw)
    assert not np.array_equal(first.picture_hwc, other.picture_hwc)
    assert (first.picture_hwc.shape, first.picture_hwc.dtype) == ((128, 128, 3), np.uint8)
    assert (first.mask_hw.shape, first.mask_hw.dtype) == ((128, 128), bool)


@pytest.mark.parametrize("context", ["water", "beach", STUDIO])
def test_the_mask_is_where_the_subject_is(icons, context):
    scene = target(icons[0].rgba_hwc, context, generator(), plain)
    # Clear of the soft edge, the subject is red or white, and the ground is gray, or darker in the shadow.
    inside = scene.picture_hwc[scene.mask_hw].astype(int)
    outside = scene.picture_hwc[~scene.mask_hw].astype(int)
    assert 0.25 < scene.mask_hw.mean() < 0.5
    assert np.mean(np.ptp(inside, 1) > 30) > 0.6
    assert np.mean(np.ptp(outside, 1) < 30) > 0.98


def test_the_photo_shows_the_subject_larger_than_the_target(icons):
    for seed in range(5):
        large = photo(icons[1].rgba_hwc, generator(seed), None, plain).mask_hw
        small = target(icons[1].rgba_hwc, "beach", generator(seed), plain).mask_hw
        assert large.sum() > 1.1 * small.sum()


def test_a_standing_subject_has_a_shadow_and_a_floating_one_none(icons):
    def darkest(context):
        scene = target(icons[0].rgba_hwc, context, generator(), plain)
        rows = np.arange(128) > 100
        return scene.picture_hwc[rows][~scene.mask_hw[rows]].min()

    assert darkest("grass") < GRAY - 20
    assert np.array_equal(target(icons[0].rgba_hwc, "space", generator(), plain).picture_hwc[0, 0], (GRAY, GRAY, GRAY))
    floating = target(icons[0].rgba_hwc, "space", generator(), plain)
    # Only the subject's own edge is darker.
    assert (floating.picture_hwc[120:] == GRAY).all()


def test_light_is_of_the_place(icons):
    white = np.full((160, 160, 4), 255, np.uint8)
    day, night = (target(white, context, generator(), plain) for context in ("grass", "night"))
    center = (60, 64)
    assert day.picture_hwc[center].tolist() == [255, 255, 255]
    assert night.picture_hwc[center].tolist() == [140, 153, 229]


@pytest.mark.parametrize("texture", TEXTURES)
def test_a_texture_changes_colors_and_keeps_the_outline(icons, texture):
    rgba = icons[0].rgba_hwc
    made, again = (textured(rgba, texture, generator()) for _ in range(2))
    assert np.array_equal(made, again)
    assert (made.shape, made.dtype) == ((160, 160, 4), np.uint8)
    assert np.array_equal(made[..., 3], rgba[..., 3])
    visible = rgba[..., 3] > 0
    assert np.abs(made[visible].astype(int) - rgba[visible]).mean() > 20
    # What was bright stays brighter.
    bright, dark = (made[100, 60, :3], made[100, 20, :3])
    assert bright.astype(int).sum() > dark.astype(int).sum()


def test_textures_differ(icons):
    means = {texture: textured(icons[0].rgba_hwc, texture, generator())[80, 30, :3].astype(int) for texture in TEXTURES}
    assert means["gold"][0] > means["gold"][2] + 40
    assert means["ice"][2] > means["ice"][0] + 20
    assert np.ptp(means["stone"]) < 12


def test_recoloring_keeps_grays_and_the_outline(icons):
    rgba = icons[0].rgba_hwc
    turned = recolored(rgba, generator(3))
    assert np.array_equal(turned[..., 3], rgba[..., 3])
    assert np.abs(turned[100, 60, :3].astype(int) - rgba[100, 60, :3]).max() <= 1
    assert np.abs(turned[100, 20, :3].astype(int) - rgba[100, 20, :3]).max() > 20


def test_variations_are_recolored_and_mirrored(icons):
    rgba = icons[3].rgba_hwc
    made = [varied(rgba, generator(seed)) for seed in range(60)]
    kept = [np.array_equal(one, rgba) for one in made]
    mirrored = [np.array_equal(one[..., 3], rgba[:, ::-1, 3]) for one in made]
    assert 0.15 < np.mean(kept) < 0.45
    assert 0.35 < np.mean(mirrored) < 0.65


def test_all_places_and_materials_are_drawn():
    rng = generator()
    contexts, textures = ([draw(rng) for _ in range(400)] for draw in (random_context, random_texture))
    assert set(contexts) == {(key, phrase) for key, phrases in CONTEXTS.items() for phrase in phrases}
    assert set(textures) == {(key, phrase) for key, phrases in TEXTURES.items() for phrase in phrases}
