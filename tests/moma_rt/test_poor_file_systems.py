"""Files on file systems that lack calls: what cannot be had is left out, and finished work is kept."""

import errno
import os
import stat
import warnings
from pathlib import Path

import pytest

from moma_rt import files
from moma_rt.errors import MomaWarning
from moma_rt.files import (
    atomic_write,
    copy,
    move,
    remove_tree,
    replace,
    set_mode,
    sync,
)
from tests.moma_rt.test_files import write, write_anew


def refuse(code: int):
    """A system call that fails with an error code."""

    def call(*_, **__):
        raise OSError(code, os.strerror(code))

    return call


@pytest.fixture(autouse=True)
def warned_before() -> None:
    """Forget which warnings other tests have caused."""
    files._warn_once.cache_clear()


class TestPoorFileSystems:
    """What a file system lacks is left out; what is finished stays."""

    @pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS])
    def test_no_permissions(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int):
        monkeypatch.setattr(os, "chmod", refuse(code))
        with pytest.warns(MomaWarning, match="cannot set permissions"):
            write_anew(tmp_path / "a")
        assert (tmp_path / "a").read_bytes() == b"new"

    def test_permissions_are_set_only_if_they_differ(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(os, "chmod", refuse(errno.EPERM))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            write(tmp_path / "a")

    @pytest.mark.parametrize("code", [errno.EINVAL, errno.EIO, errno.EBADF, errno.ENOSPC, errno.EACCES])
    def test_folders_cannot_be_flushed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int):
        fsync = os.fsync
        monkeypatch.setattr(
            os, "fsync", lambda handle: refuse(code)() if stat.S_ISDIR(os.fstat(handle).st_mode) else fsync(handle)
        )
        with pytest.warns(MomaWarning, match="cannot flush a folder") as caught:
            write(tmp_path / "a")
        assert len(caught) == 1
        assert (tmp_path / "a").read_bytes() == b"new"

    def test_nothing_can_be_flushed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(os, "fsync", refuse(errno.ENOSYS))
        with pytest.warns(MomaWarning) as caught:
            write(tmp_path / "a")
        assert {str(warning.message).split(" (")[0] for warning in caught} == {
            "the file system cannot flush a file",
            "the file system cannot flush a folder",
        }
        assert (tmp_path / "a").read_bytes() == b"new"

    @pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
    def test_a_device_that_is_full_or_broken(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int):
        (tmp_path / "a").write_bytes(b"old")
        monkeypatch.setattr(os, "fsync", refuse(code))
        with pytest.raises(OSError, match=os.strerror(code)) as caught:
            write(tmp_path / "a")
        assert caught.value.filename == str(tmp_path / "a")
        assert (tmp_path / "a").read_bytes() == b"old"
        assert os.listdir(tmp_path) == ["a"]

    def test_folders_cannot_be_opened(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        open_file = os.open
        monkeypatch.setattr(
            os, "open", lambda path, *rest: refuse(errno.EACCES)() if os.path.isdir(path) else open_file(path, *rest)
        )
        write(tmp_path / "a")
        assert (tmp_path / "a").read_bytes() == b"new"

    @pytest.mark.parametrize("code", [errno.EBUSY, errno.EACCES, errno.EEXIST, errno.EXDEV, errno.ENOSYS])
    @pytest.mark.parametrize("before", [None, b"old and longer"])
    def test_no_renaming(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, before: bytes | None):
        if before is not None:
            (tmp_path / "a").write_bytes(before)
        monkeypatch.setattr(os, "replace", refuse(code))
        with pytest.warns(MomaWarning, match="overwritten in place"):
            write(tmp_path / "a")
        assert (tmp_path / "a").read_bytes() == b"new"
        assert os.listdir(tmp_path) == ["a"]

    def test_no_renaming_and_no_space(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        (tmp_path / "new").write_bytes(b"new")
        monkeypatch.setattr(os, "replace", refuse(errno.EBUSY))
        monkeypatch.setattr("shutil.copyfileobj", refuse(errno.ENOSPC))
        with pytest.raises(OSError, match="No space left"):
            replace(tmp_path / "new", tmp_path / "a")
        assert os.listdir(tmp_path) == ["new"]

    def test_no_renaming_of_folders(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        (tmp_path / "from" / "inner").mkdir(parents=True)
        (tmp_path / "from" / "inner" / "b").write_bytes(b"b")
        for name in "az":
            (tmp_path / "from" / name).write_bytes(name.encode())
        (tmp_path / "from" / "z").chmod(0o444)
        moved, rename = [], os.rename

        def only_files(source, target):
            if os.path.isdir(source):
                refuse(errno.EXDEV)()
            moved.append(os.path.basename(target))
            rename(source, target)

        monkeypatch.setattr(os, "rename", only_files)
        move(tmp_path / "from", tmp_path / "to", last="a")
        assert moved[-1] == "a"
        assert sorted(p.relative_to(tmp_path / "to").as_posix() for p in (tmp_path / "to").rglob("*")) == [
            *("a", "inner", "inner/b", "z")
        ]

    def test_no_renaming_at_all(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        (tmp_path / "from").mkdir()
        (tmp_path / "from" / "a").write_bytes(b"a")
        (tmp_path / "from" / "a").chmod(0o444)
        monkeypatch.setattr(os, "rename", refuse(errno.ENOSYS))
        move(tmp_path / "from", tmp_path / "to", last="a")
        assert (tmp_path / "to" / "a").read_bytes() == b"a"
        assert stat.S_IMODE((tmp_path / "to" / "a").stat().st_mode) == 0o444

    def test_a_copy_that_fails_is_deleted(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        (tmp_path / "a").write_bytes(b"a")
        monkeypatch.setattr("shutil.copyfileobj", refuse(errno.ENOSPC))
        with pytest.raises(OSError, match="No space") as caught:
            copy(tmp_path / "a", tmp_path / "b")
        assert caught.value.filename == str(tmp_path / "b")
        assert os.listdir(tmp_path) == ["a"]

    def test_read_only_files_are_deleted(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        """On Windows that needs another mode first."""
        (tmp_path / "folder" / "inner").mkdir(parents=True)
        (tmp_path / "folder" / "inner" / "a").touch(0o444)
        unlink = os.unlink

        def as_on_windows(path, *, dir_fd=None):
            if not os.stat(path, dir_fd=dir_fd).st_mode & stat.S_IWRITE:
                refuse(errno.EACCES)()
            unlink(path, dir_fd=dir_fd)

        monkeypatch.setattr(os, "unlink", as_on_windows)
        monkeypatch.setattr("shutil._use_fd_functions", False)
        remove_tree(tmp_path / "folder")
        assert not (tmp_path / "folder").exists()

    def test_one_warning_for_many_files(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(os, "fsync", refuse(errno.ENOSYS))
        with pytest.warns(MomaWarning) as caught:
            [write(tmp_path / name) for name in "abc"]
        assert len(caught) == 2

    def test_a_tree_that_is_not_there(self, tmp_path: Path):
        remove_tree(tmp_path / "none")

    def test_a_mode_or_flush_of_what_is_not_there(self, tmp_path: Path):
        for call in (lambda: set_mode(tmp_path / "none", 0o444), lambda: sync(tmp_path / "none")):
            with pytest.raises(FileNotFoundError):
                call()


def test_an_overwrite_that_fails_half_way_keeps_the_complete_file(tmp_path, monkeypatch):
    path = tmp_path / "picture.png"
    path.write_text("former")

    def refuse(*_):
        raise OSError(errno.EBUSY, "Device or resource busy")

    def stop(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, to: refuse() if to == path else replace(self, to))
    monkeypatch.setattr("moma_rt.files.shutil.copyfileobj", stop)
    kept = tmp_path / "picture.complete.png"
    with (
        pytest.raises(OSError, match=f"No space left on device; the complete file is {kept}"),
        atomic_write(path) as new,
    ):
        new.write_text("new")
    assert kept.read_text() == "new"
    assert sorted(tmp_path.iterdir()) == [kept, path]
