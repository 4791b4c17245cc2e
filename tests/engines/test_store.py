import errno
import json
import os
import stat
from pathlib import Path

import pytest

from engines.store import Artifact, SharedStore, Store, link_or_copy
from moma_rt import files
from moma_rt.errors import InputError, MomaWarning
from moma_rt.files import sha256_file

NETWORK = Artifact("networks", "some_network", "0123456789abcdef" + "f" * 48)
ENGINE = Artifact("engines", "some_network", "f" * 64)
PLACE = "networks/some_network-0123456789abcdef"
KERNELS = Artifact("kernels", "some_network_sm80", "e" * 64)
WEIGHTS = Artifact("weights", "unet", "d" * 64)
ARTIFACTS = [NETWORK, WEIGHTS, ENGINE, KERNELS]
KINDS = [artifact.kind for artifact in ARTIFACTS]


def write(folder: Path) -> dict:
    (folder / "model.onnx").write_bytes(b"graph")
    (folder / "lowered.onnx").write_bytes(b"lowered")
    return {"activation_bytes": 7}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "bundle")


@pytest.fixture
def shared(tmp_path: Path) -> SharedStore:
    return SharedStore(tmp_path / "shared")


class Unused:
    """A manifest that names nothing."""

    networks: dict = {}  # noqa: RUF012
    engines = kernels = ()


def entries(store: Store | SharedStore, kind: str = "networks") -> list[str]:
    return sorted(path.name for path in (store.root / kind).iterdir())


