import pytest

from engines.prune import main
from engines.store import Artifact, SharedStore, Store


def test_pruning_frees_the_folders_of_a_deleted_bundle(tmp_path, capsys):
    shared = SharedStore(tmp_path / ".store")
    store = Store(tmp_path / "bundle", shared)

    def write(folder):
        (folder / "model.onnx").write_bytes(bytes(2_000_000))
        return {}

    with store.locked():
        stored = store.add(Artifact("networks", "denoiser", "0" * 64), write)
    assert main([str(shared.root)]) == 0
    assert capsys.readouterr().out == f"{shared.root}: 0.0 MB freed\n"
    for path in (store.root / stored.folder).iterdir():
        path.unlink()
    assert main([str(shared.root)]) == 0
    assert capsys.readouterr().out == f"{shared.root}: 2.0 MB freed\n"
    assert not (shared.root / stored.folder).exists()


@pytest.mark.parametrize("make", ["nothing", "a bundle"])
def test_only_a_store_is_pruned(tmp_path, capsys, make):
    if make == "a bundle":
        (tmp_path / "networks" / "denoiser-0000000000000000").mkdir(parents=True)
        (tmp_path / "manifest.json").write_text("{}")
    assert main([str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("engines.prune: error: ")
    assert err.count("\n") == 1
    assert make == "nothing" or (tmp_path / "networks" / "denoiser-0000000000000000").is_dir()
