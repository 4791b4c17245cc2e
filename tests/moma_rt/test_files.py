import hashlib
import os
from pathlib import Path

import pytest

from moma_rt.files import atomic_write, atomic_write_all, resolve_inside, sha256_file


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
        with atomic_write(tmp_path / "a") as temporary:
            temporary.unlink()
            temporary.touch(0o600)
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


class TestResolveInside:
    @pytest.mark.parametrize("name", ["a", "a/b.onnx", "./a", "a/./b", "..a", "a..", "…", "a b"])
    def test_stays(self, tmp_path: Path, name: str):
        assert resolve_inside(tmp_path, name) == tmp_path / name

    @pytest.mark.parametrize("name", ["", ".", "/etc/passwd", "..", "../x", "a/../../x", "a/..", "a\\..\\b", "a\0b"])
    def test_leaves(self, tmp_path: Path, name: str):
        with pytest.raises(ValueError, match="leaves its folder"):
            resolve_inside(tmp_path, name)

    def test_link_out_of_the_folder(self, tmp_path: Path):
        root = tmp_path / "root"
        root.mkdir()
        (tmp_path / "secret").write_bytes(b"x")
        (root / "file").symlink_to(tmp_path / "secret")
        (root / "folder").symlink_to(tmp_path)
        for name in ("file", "folder/secret", "folder/not-there"):
            with pytest.raises(ValueError, match="through a link"):
                resolve_inside(root, name)

    def test_link_within_the_folder(self, tmp_path: Path):
        (tmp_path / "real").write_bytes(b"x")
        (tmp_path / "link").symlink_to("real")
        assert resolve_inside(tmp_path, "link").read_bytes() == b"x"

    def test_root_that_is_itself_a_link(self, tmp_path: Path):
        (tmp_path / "real").mkdir()
        (tmp_path / "root").symlink_to("real")
        assert resolve_inside(tmp_path / "root", "a") == tmp_path / "root" / "a"

    def test_sibling_with_the_same_prefix(self, tmp_path: Path):
        (tmp_path / "root").mkdir()
        (tmp_path / "root-secret").mkdir()
        (tmp_path / "root" / "link").symlink_to(tmp_path / "root-secret")
        with pytest.raises(ValueError, match="through a link"):
            resolve_inside(tmp_path / "root", "link/x")
