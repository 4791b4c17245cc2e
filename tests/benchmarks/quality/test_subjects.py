"""The subjects of the evaluation are held out, and always the same."""

import dataclasses

import numpy as np
import pytest

from benchmarks.quality.subjects import COUNT, STYLES, choose, load_subjects, photo_of
from examples.mini_moma.icons import heldout_names
from moma_rt.errors import InputError


def test_fifty_subjects_of_different_names_are_held_out(subjects):
    names = [icon.name for icon in subjects]
    assert len(set(names)) == len(names) == COUNT
    assert set(names) <= heldout_names()
    assert min([icon.style for icon in subjects].count(style) for style in STYLES) >= 20
    for icon in subjects:
        assert icon.rgba_hwc.shape == (160, 160, 4)
        assert (icon.rgba_hwc[..., 3] > 0).mean() > 0.05


def test_photos_are_always_the_same_and_show_the_whole_subject(subjects):
    again = load_subjects()
    for index in (0, 1):
        scene, same = photo_of(subjects, index), photo_of(again, index)
        np.testing.assert_array_equal(scene.picture_hwc, same.picture_hwc)
        assert 0.05 < scene.mask_hw.mean() < 0.9
    assert np.ptp(photo_of(subjects, 0).picture_hwc[:8].reshape(-1, 3), axis=0).max() < 20, "a plain ground"


def test_the_choice_is_fixed_and_takes_styles_by_turns(subjects):
    icons = [dataclasses.replace(subjects[0], name=f"n{i}", style=style) for i in range(60) for style in STYLES]
    names = frozenset(icon.name for icon in icons)
    chosen = choose(icons, names)
    assert [(icon.name, icon.style) for icon in chosen] == [(icon.name, icon.style) for icon in choose(icons, names)]
    assert [icon.style for icon in chosen[:4]] == ["fluent", "noto", "fluent", "noto"]
    assert len({icon.name for icon in chosen}) == COUNT
    with pytest.raises(InputError, match="the icons have 49 of the held-out names; 50 are needed"):
        choose(icons, frozenset(sorted(names)[:49]))
