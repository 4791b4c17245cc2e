import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from export.checkpoints.weights import content_hash, open_weights
from tests.export.checkpoints.state_dicts import assert_same, error_of

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1.5, -2.0], dtype=torch.float16)}


def shard(folder: Path, extension: str) -> None:
    names = ("model-00001-of-00002", "model-00002-of-00002")
    weight_map = {}
    for stem, name in zip(names, TENSORS, strict=True):
        weight_map[name] = stem + extension
        one = {name: TENSORS[name]}
        (save_file if extension == ".safetensors" else torch.save)(one, folder / weight_map[name])
    stem = "model" if extension == ".safetensors" else "pytorch_model"
    (folder / f"{stem}{extension}.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("name", ["x.bin", "x.pt", "x.pth", "x.th", "x.ckpt", "x.safetensors"])
def test_single_file(tmp_path, name):
    save = save_file if name.endswith(".safetensors") else torch.save
    save(TENSORS, tmp_path / name)
    weights = open_weights(tmp_path / name)
    assert weights.shapes == {"a.weight": (2, 3), "b": (2,)}
    assert_same(weights.read(TENSORS), TENSORS)


def test_only_the_named_tensors_are_read(tmp_path):
    shard(tmp_path, ".safetensors")
    weights = open_weights(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    assert_same(weights.read(["a.weight"]), {"a.weight": TENSORS["a.weight"]})
    assert "model-00002" in error_of(weights.read, ["b"])
    save_file({"c": TENSORS["b"]}, tmp_path / "model-00002-of-00002.safetensors")
    assert "changed" in error_of(weights.read, ["b"])


def test_legacy_pickle_and_training_checkpoint(tmp_path):
    torch.save(TENSORS, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    assert_same(open_weights(tmp_path / "old.bin").read(TENSORS), TENSORS)
    torch.save({"state_dict": TENSORS, "global_step": 7}, tmp_path / "run.ckpt")
    assert_same(open_weights(tmp_path / "run.ckpt").read(TENSORS), TENSORS)


@pytest.mark.parametrize("extension", [".safetensors", ".bin"])
def test_shards(tmp_path, extension):
    shard(tmp_path, extension)
    weights = open_weights(tmp_path)
    assert len(weights.files) == 3
    assert_same(weights.read(TENSORS), TENSORS)


def test_shards_may_be_links_out_of_the_folder(tmp_path):
    folder, blobs = tmp_path / "snapshot", tmp_path / "blobs"
    folder.mkdir()
    blobs.mkdir()
    shard(folder, ".safetensors")
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(blobs / str(number))
    assert_same(open_weights(folder).read(TENSORS), TENSORS)


@pytest.mark.parametrize(
    ("present", "chosen"),
    [
        (["model.safetensors", "model.fp16.safetensors", "pytorch_model.bin"], "model.safetensors"),
        (["model.fp16.safetensors", "pytorch_model.bin"], "model.fp16.safetensors"),
        (["pytorch_model.fp16.bin", "diffusion_pytorch_model.bin"], "diffusion_pytorch_model.bin"),
        (["diffusion_pytorch_model.fp16.bin"], "diffusion_pytorch_model.fp16.bin"),
    ],
)
def test_choice_among_variants(tmp_path, present, chosen):
    for name in present:
        (save_file if name.endswith(".safetensors") else torch.save)(TENSORS, tmp_path / name)
    assert open_weights(tmp_path).files == (tmp_path / chosen,)


def test_sharded_variant(tmp_path):
    save_file(TENSORS, tmp_path / "part.safetensors")
    index = {"weight_map": dict.fromkeys(TENSORS, "part.safetensors")}
    (tmp_path / "model.safetensors.index.fp16.json").write_text(json.dumps(index))
    assert_same(open_weights(tmp_path).read(TENSORS), TENSORS)


def test_missing(tmp_path):
    assert "does not exist" in error_of(open_weights, tmp_path / "no.safetensors")
    message = error_of(open_weights, tmp_path)
    assert "looked for" in message
    assert "safetensors" in message
    (tmp_path / "a.npz").write_bytes(b"zip")
    assert "not a weights file" in error_of(open_weights, tmp_path / "a.npz")


@pytest.mark.parametrize("name", ["x.safetensors", "x.bin", "old.bin"])
@pytest.mark.parametrize("kept", [0, 5, 100, 0.5, 0.95])
def test_truncated(tmp_path, name, kept):
    path = tmp_path / name
    if name == "x.safetensors":
        save_file(TENSORS, path)
    else:
        torch.save(TENSORS, path, _use_new_zipfile_serialization=name == "x.bin")
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    message = error_of(open_weights, path)
    assert str(path) in message
    assert "truncated" in message


def test_garbage_and_lfs_pointer(tmp_path):
    for name in ("x.safetensors", "x.th"):
        (tmp_path / name).write_bytes(b"\xff" * 64)
        assert "corrupt" in error_of(open_weights, tmp_path / name)
        (tmp_path / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
        assert "git lfs pull" in error_of(open_weights, tmp_path / name)


def test_bad_indexes(tmp_path):
    shard(tmp_path, ".safetensors")
    index = tmp_path / "model.safetensors.index.json"
    good = json.loads(index.read_text())["weight_map"]
    (tmp_path / "model-00002-of-00002.safetensors").rename(tmp_path / "kept")
    assert "lacks model-00002-of-00002.safetensors" in error_of(open_weights, tmp_path)
    (tmp_path / "kept").rename(tmp_path / "model-00002-of-00002.safetensors")
    index.write_text(json.dumps({"weight_map": {**good, "c": good["b"]}}))
    assert "lacks c" in error_of(open_weights, tmp_path)
    for text in ("{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}'):
        index.write_text(text)
        assert index.name in error_of(open_weights, tmp_path)


@pytest.mark.parametrize("place", ["../secret.bin", "/etc/passwd", "sub/x.bin", "..\\x.bin", "..", "", 3, None])
def test_index_that_leaves_its_folder(tmp_path, place):
    torch.save(TENSORS, tmp_path / "secret.bin")
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    torch.save(TENSORS, folder / "sub" / "x.bin")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"b": place}}))
    message = error_of(open_weights, folder)
    assert "not a file of its own folder" in message or "lacks" in message


def test_content_hash_depends_on_names_and_contents_only(tmp_path):
    first, second = tmp_path / "1", tmp_path / "2"
    for folder in (first, second):
        folder.mkdir()
        (folder / "a").write_bytes(b"x")
        (folder / "b").write_bytes(b"y")
    same = content_hash([first / "a", first / "b"])
    assert same == content_hash([second / "b", second / "a"])
    (second / "b").write_bytes(b"z")
    assert same != content_hash([second / "a", second / "b"])
    (first / "b").rename(first / "c")
    assert same != content_hash([first / "a", first / "c"])
    assert "cannot be read" in error_of(content_hash, [first / "gone"])
