"""Files of a bundle that are links, pipes, strays or unreadable."""

import errno
import os
from pathlib import Path

import pytest

from moma_rt.bundle.manifest import MANIFEST_NAME, Bundle, write_manifest
from moma_rt.errors import BundleError
from moma_rt.files import sha256_file
from tests.moma_rt.bundle import test_manifest
from tests.moma_rt.bundle.test_manifest import ONNX, WEIGHTS, make_manifest, open_error

# The fixture.
root = test_manifest.root


def in_a_cache(root: Path) -> None:
    """Lay a bundle out as Hugging Face's hub does: links to files named by their hashes, in a folder beside."""
    blobs = root.parent / "blobs"
    blobs.mkdir()
    for path in [path for path in root.rglob("*") if path.is_file()]:
        blob = path.rename(blobs / sha256_file(path))
        path.symlink_to(os.path.relpath(blob, path.parent))


class TestOpen:
    def test_pipe_in_place_of_a_file(self, root: Path):
        for name in (WEIGHTS, MANIFEST_NAME):
            (root / name).unlink()
            os.mkfifo(root / name)
            assert "is not a file" in open_error(root)

    def test_links_into_another_folder(self, root: Path):
        """As in a cache of Hugging Face's hub."""
        in_a_cache(root)
        bundle = Bundle.open(root)
        bundle.verify(bundle.manifest.files)
        (root / WEIGHTS).resolve().write_bytes(b"weightz" * 100)
        with pytest.raises(BundleError, match="was altered"):
            bundle.verify([WEIGHTS])

    def test_link_to_nothing(self, root: Path):
        in_a_cache(root)
        (root / WEIGHTS).resolve().unlink()
        message = open_error(root)
        assert f"{WEIGHTS} is missing: it is a link to ../../../blobs/" in message
        assert "cp -rL" in message

    @pytest.mark.parametrize("stray", [".DS_Store", "._model.onnx", ".nfs000000000123", "Thumbs.db", ".directory"])
    @pytest.mark.parametrize("folder", [ONNX, WEIGHTS])
    def test_files_that_systems_leave_are_ignored(self, root: Path, stray: str, folder: str):
        (root / folder).with_name(stray).touch()
        Bundle.open(root)

    def test_folder_that_systems_leave_is_ignored(self, root: Path):
        (root / ONNX).with_name("@eaDir").mkdir()
        Bundle.open(root)

    def test_other_file_is_to_be_deleted(self, root: Path):
        (root / ONNX).with_name("model.onnx.bak").touch()
        assert f"{ONNX}.bak is in no network of the manifest; delete it" in open_error(root)

    @pytest.mark.parametrize("name", [WEIGHTS, MANIFEST_NAME, str(Path(WEIGHTS).parent), ""])
    @pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ESTALE])
    def test_what_cannot_be_read(self, root: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int):
        place, stat = root / name, os.stat

        def refuse(path, *rest, **options):
            if isinstance(path, str | Path) and Path(path).is_relative_to(place):
                raise OSError(code, os.strerror(code), str(path))
            return stat(path, *rest, **options)

        monkeypatch.setattr(os, "stat", refuse)
        assert f"cannot be read: {os.strerror(code)}" in open_error(root)

    def test_folder_that_cannot_be_listed(self, root: Path, monkeypatch: pytest.MonkeyPatch):
        def refuse(_: Path) -> None:
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(Path, "iterdir", refuse)
        assert "cannot be read: Permission denied" in open_error(root)

    def test_root_stays_where_it_was_opened(self, root: Path, monkeypatch: pytest.MonkeyPatch):
        (root.parent / "current").symlink_to(root.name)
        monkeypatch.chdir(root.parent)
        for name in ("bundle", "current"):
            bundle = Bundle.open(name)
            assert bundle.root == root
        (root.parent / "current").unlink()
        (root.parent / "current").symlink_to("elsewhere")
        monkeypatch.chdir("/")
        bundle.verify(bundle.manifest.files)

    def test_a_manifest_that_is_a_link_is_replaced(self, root: Path):
        in_a_cache(root)
        blob = (root / MANIFEST_NAME).resolve()
        before = blob.read_bytes()
        write_manifest(root, make_manifest({}))
        assert blob.read_bytes() == before
        assert not (root / MANIFEST_NAME).is_symlink()
