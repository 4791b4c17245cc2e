"""The lock of a bundle: held by one process at a time, and absent where the file system has none."""

import errno
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from engines.lock import build_lock
from moma_rt.errors import InputError, MomaWarning

HOLD = """
import sys
from pathlib import Path
from engines.lock import build_lock
with build_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def refuse(code: int):
    def flock(*_):
        raise OSError(code, os.strerror(code))

    return flock


def take(path: Path) -> None:
    with build_lock(path):
        pass


def test_another_process_holds_it_until_it_is_killed(tmp_path: Path, repository: Path):
    command = [sys.executable, "-c", HOLD, str(tmp_path / ".lock")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=repository, text=True, **pipes) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=f"{tmp_path}: another build is writing it"):
            take(tmp_path / ".lock")
        holder.kill()
        holder.wait()
        take(tmp_path / ".lock")


def test_the_file_stays_empty_and_nothing_is_left_beside_it(tmp_path: Path):
    for _ in range(2):
        with build_lock(tmp_path / ".lock"):
            assert os.listdir(tmp_path) == [".lock"]
        assert os.listdir(tmp_path) == [".lock"]
    assert (tmp_path / ".lock").stat().st_size == 0


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES])
def test_errors_that_mean_another_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int):
    monkeypatch.setattr("fcntl.flock", refuse(code))
    with pytest.raises(InputError, match="another build is writing it; wait for it or choose another folder"):
        take(tmp_path / ".lock")


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.EIO])
def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int):
    monkeypatch.setattr("fcntl.flock", refuse(code))
    with pytest.warns(MomaWarning, match="cannot be locked") as caught:
        take(tmp_path / ".lock")
    assert [str(w.message) for w in caught] == [
        f"{tmp_path} cannot be locked ({os.strerror(code)}): make sure that no other build writes it"
    ]
    assert os.listdir(tmp_path) == [".lock"]


def test_a_read_only_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / ".lock").touch(0o444)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write any file
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        take(tmp_path / ".lock")
    assert (tmp_path / ".lock").stat().st_mode & 0o777 == 0o644


def test_a_file_that_cannot_be_written(tmp_path: Path):
    (tmp_path / ".lock").mkdir()
    with pytest.raises(IsADirectoryError):
        take(tmp_path / ".lock")


def test_a_link_is_replaced(tmp_path: Path):
    """In a cache of Hugging Face's hub it leads to the blob of all empty files."""
    (tmp_path / "blob").touch()
    (tmp_path / ".lock").symlink_to("blob")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        take(tmp_path / ".lock")
    assert not (tmp_path / ".lock").is_symlink()


def test_without_the_module_for_locks(tmp_path: Path, repository: Path):
    code = "import sys; sys.modules['fcntl'] = None\n" + HOLD
    command = [sys.executable, "-W", "ignore:only soft", "-c", code, str(tmp_path / ".lock")]
    done = subprocess.run(
        command, cwd=repository, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert done.stdout == "held\n", done.stderr
    assert "cannot be locked (fcntl is unavailable)" in done.stderr


def test_an_error_inside_passes(tmp_path: Path):
    def fail() -> None:
        with build_lock(tmp_path / ".lock"):
            raise OSError(errno.ENOSPC, "No space left on device")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(OSError, match="No space left"):
            fail()
