"""The subjects of the evaluation are held out, and always the same."""

import dataclasses

import numpy as np
import pytest

from benchmarks.quality import subjects as module
from benchmarks.quality.subjects import COUNT, STYLES, choose, load_subjects, main, photo_of
from examples.mini_moma.icons import Icon, heldout_names
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


def test_the_command_writes_what_is_read(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    icons = [
        Icon(f"n{i}", STYLES[i % 2], rng.integers(0, 256, (160, 160, 4), dtype=np.uint8) & 0xF0) for i in range(COUNT)
    ]
    monkeypatch.setattr(module, "_SHEET", tmp_path / "subjects.png")
    monkeypatch.setattr(module, "_NAMES", tmp_path / "subjects.json")
    monkeypatch.setattr(module, "load_icons", lambda _: icons)
    monkeypatch.setattr(module, "heldout_names", lambda: frozenset(icon.name for icon in icons))
    assert main([]) == 0
    assert "50 subjects" in capsys.readouterr().out
    expected = {icon.name: icon for icon in icons}
    for icon in load_subjects():
        assert icon.style == expected[icon.name].style
        visible = icon.rgba_hwc[..., 3] > 0
        np.testing.assert_array_equal(icon.rgba_hwc[visible], expected[icon.name].rgba_hwc[visible])


def test_without_icons_it_says_what_to_run(tmp_path, capsys):
    assert main(["--data", str(tmp_path)]) == 2
    assert "first run: python -m examples.mini_moma data" in capsys.readouterr().err
