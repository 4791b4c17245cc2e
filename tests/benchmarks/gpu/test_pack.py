"""Packing what a call carries to the GPU machine: archive parts, bundles, and the size limit."""

import io
import sys
import tarfile
from types import SimpleNamespace

import pytest

from benchmarks.gpu import pack
from benchmarks.gpu.carried import RTX_PART
from benchmarks.gpu.pack import main, pack_bundle, parts_of, sources_mib
from benchmarks.gpu.prepare import keep_parts
from benchmarks.gpu.rtx_probe import library, unpack
from moma_rt.errors import BundleError, MomaError


@pytest.fixture
def archive():
    """The archive of a small module in place of TensorRT-RTX."""
    packed, text = io.BytesIO(), b"__version__ = '9.9'\n"
    with tarfile.open(fileobj=packed, mode="w:xz") as target:
        info = tarfile.TarInfo("./tensorrt_rtx.py")
        info.size = len(text)
        target.addfile(info, io.BytesIO(text))
    return packed.getvalue()


@pytest.fixture
def not_installed(monkeypatch):
    """Hide an installed TensorRT-RTX; afterwards, restore the module that was imported before."""
    monkeypatch.setattr("sys.path", ["-"])
    before = sys.modules.pop("tensorrt_rtx", None)
    yield
    sys.modules.pop("tensorrt_rtx", None)
    if before is not None:
        sys.modules["tensorrt_rtx"] = before


def test_parts_are_divided_between_two_calls(archive, not_installed, tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "rtx_archive", lambda: archive)
    monkeypatch.setattr(pack, "_PART_BYTES", 100)
    monkeypatch.setattr(pack, "sources_mib", lambda root: 0.0)
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "old.whl").touch()
    assert main(["--rtx", "--no-wheels", "--out", str(tmp_path)]) == 0
    first, second = ([path.name for path in sorted((tmp_path / call).iterdir())] for call in ("first", "second"))
    assert first == [f"{RTX_PART}00"]
    assert second == [f"{RTX_PART}{number:02d}" for number in range(1, -(-len(archive) // 100))]
    # On the GPU machine, the first call has kept its part in the work folder.
    work = tmp_path / "first"
    assert library(tmp_path / "second", work).__version__ == "9.9"
    assert sorted(path.name for path in work.iterdir()) == ["rtx", f"{RTX_PART}00"]


def test_an_empty_folder_is_filled_and_others_are_left_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pack, "sources_mib", lambda root: 0.0)
    assert main(["--no-wheels", "--out", str(tmp_path)]) == 0
    for other in ("mine", "first/mine"):
        (tmp_path / other).mkdir()
        assert main(["--no-wheels", "--out", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert "holds other files, such as mine; give a new or an empty folder" in error
        assert error.count("\n") == 1
        (tmp_path / other).rmdir()


def test_a_part_that_was_carried_and_kept_counts_once(archive, not_installed, tmp_path):
    work, carried = tmp_path / "work", tmp_path / "carried"
    for folder in (work, carried):
        folder.mkdir()
    for number, part in enumerate(parts_of(archive, 100)):
        (carried / f"{RTX_PART}{number:02d}").write_bytes(part)
    keep_parts(sorted(carried.iterdir()), work)
    assert library(carried, work).__version__ == "9.9"


def test_a_missing_part_is_reported(archive, tmp_path):
    parts = [tmp_path / f"{RTX_PART}{number:02d}" for number in range(3)]
    for path, part in zip(parts, parts_of(archive, -(-len(archive) // 3)), strict=True):
        path.write_bytes(part)
    with pytest.raises(MomaError, match=r"rtx.tar.xz.00, rtx.tar.xz.02 are not a complete archive"):
        unpack([parts[2], parts[0]], tmp_path / "rtx")
    assert not (tmp_path / "rtx").exists()


@pytest.fixture
def bundle(tmp_path, monkeypatch):
    """A folder with the files of a manifest and leftovers of interrupted builds."""
    named = ("engines/denoiser-1/engine.pt2", "tokenizers/text.json", "weights/unet-1/weights.safetensors")
    left = ("engines/.partial-x/engine.pt2", "engines/denoiser-0/engine.pt2", "engines/denoiser-0/record.json", "core")
    records = ("engines/denoiser-1/record.json", "weights/unet-1/record.json")
    for name in (*named, *left, *records, "manifest.json"):
        path = tmp_path / "bundle" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    manifest = SimpleNamespace(engines=("one",), files=dict.fromkeys(named))
    monkeypatch.setattr(pack, "read_manifest", lambda folder: manifest)
    return tmp_path / "bundle"


def test_leftovers_and_weights_are_not_packed(bundle, tmp_path):
    pack_bundle(bundle, tmp_path / "bundle.tar.xz")
    with tarfile.open(tmp_path / "bundle.tar.xz") as files:
        assert files.getnames() == [
            "bundle/engines/denoiser-1/engine.pt2",
            "bundle/engines/denoiser-1/record.json",
            "bundle/manifest.json",
            "bundle/tokenizers/text.json",
        ]


def test_a_bundle_that_lacks_a_file_is_not_packed(bundle, tmp_path):
    (bundle / "tokenizers" / "text.json").unlink()
    with pytest.raises(BundleError, match=r"bundle: tokenizers/text.json is missing; build the bundle again"):
        pack_bundle(bundle, tmp_path / "bundle.tar.xz")
    assert not (tmp_path / "bundle.tar.xz").exists()


def test_more_than_the_size_limit_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pack, "sources_mib", lambda root: 64.5)
    assert main(["--no-wheels", "--out", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "the first and the second call would carry more than 64 MiB: move tests/goldens" in captured.err


def test_the_sources_are_what_git_does_not_ignore(repository):
    assert 10 < sources_mib(repository) < 40
