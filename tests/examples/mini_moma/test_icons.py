import numpy as np
import pytest

from examples.mini_moma.icons import heldout_names, load_icons
from moma_rt.errors import InputError


def test_icons_are_read_back(tmp_path, icons):
    np.savez(
        tmp_path / "icons.npz",
        names=np.array([icon.name for icon in icons]),
        styles=np.array(["fluent", "noto", "fluent", "noto"]),
        rgba_nhwc=np.stack([icon.rgba_hwc for icon in icons]),
    )
    loaded = load_icons(tmp_path)
    assert [(icon.name, icon.style) for icon in loaded][:2] == [("red ball", "fluent"), ("blue box", "noto")]
    assert all(np.array_equal(one.rgba_hwc, other.rgba_hwc) for one, other in zip(loaded, icons, strict=True))


def test_no_icons_yet(tmp_path):
    with pytest.raises(InputError, match=r"has no icons.npz; first run: python -m examples.mini_moma data"):
        load_icons(tmp_path)


def test_heldout_names_are_complete():
    names = heldout_names()
    assert len(names) == 63
    assert {"teapot", "backpack", "automobile", "owl"} <= names
    assert all(name == name.strip().lower() and not name.startswith("#") for name in names)
