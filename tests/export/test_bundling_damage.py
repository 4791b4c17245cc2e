"""What a build repairs and leaves behind: damage, kills and full disks; exporting only writes a few bytes here."""

import collections
import json
import shutil
from pathlib import Path

import pytest

from engines.store import SharedStore
from export import bundling
from export.network_weights import WeightGroup
from export.networks import NETWORKS
from moma_rt.bundle.manifest import Bundle
from moma_rt.errors import CheckpointError, InputError
from tests.export.bundles import SMALL, build, checkpoint_of, contents, folders, overwrite, verify

STAGES = [(name, stage) for name in SMALL for stage in ("checking", "writing", "hashing", "tracing", "built")]


def truncate(folder):
    path = folder / "lowered.onnx"
    overwrite(path, path.read_bytes()[:-1])


def alter(folder):
    path = folder / "model.onnx"
    overwrite(path, path.read_bytes()[::-1])


def lose(folder):
    (folder / "model.onnx").unlink()


def unreadable_record(folder):
    (folder / "record.json").write_text("{")


DAMAGES = [truncate, alter, lose, unreadable_record]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("names", [SMALL, ("text_encoder",)], ids=["all", "only"])
def test_a_damaged_network_is_repaired(tmp_path, exports, written, damage, names):
    build(tmp_path)
    before = contents(tmp_path)
    damage(tmp_path / "networks" / folders(tmp_path)["text_encoder"][0])
    exports.clear()
    written.clear()
    build(tmp_path, names)
    verify(tmp_path)
    assert exports == ["text_encoder"]
    assert written == []
    assert contents(tmp_path) == before


@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: content[:-1] + b"x", lambda _: None])
@pytest.mark.parametrize("in_store", [False, True], ids=["bundle", "store as well"])
@pytest.mark.parametrize("names", [SMALL, ("text_encoder",)], ids=["all", "only"])
def test_damaged_weights_are_written_anew(tmp_path, exports, written, damage, in_store, names):
    """No graph is exported, since only weights were lost."""
    root, shared = tmp_path / "bundle", SharedStore(tmp_path / "store")
    build(root, shared=shared)
    before, place = contents(root), folders(root, "weights")["text_encoder"][0]
    path = root / "weights" / place / "weights.safetensors"
    content = damage(path.read_bytes())
    if content is None:
        path.unlink()
    elif in_store:
        overwrite(path, content)
    else:
        path.unlink()
        path.write_bytes(content)
    if in_store and content is None:
        shutil.rmtree(shared.root / "weights" / place)
    exports.clear()
    written.clear()
    build(root, names, shared=shared)
    verify(root)
    assert exports == []
    assert written == (["text_encoder"] if in_store else []), "an intact one in the store is linked"
    assert contents(root) == before
    assert path.samefile(shared.root / "weights" / place / path.name)


def test_a_bundle_without_its_weights_is_completed_by_the_same_build(tmp_path, exports, written):
    build(tmp_path, NETWORKS)
    before, graphs = contents(tmp_path), folders(tmp_path)
    shutil.rmtree(tmp_path / "weights")
    exports.clear()
    written.clear()
    said = []
    build(tmp_path, NETWORKS, report=lambda *line: said.append(line))
    verify(tmp_path)
    assert exports == []
    assert sorted(written) == sorted({*NETWORKS, "unet"})
    assert contents(tmp_path) == before
    assert folders(tmp_path) == graphs
    built = {name: state.partition(": ")[2] for name, state in said if state.startswith("built")}
    assert built == {**{name: name for name in NETWORKS}, "subject_encoder": "unet, subject_encoder"}


def test_a_build_without_graphs_ignores_a_lost_graph(tmp_path, exports):
    build(tmp_path)
    lose(tmp_path / "networks" / folders(tmp_path)["text_encoder"][0])
    build(tmp_path, graphs=False)
    networks = verify(tmp_path).manifest.networks
    assert {name: bool(entry.graphs) for name, entry in networks.items()} == {
        "text_encoder": False,
        "context_projector": True,
    }


def test_only_drops_another_network_that_is_damaged(tmp_path, exports):
    build(tmp_path)
    truncate(tmp_path / "networks" / folders(tmp_path)["context_projector"][0])
    build(tmp_path, ["text_encoder"])
    assert list(verify(tmp_path).manifest.networks) == ["text_encoder"]


@pytest.mark.parametrize("content", ["", "{", "null", '{"format_version": 99}', "[" * 100_000])
def test_a_manifest_that_cannot_be_read_is_replaced(tmp_path, exports, content):
    build(tmp_path)
    before = contents(tmp_path)
    (tmp_path / "manifest.json").write_text(content)
    exports.clear()
    build(tmp_path)
    assert exports == []
    assert contents(tmp_path) == before


