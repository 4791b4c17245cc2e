"""Folders that tests share."""

import pytest
from filelock import FileLock

from tests.conftest import SLOW_FILES
from tests.sharing import SharedFolders


@pytest.fixture
def workers(tmp_path_factory, monkeypatch):
    """Two workers of one run."""

    class Factory:
        def __init__(self, base):
            self.base = base

        def getbasetemp(self):
            self.base.mkdir()
            return self.base

    run = tmp_path_factory.mktemp("run")
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    return [SharedFolders(Factory(run / name)) for name in ("popen-gw0", "popen-gw1")]


def write(folder):
    folder.mkdir()
    (folder / "file").write_text("content")


def test_a_folder_is_built_once_for_all_workers(workers):
    built = []
    folders = [worker.build("a", lambda folder: (built.append(folder), write(folder))) for worker in workers]
    assert built == folders[:1]
    assert folders[0] == folders[1]
    assert (folders[0] / "file").read_text() == "content"
    assert [worker.changed() for worker in workers] == [[], []]


def test_a_build_that_fails_is_repeated(workers):
    def fail(folder):
        write(folder)
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        workers[0].build("a", fail)
    assert workers[1].build("a", write).joinpath("file").exists()


def test_a_folder_is_locked_while_it_is_built(workers):
    def build(folder):
        write(folder)
        with pytest.raises(TimeoutError):
            FileLock(folder.with_name("lock"), timeout=0, is_singleton=False).acquire()

    workers[0].build("a", build)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda folder: (folder / "file").write_text("another"), ["a/file"]),
        (lambda folder: (folder / "new").touch(), ["a/new"]),
        (lambda folder: (folder / "file").unlink(), ["a/file"]),
    ],
)
def test_what_a_test_changed_is_named(workers, change, named):
    change(workers[0].build("a", write))
    assert workers[0].changed() == named


def test_the_files_that_run_first_exist(repository):
    assert [name for name in SLOW_FILES if not (repository / "tests" / name).is_file()] == []
