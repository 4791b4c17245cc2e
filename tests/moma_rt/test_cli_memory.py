"""The command line's memory budgets."""

from moma_rt.cli import entry


def test_inspect_tells_what_fits(fake_bundle, subject, tmp_path, capsys):
    subject.save(tmp_path / "car.subject")
    assert entry(["inspect", str(fake_bundle), "--budget", "8GB"]) == 0
    out = capsys.readouterr().out
    assert "in 7.45 GiB: ONNX files, by their size" in out
    assert "denoiser + vae_decoder" in out
    assert "every network stays loaded" in out
    assert entry(["inspect", str(fake_bundle), "--budget", "10B"]) == 0
    assert "the bundle does not fit: too large are text_encoder, " in capsys.readouterr().out
    assert entry(["inspect", str(fake_bundle), "--budget", "eight"]) == 2
    assert "such as 8GB or 512MiB, not 'eight'" in capsys.readouterr().err
    assert entry(["inspect", str(tmp_path / "car.subject"), "--budget", "8GB"]) == 2
    assert "--budget and --tensors are for bundles" in capsys.readouterr().err


def test_a_memory_budget_that_is_too_small(fake_bundle, photo, mask, tmp_path, capsys):
    photo.save(tmp_path / "photo.png")
    mask.save(tmp_path / "mask.png")
    arguments = [fake_bundle, tmp_path / "photo.png", tmp_path / "mask.png", "--name", "car"]
    arguments += ["--out", tmp_path / "car.subject", "--memory-budget", "5", "--backend", "onnxruntime"]
    assert entry(["enroll", *map(str, arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "moma-rt: error: text_encoder: 45 B of memory needed, the memory budget is 5 B: raise it"
    assert not (tmp_path / "car.subject").exists()