def overwrite(path: Path, content: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(content)


@pytest.mark.parametrize("artifact", ARTIFACTS, ids=KINDS)
def test_an_added_folder_is_found(store, artifact):
    with store.locked():
        assert store.find(artifact) is None
        added = store.add(artifact, write)
        assert store.find(artifact) == added
    assert added.folder == artifact.folder
    assert sorted(added.files) == [f"{artifact.folder}/lowered.onnx", f"{artifact.folder}/model.onnx"]
    assert added.path("model.onnx") in added.files
    assert added.notes == {"activation_bytes": 7}
    sha256 = sha256_file(store.root / artifact.folder / "model.onnx")
    assert added.files[added.path("model.onnx")].sha256 == sha256
    record = json.loads((store.root / artifact.folder / "record.json").read_text())
    assert record["files"]["model.onnx"] == {"sha256": sha256, "size": 5}


def test_a_failed_write_leaves_nothing(store, shared):
    def fail(folder: Path) -> dict:
        write(folder)
        raise KeyboardInterrupt

    store = Store(store.root, shared)
    with store.locked():
        with pytest.raises(KeyboardInterrupt):
            store.add(NETWORK, fail)
        assert entries(store) == entries(shared) == []


@pytest.mark.parametrize(
    "record",
    [
        *("", "{", "[]", '{"files": []}', '{"files": {"x": {"sha256": "0"}}}', "[" * 100_000, '{"files": 1}'),
        '{"files": {}}',
        '{"files": {"../../outside": {"sha256": "0", "size": 1}}, "notes": {}}',
    ],
)
def test_a_folder_with_a_damaged_record_is_not_found(store, record):
    with store.locked():
        store.add(NETWORK, write)
        (store.root / PLACE / "record.json").write_text(record)
        assert store.find(NETWORK) is None


@pytest.mark.parametrize("content", [b"lowe", b"LOWERED"], ids=["truncated", "altered"])
def test_a_folder_with_a_damaged_file_is_not_found_and_is_replaced(store, content):
    with store.locked():
        store.add(NETWORK, write)
        overwrite(store.root / PLACE / "lowered.onnx", content)
        assert store.find(NETWORK) is None
        store.add(NETWORK, write)
        assert (store.root / PLACE / "lowered.onnx").read_bytes() == b"lowered"


def test_a_bundle_folder_with_other_files_is_refused(tmp_path):
    precious = tmp_path / "networks" / "mine" / "weights.bin"
    precious.parent.mkdir(parents=True)
    precious.write_text("x")
    with pytest.raises(InputError, match="holds other files and no bundle"), Store(tmp_path).locked():
        pytest.fail("locked")
    assert precious.read_text() == "x"
    assert os.listdir(tmp_path) == ["networks"]


@pytest.mark.parametrize("kind", KINDS)
def test_only_its_own_folders_are_deleted(store, kind):
    with store.locked():
        store.add(Artifact(kind, "some_network_sm80", "0" * 64), write)
        for name in ("notes", "some_network-old", ".partial-abc", "some_network-00000000000000aa"):
            (store.root / kind / name).mkdir()
    with store.locked():
        assert ".partial-abc" not in entries(store, kind)
        store.remove_unused(Unused)
    assert entries(store, kind) == ["notes", "some_network-old"]


def test_one_build_at_a_time(store):
    with (
        store.locked(),
        pytest.raises(InputError, match="another build is writing it"),
        Store(store.root).locked(),
    ):
        pytest.fail("locked twice")


def test_an_unfinished_build_may_continue(store):
    with store.locked():
        store.add(NETWORK, write)
    with store.locked():
        assert store.find(NETWORK) is not None


@pytest.mark.parametrize("artifact", ARTIFACTS, ids=KINDS)
def test_bundles_share_equal_folders(tmp_path, shared, artifact):
    first, second = Store(tmp_path / "a", shared), Store(tmp_path / "b", shared)
    with first.locked(), second.locked():
        added = first.add(artifact, write)
        assert second.find(artifact) == added
    places = [root / added.path("lowered.onnx") for root in (first.root, second.root, shared.root)]
    assert len({path.stat().st_ino for path in places}) == 1, "one file, three names"
    assert not os.access(places[0], os.W_OK) or os.geteuid() == 0


def test_without_links_files_are_copied(tmp_path, shared, monkeypatch):
    def refuse(source, target):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", refuse)
    first, second = Store(tmp_path / "a", shared), Store(tmp_path / "b", shared)
    with first.locked(), second.locked():
        assert second.find(NETWORK) is None
        added = first.add(NETWORK, write)
        assert second.find(NETWORK) == added
    assert (second.root / PLACE / "lowered.onnx").read_bytes() == b"lowered"


def test_a_damaged_folder_is_not_linked_into_another_bundle(tmp_path, shared):
    first, second = Store(tmp_path / "a", shared), Store(tmp_path / "b", shared)
    with first.locked(), second.locked():
        first.add(NETWORK, write)
        # Written in place, so the store's hard link shows the same content.
        overwrite(first.root / PLACE / "lowered.onnx", b"LOWERED")
        assert second.find(NETWORK) is None
        assert entries(shared) == []
        second.add(NETWORK, write)
        assert first.find(NETWORK) is not None, "the damaged folder is replaced by the second bundle's"


def test_a_store_that_cannot_be_written(store, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="--store .*file: cannot be written"):
        with Store(store.root, SharedStore(tmp_path / "file")).locked():
            pytest.fail("locked")


def test_pruning_keeps_what_a_bundle_uses(tmp_path, shared):
    bundle = Store(tmp_path / "a", shared)
    with bundle.locked():
        for artifact in ARTIFACTS:
            bundle.add(artifact, write)
        (shared.root / "networks" / "mine").mkdir()
        assert shared.prune() == 0
        bundle.remove_unused(Unused)
        (shared.root / "engines" / ".partial-killed").mkdir()
        (shared.root / "engines" / ".partial-file").touch()
        assert entries(shared) == ["mine", "some_network-0123456789abcdef"]
        assert shared.prune() > len(ARTIFACTS) * len(b"graphlowered")
        assert entries(shared) == ["mine"]
        assert entries(shared, "engines") == [".partial-file"]
        assert entries(shared, "kernels") == entries(shared, "weights") == []


def test_two_builds_may_add_the_same_folder(tmp_path, shared):
    first, second = Store(tmp_path / "a", shared), Store(tmp_path / "b", shared)
    with first.locked(), second.locked():
        assert first.add(NETWORK, write) == second.add(NETWORK, write)
    assert entries(shared) == ["some_network-0123456789abcdef"]


STRAYS = (".DS_Store", "._model.onnx", ".nfs000000000123", "Thumbs.db", "lost+found/")


def leave_strays(folder: Path) -> None:
    """Leave what operating systems leave in any folder; a name with a slash is a folder's."""
    for name in STRAYS:
        (folder / name).mkdir() if name.endswith("/") else (folder / name).touch()


def refuse(code: int):
    """A system call that fails with an error code."""

    def call(*_, **__):
        raise OSError(code, os.strerror(code))

    return call


def test_a_new_folder_with_files_that_systems_leave(store):
    store.root.mkdir()
    leave_strays(store.root)
    with store.locked():
        assert store.add(NETWORK, write)


def test_files_that_systems_leave_are_not_part_of_a_folder(tmp_path, shared):
    first, second = Store(tmp_path / "a", shared), Store(tmp_path / "b", shared)

    def write_among_strays(folder: Path) -> dict:
        leave_strays(folder)
        return write(folder)

    with first.locked(), second.locked():
        added = first.add(NETWORK, write_among_strays)
        assert {Path(name).name for name in added.files} == {"model.onnx", "lowered.onnx"}
        leave_strays(shared.root / "networks")
        (shared.root / PLACE / "@eaDir").mkdir()
        (shared.root / PLACE / ".DS_Store").touch()
        assert second.find(NETWORK) == added
        assert sorted(os.listdir(second.root / PLACE)) == ["lowered.onnx", "model.onnx", "record.json"]
        assert shared.prune() == 0
        for bundle in (first, second):
            bundle.remove_unused(Unused)
        assert shared.prune() > 0
        assert NETWORK.folder not in entries(shared)


def test_altered_notes_are_noticed(store):
    with store.locked():
        store.add(NETWORK, write)
        record = store.root / PLACE / "record.json"
        for before, after in (('"activation_bytes": 7', '"activation_bytes": 6'), ('"sha256"', '"sha257"')):
            content = record.read_text()
            record.write_text(
                content[: content.rindex(before)] + after + content[content.rindex(before) + len(before) :]
            )
            assert store.find(NETWORK) is None
            record.write_text(content)
        assert store.find(NETWORK) is not None


def test_a_record_without_a_hash_is_of_an_earlier_version(store):
    with store.locked():
        added = store.add(NETWORK, write)
        record = store.root / PLACE / "record.json"
        content = json.loads(record.read_text())
        del content["sha256"]
        record.write_text(json.dumps(content))
        assert store.find(NETWORK) == added


def test_relative_folders_stay_where_they_were(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = Store(Path("bundle"), SharedStore(Path("shared")))
    with store.locked():
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir("elsewhere")
        store.add(NETWORK, write)
    assert os.listdir(tmp_path / "elsewhere") == []
    assert (tmp_path / "shared" / PLACE / "model.onnx").is_file()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_store_that_fails_costs_no_work(tmp_path, shared, monkeypatch, code):
    bundle = Store(tmp_path / "a", shared)
    with bundle.locked():
        monkeypatch.setattr("engines.store.link_or_copy", refuse(code))
        with pytest.warns(
            MomaWarning, match=f"cannot be written .{os.strerror(code)}.: other bundles must build again"
        ):
            added = bundle.add(NETWORK, write)
        assert bundle.find(NETWORK) == added
        assert entries(shared) == []


def test_a_store_that_cannot_be_read_is_left_out(tmp_path, shared, monkeypatch):
    first, second = Store(tmp_path / "a", shared), Store(tmp_path / "b", shared)
    with first.locked(), second.locked():
        first.add(NETWORK, write)
        monkeypatch.setattr("engines.store.link_or_copy", refuse(errno.EIO))
        assert second.find(NETWORK) is None
        assert entries(second) == []


@pytest.mark.parametrize("lacking", ["os.chmod", "os.link", "os.fsync", "os.rename"])
def test_a_file_system_without_a_call(tmp_path, shared, monkeypatch, lacking):
    """Permissions, hard links, flushing, or renaming of folders: what is left out costs no work."""
    files._warn_once.cache_clear()
    first, second = Store(tmp_path / "a", shared), Store(tmp_path / "b", shared)
    monkeypatch.setattr(lacking, refuse(errno.ENOSYS))
    with first.locked(), second.locked():
        warned = lacking in ("os.chmod", "os.fsync")
        if warned:
            with pytest.warns(MomaWarning, match="the file system cannot") as caught:
                added = first.add(NETWORK, write)
            assert len(caught) <= 2
        else:
            added = first.add(NETWORK, write)
        assert second.find(NETWORK) == first.find(NETWORK) == added
    for root in (first.root, second.root, shared.root):
        assert sorted(os.listdir(root / PLACE)) == ["lowered.onnx", "model.onnx", "record.json"]
    assert entries(first) == entries(shared) == [Path(PLACE).name]


def test_without_links_copies_keep_the_mode(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "link")
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "a").chmod(0o444)
    link_or_copy(tmp_path / "a", tmp_path / "b")
    assert stat.S_IMODE((tmp_path / "b").stat().st_mode) == 0o444
    assert (tmp_path / "b").stat().st_nlink == 1


def test_a_symbolic_link_is_not_linked_itself(tmp_path):
    (tmp_path / "blob").write_bytes(b"a")
    (tmp_path / "link").symlink_to("blob")
    link_or_copy(tmp_path / "link", tmp_path / "file")
    assert not (tmp_path / "file").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"a"


def test_a_full_disk_leaves_nothing_half_written(store, monkeypatch):
    with store.locked():
        monkeypatch.setattr(os, "fsync", refuse(errno.ENOSPC))
        with pytest.raises(OSError, match="No space left"):
            store.add(NETWORK, write)
        assert entries(store) == []


def test_an_error_without_a_name_gets_that_of_the_bundle(store):
    def fail() -> None:
        with store.locked():
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left") as caught:
        fail()
    assert caught.value.filename == str(store.root)


def test_permissions_follow_those_of_the_process(store):
    before = os.umask(0o077)
    try:
        with store.locked():
            store.add(NETWORK, write)
    finally:
        os.umask(before)
    assert stat.S_IMODE((store.root / PLACE).stat().st_mode) == 0o700
