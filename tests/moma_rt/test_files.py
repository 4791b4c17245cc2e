import hashlib
import os
import stat
from pathlib import Path

import pytest

from moma_rt import files
from moma_rt.files import (
    atomic_write,
    atomic_write_all,
    entries,
    is_stray,
    path_inside,
    sha256_file,
)


def write(path: Path, content: bytes = b"new") -> None:
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


def write_anew(path: Path) -> None:
    """Let the writer replace the temporary file by one that only its owner may read, as some do."""
    with atomic_write(path) as temporary:
        temporary.unlink()
        temporary.touch(0o600)
        temporary.write_bytes(b"new")


@pytest.fixture(autouse=True)
def warned_before() -> None:
    """Forget which warnings other tests have caused."""
    files._warn_once.cache_clear()


class TestAtomicWrite:
    def test_file_appears_only_when_complete(self, tmp_path: Path):
        path = tmp_path / "a.bin"
        with atomic_write(path) as temporary:
            temporary.write_bytes(b"new")
            assert not path.exists()
        assert path.read_bytes() == b"new"
        assert os.listdir(tmp_path) == ["a.bin"]

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
    def test_failure_leaves_the_old_file_and_nothing_else(self, tmp_path: Path, error: type[BaseException]):
        path = tmp_path / "a.bin"
        path.write_bytes(b"old")

        def write() -> None:
            with atomic_write(path) as temporary:
                temporary.write_bytes(b"half")
                raise error

        with pytest.raises(error):
            write()
        assert path.read_bytes() == b"old"
        assert os.listdir(tmp_path) == ["a.bin"]

    def test_temporary_is_in_the_same_folder_and_keeps_the_suffix(self, tmp_path: Path):
        with atomic_write(tmp_path / "new" / "picture.png") as temporary:
            assert temporary.parent == tmp_path / "new"
            assert temporary.suffix == ".png"

    @pytest.mark.parametrize("umask", [0o022, 0o077])
    def test_file_has_the_mode_of_any_other_new_file(self, tmp_path: Path, umask: int):
        before = os.umask(umask)
        try:
            with atomic_write(tmp_path / "a") as temporary:
                temporary.write_bytes(b"")
            assert os.umask(umask) == umask
        finally:
            os.umask(before)
        assert (tmp_path / "a").stat().st_mode & 0o777 == 0o666 & ~umask

    def test_writer_may_replace_the_temporary(self, tmp_path: Path):
        with atomic_write(tmp_path / "a") as temporary:
            temporary.unlink()
            temporary.write_bytes(b"another file")
        assert (tmp_path / "a").read_bytes() == b"another file"

    def test_folder_in_the_way(self, tmp_path: Path):
        (tmp_path / "a").mkdir()

        def write() -> None:
            with atomic_write(tmp_path / "a") as temporary:
                temporary.write_bytes(b"x")

        with pytest.raises(IsADirectoryError):
            write()
        assert os.listdir(tmp_path) == ["a"]

    def test_umask_is_left_alone(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(os, "umask", lambda _: pytest.fail("other threads create files with it"))
        with atomic_write(tmp_path / "a") as temporary:
            temporary.write_bytes(b"x")

    def test_mode_of_a_replaced_temporary_is_restored(self, tmp_path: Path):
        (tmp_path / "new").touch()
        write_anew(tmp_path / "a")
        assert (tmp_path / "a").stat().st_mode == (tmp_path / "new").stat().st_mode

    @pytest.mark.parametrize("name", ["x" * 255, "x." + "y" * 253])
    def test_the_longest_name(self, tmp_path: Path, name: str):
        with atomic_write(tmp_path / name) as temporary:
            temporary.write_bytes(b"x")
        assert os.listdir(tmp_path) == [name]

    @pytest.mark.parametrize("name", ["file/a.bin", "x" * 256])
    def test_error_names_the_file_that_was_asked_for(self, tmp_path: Path, name: str):
        (tmp_path / "file").touch()
        with pytest.raises(OSError, match=name) as caught, atomic_write(tmp_path / name) as temporary:
            temporary.write_bytes(b"x")
        assert caught.value.filename == str(tmp_path / name)
        assert os.listdir(tmp_path) == ["file"]


class TestAtomicWriteAll:
    def test_none_appears_before_all_are_written(self, tmp_path: Path):
        paths = [tmp_path / "a.png", tmp_path / "new" / "b.png"]
        with atomic_write_all(paths) as temporaries:
            for temporary in temporaries:
                temporary.write_bytes(temporary.name.encode())
                assert not any(path.exists() for path in paths)
        assert [path.read_text() for path in paths] == [temporary.name for temporary in temporaries]
        assert sorted(os.listdir(tmp_path)) == ["a.png", "new"]

    def test_a_failure_at_the_last_leaves_none(self, tmp_path: Path):
        def write() -> None:
            with atomic_write_all([tmp_path / "a", tmp_path / "b"]) as (first, second):
                first.write_bytes(b"x")
                second.unlink()

        with pytest.raises(FileNotFoundError) as caught:
            write()
        assert caught.value.filename == str(tmp_path / "b")
        assert os.listdir(tmp_path) == []

    def test_no_files(self):
        with atomic_write_all([]) as temporaries:
            assert temporaries == []


@pytest.mark.parametrize("size", [0, 1, (1 << 22) - 1, 1 << 22, (1 << 22) + 1])
def test_sha256_file_equals_hashlib(tmp_path: Path, size: int):
    content = bytes(i % 251 for i in range(1000)) * (size // 1000 + 1)
    (tmp_path / "a").write_bytes(content[:size])
    assert sha256_file(tmp_path / "a") == hashlib.sha256(content[:size]).hexdigest()


class TestReplacedFiles:
    @pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o444])
    def test_keeps_its_mode(self, tmp_path: Path, mode: int):
        (tmp_path / "a").write_bytes(b"old")
        (tmp_path / "a").chmod(mode)
        write(tmp_path / "a")
        assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == mode
        assert (tmp_path / "a").read_bytes() == b"new"

    def test_is_never_readable_by_more_people(self, tmp_path: Path):
        (tmp_path / "a").touch(0o600)
        with atomic_write(tmp_path / "a") as temporary:
            assert stat.S_IMODE(temporary.stat().st_mode) == 0o600

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a file away")
    def test_keeps_its_owner(self, tmp_path: Path):
        (tmp_path / "a").touch(0o640)
        os.chown(tmp_path / "a", 12345, 23456)
        write(tmp_path / "a")
        found = (tmp_path / "a").stat()
        assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (12345, 23456, 0o640)

    def test_a_link_stays_and_its_target_is_replaced(self, tmp_path: Path):
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "real").write_bytes(b"old")
        (tmp_path / "link").symlink_to("elsewhere/real")
        with atomic_write(tmp_path / "link") as temporary:
            assert temporary.parent == tmp_path / "elsewhere"
            temporary.write_bytes(b"new")
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "elsewhere" / "real").read_bytes() == b"new"

    def test_a_link_to_nothing_gets_its_target(self, tmp_path: Path):
        (tmp_path / "link").symlink_to("new")
        write(tmp_path / "link")
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "new").read_bytes() == b"new"

    def test_links_in_a_circle(self, tmp_path: Path):
        (tmp_path / "a").symlink_to("b")
        (tmp_path / "b").symlink_to("a")
        with pytest.raises(OSError, match="symbolic links"):
            write(tmp_path / "a")
        assert sorted(os.listdir(tmp_path)) == ["a", "b"]

    def test_a_link_is_replaced_if_it_is_not_to_be_followed(self, tmp_path: Path):
        (tmp_path / "blob").write_bytes(b"old")
        (tmp_path / "blob").chmod(0o400)
        (tmp_path / "link").symlink_to("blob")
        with atomic_write(tmp_path / "link", through_links=False) as temporary:
            temporary.write_bytes(b"new")
        assert not (tmp_path / "link").is_symlink()
        assert (tmp_path / "blob").read_bytes() == b"old"
        assert os.access(tmp_path / "link", os.W_OK)

    def test_other_hard_links_keep_the_old_content(self, tmp_path: Path):
        (tmp_path / "a").write_bytes(b"old")
        os.link(tmp_path / "a", tmp_path / "b")
        write(tmp_path / "a")
        assert (tmp_path / "b").read_bytes() == b"old"


