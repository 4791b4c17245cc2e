"""The full-size export: how it sums up the bytes of a bundle's files, and which output folders it accepts."""

import pytest

from benchmarks.builds import engine_builds, full_size
from benchmarks.builds.full_size import file_bytes, used_folder
from moma_rt.bundle.manifest import Bundle


def test_shared_weights_are_counted_once(tiny_bundle):
    manifest = Bundle.open(tiny_bundle).manifest
    sizes = file_bytes(manifest)
    groups = {f"weights of {name}" for name in (*manifest.networks, "unet")}
    assert set(sizes) == groups | {"graphs"}
    on_disk = {path for kind in ("networks", "weights") for path in tiny_bundle.glob(f"{kind}/*/*")}
    assert sum(sizes.values()) == sum(path.stat().st_size for path in on_disk if path.name != "record.json")
    assert sizes["weights of unet"] > 20 * sizes["weights of denoiser"]


def test_a_new_or_empty_folder_is_accepted(tmp_path):
    assert used_folder(tmp_path) == used_folder(tmp_path / "new") == ""


@pytest.mark.parametrize("module", [full_size, engine_builds])
def test_a_folder_with_files_is_refused(module, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine").touch()
    for out in (tmp_path, tmp_path / "mine"):
        monkeypatch.setattr("sys.argv", ["x", "--out", str(out)])
        with pytest.raises(SystemExit) as stopped:
            module.main()
        assert stopped.value.code == 2
        assert f"error: --out {out}: is not an empty folder" in capsys.readouterr().err.splitlines()[-1]
