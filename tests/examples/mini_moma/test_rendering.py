"""Fetching is tested with a program in npm's place, and archives made here."""

import base64
import hashlib
import importlib.util
import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image, ImageDraw

from examples.mini_moma import rendering
from examples.mini_moma.icons import load_icons
from examples.mini_moma.rendering import FLUENT, NOTO, IconSet, render_icons
from moma_rt.errors import InputError

ELLIPSE = '<ellipse cx="16" cy="16" rx="14" ry="7" fill="#2040e0"/>'
SPECK = '<circle cx="16" cy="16" r="1" fill="#2040e0"/>'


def archive(icons, categories=None):
    files = {"icons.json": {"icons": {name: {"body": body} for name, body in icons.items()}, "width": 32, "height": 32}}
    if categories is not None:
        files["metadata.json"] = {"categories": categories}
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as tar:
        for name, content in files.items():
            data = json.dumps(content).encode()
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return made.getvalue()


def icon_set(style, content):
    digest = base64.b64encode(hashlib.sha512(content).digest()).decode()
    return IconSet(style, f"@sets/{style}", "1.0.0", f"sha512-{digest}")


@pytest.fixture
def sets(monkeypatch):
    """The two sets' archives, small ones in the place of npm's."""
    noto = archive(
        {"teapot": ELLIPSE, "owl": ELLIPSE, "sun": ELLIPSE, "speck": SPECK, "flag": ELLIPSE},
        {**dict.fromkeys(rendering._CATEGORIES, []), "Objects": ["teapot", "sun", "speck"]}
        | {"Animals & Nature": ["owl"], "Flags": ["flag"]},
    )
    fluent = archive({"teapot": '<rect x="8" y="2" width="16" height="28" fill="red"/>'})
    for name, style, content in (("NOTO", "noto", noto), ("FLUENT", "fluent", fluent)):
        monkeypatch.setattr(rendering, name, icon_set(style, content))
    monkeypatch.setattr(rendering.importlib.util, "find_spec", lambda name: object())
    return {"sets-noto-1.0.0.tgz": noto, "sets-fluent-1.0.0.tgz": fluent}


def put(folder, sets):
    for name, content in sets.items():
        (folder / name).write_bytes(content)


def test_the_archives_have_npms_names():
    assert NOTO.archive == "iconify-json-noto-1.2.9.tgz"
    assert FLUENT.archive == "iconify-json-fluent-emoji-1.2.7.tgz"


@pytest.mark.skipif(importlib.util.find_spec("resvg_py") is None, reason="needs resvg_py")
def test_single_objects_of_both_sets_are_rendered(sets, tmp_path):
    put(tmp_path, sets)
    icons = render_icons(tmp_path)
    assert [(icon.style, icon.name) for icon in icons] == [("noto", "owl"), ("noto", "teapot"), ("fluent", "teapot")]
    wide, tall = icons[1].rgba_hwc, icons[2].rgba_hwc
    assert (wide.shape, wide.dtype) == ((160, 160, 4), np.uint8)
    # Cropped to the ellipse, twice as wide as tall.
    rows, columns = np.nonzero(wide[..., 3] > 127)
    assert (np.ptp(columns) + 1, np.ptp(rows) + 1) == (pytest.approx(160, abs=3), pytest.approx(80, abs=3))
    assert wide[80, 80].tolist() == [0x20, 0x40, 0xE0, 255]
    assert tall[80, 80].tolist() == [255, 0, 0, 255]
    assert all(np.array_equal(a.rgba_hwc, b.rgba_hwc) for a, b in zip(load_icons(tmp_path), icons, strict=True))


def test_an_archive_with_another_hash(sets, tmp_path):
    put(tmp_path, {**sets, "sets-noto-1.0.0.tgz": b"something else"})
    with pytest.raises(InputError, match=r"sets-noto-1.0.0.tgz has hash sha512-.*, not sha512-.*; delete it and run"):
        render_icons(tmp_path)
    assert not (tmp_path / "icons.npz").exists()


def test_npm_is_not_installed(sets, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        InputError, match=r"npm is not installed; install it, or put the npm package @sets/noto@1.0.0 at"
    ):
        render_icons(tmp_path)


def npm(monkeypatch, returned, stderr="", writes=None):
    """Put a program in npm's place; `writes` are files that it leaves in its folder."""
    commands = []

    def run(command, cwd, **_):
        commands.append(command)
        for name, content in (writes or {}).items():
            (rendering.Path(cwd) / name).write_bytes(content)
        return rendering.subprocess.CompletedProcess(command, returned, "", stderr)

    monkeypatch.setattr(rendering.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(rendering.subprocess, "run", run)
    return commands


def test_npm_fails(sets, tmp_path, monkeypatch):
    npm(monkeypatch, 1, "npm ERR! network\nnpm ERR! code ENOTFOUND\n")
    with pytest.raises(InputError, match="npm cannot fetch @sets/noto@1.0.0 .*ENOTFOUND.*; or put it at") as caught:
        render_icons(tmp_path)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_npm_packs_the_version(sets, tmp_path, monkeypatch):
    commands = npm(monkeypatch, 0, writes=sets)
    path = rendering._fetched(rendering.NOTO, tmp_path)
    assert path.read_bytes() == sets["sets-noto-1.0.0.tgz"]
    assert commands == [["/bin/npm", "pack", "--silent", "@sets/noto@1.0.0"]]
    assert [file.name for file in tmp_path.iterdir()] == ["sets-noto-1.0.0.tgz"]
    rendering._fetched(rendering.NOTO, tmp_path)
    assert len(commands) == 1


def test_the_renderer_is_not_installed(sets, tmp_path, monkeypatch):
    monkeypatch.setattr(rendering.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="resvg_py is not installed; run: pip install resvg_py"):
        render_icons(tmp_path)


def drawn(box):
    image = Image.new("RGBA", (160, 160))
    ImageDraw.Draw(image).rectangle(box, fill=(0, 200, 0, 255))
    return image


def test_icons_are_cropped_centered_and_enlarged():
    rgba = rendering._cropped(drawn((10, 20, 49, 99)))
    assert rgba.shape == (160, 160, 4)
    rows, columns = np.nonzero(rgba[..., 3] > 127)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (0, 159, 40, 119)
    assert rgba[80, 80].tolist() == [0, 200, 0, 255]


def test_an_icon_with_too_little_to_see_is_left_out():
    assert rendering._cropped(drawn((0, 0, 29, 29))) is None
    assert rendering._cropped(drawn((0, 0, 39, 39))) is not None


@pytest.mark.parametrize(
    ("name", "is_object"), [("teapot", True), ("owl", True), ("sun-with-face", False), ("red-flag", False)]
)
def test_what_is_no_single_object_is_left_out(name, is_object):
    assert (rendering._NO_OBJECT.search(name) is None) == is_object