class TestStrayFiles:
    @pytest.mark.parametrize(
        "name",
        [
            *(".nfs000000000123", ".DS_Store", "Thumbs.db", "thumbs.db", "desktop.ini", "._model.onnx", ".directory"),
            *(".fuse_hidden0000abcd00000001", "@eaDir", ".Spotlight-V100", ".Trashes", ".fseventsd", "lost+found"),
            *("$RECYCLE.BIN", "System Volume Information", ".Trash-1000", "model.onnx~", ".model.onnx.swp", "Icon\r"),
            *(".#model.onnx", "#model.onnx#", ".goutputstream-X7Q2K2", "ehthumbs.db", ".smbdelete10001"),
        ],
    )
    def test_left_by_a_system(self, name: str):
        assert is_stray(name)

    @pytest.mark.parametrize(
        "name", ["model.onnx", "weights.safetensors", ".hidden", "record.json", "Thumbs.db.onnx", ".nfs", "DS_Store"]
    )
    def test_of_a_user(self, name: str):
        assert not is_stray(name)

    def test_entries(self, tmp_path: Path):
        for name in ("b", ".DS_Store", "a"):
            (tmp_path / name).touch()
        assert [path.name for path in entries(tmp_path)] == ["a", "b"]


class TestPathInside:
    @pytest.mark.parametrize("name", ["a", "a/b.onnx", "./a", "a/./b", "..a", "a..", "…", "a b"])
    def test_stays(self, tmp_path: Path, name: str):
        assert path_inside(tmp_path, name) == tmp_path / name

    @pytest.mark.parametrize(
        "name",
        ["", ".", "/etc/passwd", "..", "../x", "a/../../x", "a/..", "a\\..\\b", "a\0b", "C:x", "C:/x", "a:stream"],
    )
    def test_leaves(self, tmp_path: Path, name: str):
        with pytest.raises(ValueError, match="leaves its folder"):
            path_inside(tmp_path, name)

    def test_links_are_the_users_own(self, tmp_path: Path):
        (tmp_path / "blobs").mkdir()
        (tmp_path / "blobs" / "0123").write_bytes(b"x")
        (tmp_path / "root").mkdir()
        (tmp_path / "root" / "file").symlink_to("../blobs/0123")
        assert path_inside(tmp_path / "root", "file").read_bytes() == b"x"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes on this system")
@pytest.mark.parametrize("linked", [False, True])
def test_a_pipe_or_folder_is_not_replaced(tmp_path, linked):
    """As root, /dev/null would be replaced by a file for everyone."""
    pipe, folder = tmp_path / "pipe", tmp_path / "folder"
    os.mkfifo(pipe)
    folder.mkdir()
    for place, reason in ((pipe, "is a device or pipe, not a file"), (folder, "is a folder")):
        path = place
        if linked:
            path = tmp_path / f"link to {place.name}"
            path.symlink_to(place)
        with pytest.raises(OSError, match=reason) as caught, atomic_write(path) as temporary:
            temporary.write_text("new")
        assert caught.value.filename == str(path)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert folder.is_dir()
