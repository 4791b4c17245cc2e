import argparse

import numpy as np
import pytest

from examples.mini_moma import data as stage
from examples.mini_moma.groups import chunk_folders, read_chunk
from examples.mini_moma.icons import load_icons
from moma_rt.errors import InputError
from tests.examples.mini_moma.conftest import NoPool

TRAINED = ["red ball", "blue box", "green cone", "wooden table", "snow man", "guitar", "dragon", "horse", "car"]


@pytest.fixture
def small(monkeypatch, icons):
    """Small chunks and few backgrounds; teapots are held out. Returns a function that runs the stage."""
    monkeypatch.setattr(stage, "ProcessPoolExecutor", NoPool)
    monkeypatch.setattr(stage, "CHUNK", 2)
    monkeypatch.setattr(stage, "_BACKGROUNDS", 2)
    monkeypatch.setattr(stage, "heldout_names", lambda: frozenset({"teapot"}))

    def run(folder, groups=4):
        folder.mkdir(exist_ok=True)
        rgba = [icon.rgba_hwc for icon in icons]
        names = [*TRAINED, "teapot"]
        np.savez(
            folder / "icons.npz",
            names=np.array(names),
            styles=np.array(["drawn"] * len(names)),
            rgba_nhwc=np.stack([rgba[min(index, 3)] for index in range(len(names))]),
        )
        stage.run(argparse.Namespace(data=folder, groups=groups, processes=1))

    return run


def test_everything_is_made_from_the_seed_alone(small, tmp_path, capsys):
    small(tmp_path / "first")
    small(tmp_path / "second", groups=2)
    # More groups change nothing of the first ones.
    small(tmp_path / "second")
    assert "10 icons, 1 of them held out" in capsys.readouterr().out
    first, second = ([read_chunk(f) for f in chunk_folders(tmp_path / name, "train")] for name in ("first", "second"))
    assert len(first) == len(second) == 2
    for one, other in zip(first, second, strict=True):
        assert np.array_equal(one.targets_nkhwc, other.targets_nkhwc)
        assert one.prompts == other.prompts
    assert first[0].prompts != first[1].prompts
    assert np.load(tmp_path / "first" / "backgrounds.npy").shape == (13, 2, 128, 128, 3)


def test_heldout_subjects_are_in_their_split_only(small, tmp_path):
    small(tmp_path / "data", groups=10)
    names = {
        split: {name for folder in chunk_folders(tmp_path / "data", split) for name in read_chunk(folder).names}
        for split in ("train", "heldout")
    }
    assert names["heldout"] == {"teapot"}
    assert names["train"] <= set(TRAINED)
    icons = load_icons(tmp_path / "data")
    assert {icon.name for icon in stage._of_split(icons, "train")} == set(TRAINED)


def test_an_interrupted_stage_goes_on(small, tmp_path):
    small(tmp_path / "data")
    kept, lost = chunk_folders(tmp_path / "data", "train")
    before = read_chunk(lost).targets_nkhwc.copy()
    lost.rename(tmp_path / "lost")
    written = (kept / "photos.npy").stat().st_mtime_ns
    small(tmp_path / "data")
    assert np.array_equal(read_chunk(lost).targets_nkhwc, before)
    assert (kept / "photos.npy").stat().st_mtime_ns == written


@pytest.mark.parametrize("groups", [0, -2, 3])
def test_groups_are_whole_chunks(small, tmp_path, groups):
    with pytest.raises(InputError, match=f"--groups must be a positive multiple of 2, not {groups}"):
        small(tmp_path / "data", groups=groups)
    assert not (tmp_path / "data" / "groups").exists()