def test_a_path_out_of_the_bundle_is_not_followed(tmp_path, exports):
    out = tmp_path / "bundle"
    build(out)
    (tmp_path / "precious").write_text("keep")
    data = json.loads((out / "manifest.json").read_text())
    data["files"]["../precious"] = {"sha256": "0" * 64, "size": 4}
    (out / "manifest.json").write_text(json.dumps(data))
    build(out)
    verify(out)
    assert (tmp_path / "precious").read_text() == "keep"


def test_leftovers_of_a_killed_build_are_removed(tmp_path, exports):
    build(tmp_path)
    before = contents(tmp_path)
    (tmp_path / "networks" / ".partial-x").mkdir()
    (tmp_path / "networks" / ".partial-x" / "model.onnx").write_text("half")
    (tmp_path / ".partial-y.json").write_text("half a manifest")
    (tmp_path / "tokenizers" / ".partial-z.json").write_text("half a tokenizer")
    build(tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("over", ["nothing", "an earlier bundle"])
@pytest.mark.parametrize("at", STAGES, ids="-".join)
def test_interrupted_at_each_stage(tmp_path, exports, written, over, at):
    old = None
    if over == "an earlier bundle":
        build(tmp_path, checkpoint=checkpoint_of(SMALL, seed=1))
        old = Bundle.open(tmp_path).manifest
    exports.clear()
    written.clear()

    def interrupt(network, stage):
        if (network, stage.split()[0]) == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, report=interrupt)
    assert not list(tmp_path.rglob(".partial-*"))
    if old is None:
        assert not (tmp_path / "manifest.json").exists()
    else:
        bundle = Bundle.open(tmp_path)
        bundle.verify(bundle.manifest.files)
        assert bundle.manifest == old
    finished, weights, done = list(exports), list(written), collections.Counter()
    exports.clear()
    written.clear()
    build(tmp_path, report=lambda network, stage: done.update({network: stage == "kept"}))
    verify(tmp_path)
    assert [name for name in SMALL if done[name]] == finished
    assert exports == [name for name in SMALL if name not in finished]
    # At "hashing" the weights have no final name yet, so they are written again.
    assert written == [name for name in SMALL if name not in weights or (name, "hashing") == at]


def test_a_disk_that_is_full_while_exporting(tmp_path, monkeypatch, exports):
    build(tmp_path, ["text_encoder"])
    before = contents(tmp_path)

    def fail(request, folder):
        (folder / "model.onnx").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bundling, "export_network", fail)
    with pytest.raises(InputError, match="No space left on device") as caught:
        build(tmp_path)
    assert "\n" not in str(caught.value)
    found = contents(tmp_path)
    kept = {name for name in found.keys() - before.keys() if name.startswith("weights/context_projector-")}
    assert {name: content for name, content in found.items() if name not in kept} == before, "nothing else was added"
    assert {Path(name).name for name in kept} == {"record.json", "weights.safetensors"}, "complete, for the next build"


def test_a_disk_that_is_full_while_writing_weights(tmp_path, monkeypatch, exports):
    build(tmp_path, ["text_encoder"])
    before = contents(tmp_path)

    def fail(group, folder):
        (folder / "weights.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(WeightGroup, "write", fail)
    with pytest.raises(InputError, match="No space left on device") as caught:
        build(tmp_path)
    assert "\n" not in str(caught.value)
    assert contents(tmp_path) == before


def test_a_checkpoint_that_cannot_be_read_is_not_blamed_on_the_bundle(tmp_path, monkeypatch, exports):
    def fail(group, folder):
        raise OSError(5, "Input/output error", "/checkpoints/unet.safetensors")

    monkeypatch.setattr(WeightGroup, "write", fail)
    with pytest.raises(OSError, match="Input/output error") as caught:
        build(tmp_path / "bundle")
    assert caught.value.filename == "/checkpoints/unet.safetensors"


def test_an_unusable_tokenizer_shows_before_any_work(tmp_path, monkeypatch, exports):
    def refuse():
        raise CheckpointError("no tokenizer")

    monkeypatch.setattr("export.tokenizers.synthetic_text_tokenizer", refuse)
    with pytest.raises(CheckpointError):
        build(tmp_path / "bundle")
    assert exports == []
    assert not (tmp_path / "bundle").exists()


def test_a_packed_bundle_is_not_built_into(tmp_path, exports):
    root = tmp_path / "bundle"
    build(root)
    manifest = json.loads((root / "manifest.json").read_text())
    (root / "manifest.json").write_text(json.dumps({**manifest, "packed_for": "sm86"}))
    before = contents(root)
    with pytest.raises(InputError, match="was packed for sm86: build in the whole bundle"):
        build(root)
    assert contents(root) == before
