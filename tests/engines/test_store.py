import json
import os
from pathlib import Path

import pytest

from engines.store import NetworkRequest, NetworkStore
from moma_rt.errors import InputError
from moma_rt.files import sha256_file
from moma_rt.specs import NetworkSpec, Precision, TensorSpec

SPEC = NetworkSpec("some_network", (TensorSpec("x", "float32", (1,)),), (TensorSpec("y", "float32", (1,)),))
REQUEST = NetworkRequest(SPEC, Precision.FP32, "0123456789abcdef" + "f" * 48, "model.onnx")
PLACE = "networks/some_network-0123456789abcdef"


def write(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"graph")
    (folder / "model.onnx.data").write_bytes(b"weights")


@pytest.fixture
def store(tmp_path: Path) -> NetworkStore:
    return NetworkStore(tmp_path / "bundle")


def entries(store: NetworkStore) -> list[str]:
    return sorted(path.name for path in (store.root / "networks").iterdir())


def test_what_was_added_is_found(store):
    with store.locked():
        assert store.find(REQUEST) is None
        added = store.add(REQUEST, write)
        assert store.find(REQUEST) == added
    assert added.entry.onnx == f"{PLACE}/model.onnx"
    assert added.entry.files == (f"{PLACE}/model.onnx", f"{PLACE}/model.onnx.data")
    assert added.files[f"{PLACE}/model.onnx"].sha256 == sha256_file(store.root / PLACE / "model.onnx")


def test_a_failed_write_leaves_nothing(store):
    def fail(folder: Path) -> None:
        write(folder)
        raise KeyboardInterrupt

    with store.locked():
        with pytest.raises(KeyboardInterrupt):
            store.add(REQUEST, fail)
        assert entries(store) == []


@pytest.mark.parametrize(
    "record", ["", "{", "[]", '{"files": []}', '{"files": {"x": {"sha256": "0"}}}', "[" * 100_000, '{"files": 1}']
)
def test_a_damaged_record_is_no_network(store, record):
    with store.locked():
        store.add(REQUEST, write)
        (store.root / PLACE / "network.json").write_text(record)
        assert store.find(REQUEST) is None


def test_a_truncated_file_is_no_network_and_is_replaced(store):
    with store.locked():
        store.add(REQUEST, write)
        (store.root / PLACE / "model.onnx.data").write_bytes(b"weig")
        assert store.find(REQUEST) is None
        store.add(REQUEST, write)
        assert (store.root / PLACE / "model.onnx.data").read_bytes() == b"weights"


def test_a_folder_of_something_else_is_refused(tmp_path):
    precious = tmp_path / "networks" / "mine" / "weights.bin"
    precious.parent.mkdir(parents=True)
    precious.write_text("x")
    with pytest.raises(InputError, match="holds other files and no bundle"), NetworkStore(tmp_path).locked():
        pytest.fail("locked")
    assert precious.read_text() == "x"
    assert os.listdir(tmp_path) == ["networks"]


def test_only_its_own_folders_are_deleted(store):
    with store.locked():
        store.add(REQUEST, write)
        for name in ("notes", "some_network-old", ".partial-abc", "some_network-00000000000000aa"):
            (store.root / "networks" / name).mkdir()
    with store.locked():
        assert ".partial-abc" not in entries(store)

        class Manifest:
            networks = {}

        store.remove_unused(Manifest)
    assert entries(store) == ["notes", "some_network-old"]


def test_one_build_at_a_time(store):
    with (
        store.locked(),
        pytest.raises(InputError, match="another build is writing it"),
        NetworkStore(store.root).locked(),
    ):
        pytest.fail("locked twice")


def test_an_unfinished_build_may_continue(store):
    with store.locked():
        store.add(REQUEST, write)
    with store.locked():
        assert store.find(REQUEST) is not None


def test_the_record_names_hashes_and_sizes(store):
    with store.locked():
        store.add(REQUEST, write)
    record = json.loads((store.root / PLACE / "network.json").read_text())
    assert record["files"][f"{PLACE}/model.onnx"] == {
        "sha256": sha256_file(store.root / PLACE / "model.onnx"),
        "size": 5,
    }
