"""Comparing a bundle with PyTorch: the errors, the output, and the detection of a wrong network."""

import dataclasses
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from export import compare
from export.compare import Difference, difference, main, worst
from export.safetensors_writer import places
from moma_rt.bundle.engines import Device
from moma_rt.bundle.manifest import Bundle, FileEntry, read_manifest, write_manifest
from moma_rt.bundle.specs import Precision
from moma_rt.errors import MomaWarning
from moma_rt.files import sha256_file


def test_the_worst_place_and_the_tolerance_that_would_have_passed():
    expected = np.arange(12.0).reshape(3, 4)
    found = expected.copy()
    found[2, 1] += 0.5
    found[0, 3] -= 0.25
    apart = difference("x", found, expected)
    assert apart.at == (2, 1)
    assert apart.tolerance == 0.5
    assert np.isclose(apart.relative, np.hypot(0.5, 0.25) / np.linalg.norm(expected))
    assert np.allclose(found, expected, rtol=0, atol=apart.tolerance)
    assert not np.allclose(found, expected, rtol=0, atol=0.99 * apart.tolerance)
    assert str(apart) == "x[2, 1] is worst: relative error 2.5e-02, passes with a tolerance of 5.0e-01"


def test_integers_are_compared_as_numbers():
    assert difference("image", np.uint8([[250, 3]]), np.uint8([[251, 3]])).tolerance == 1.0


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_pass_with_no_tolerance(value):
    apart = difference("x", np.array([1.0, value]), np.array([1.0, 2.0]))
    assert (apart.at, apart.tolerance, apart.relative) == ((1,), np.inf, np.inf)


def test_the_worst_output_is_shown():
    expected = {"a": np.ones(4), "b": np.full(4, 100.0)}
    found = {"a": np.ones(4) + 0.1, "b": np.full(4, 101.0)}
    assert worst(found, expected).tensor == "a"
    with pytest.raises(ValueError, match="shape"):
        worst({"a": np.ones(3), "b": found["b"]}, expected)


def test_every_network_of_a_bundle(tiny_bundle, capsys):
    assert main([str(tiny_bundle)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(Bundle.open(tiny_bundle).manifest.networks)
    for line in lines:
        error = float(re.search(r"relative error (\S+),", line)[1])
        assert error < (1e-2 if line.startswith("vae_decoder") else 1e-5), line


def test_a_lower_precision_and_its_worst_modules(tmp_path, capsys):
    root = built(tmp_path / "bundle", "--precision", "fp16", "--only", "text_encoder")
    capsys.readouterr()
    assert main([root, "--modules", "3"]) == 0
    first, *modules = capsys.readouterr().out.splitlines()
    assert first.startswith("text_encoder       fp16 onnxruntime: text_tokens[")
    assert 1e-5 < float(re.search(r"relative error (\S+),", first)[1]) < 1e-2
    errors = [float(line.split()[0]) for line in modules]
    assert len(errors) == 3
    assert errors == sorted(errors, reverse=True)
    assert all(0 < error < 1e-2 and "model." in line for error, line in zip(errors, modules, strict=True))


def built(out: Path, *options: str) -> str:
    from export.build import main as build

    assert build(["--base", "tiny", *options, "--out", str(out)]) == 0
    return str(out)


def test_random_weights_are_made_again_from_their_seed(tmp_path, capsys):
    root = built(tmp_path / "bundle", "--seed", "3", "--only", "context_projector")
    capsys.readouterr()
    assert main([root]) == 0
    assert float(re.search(r"relative error (\S+),", capsys.readouterr().out)[1]) < 1e-5


def test_a_network_that_no_backend_can_run_is_reported(tiny_bundle, monkeypatch, capsys):
    bundle = Bundle.open(tiny_bundle)
    entry = dataclasses.replace(bundle.network("text_encoder"), precision=Precision.BF16)
    networks = {**bundle.manifest.networks, "text_encoder": entry}
    bf16 = Bundle(tiny_bundle, dataclasses.replace(bundle.manifest, networks=networks))
    monkeypatch.setattr(Bundle, "open", lambda _: bf16)
    monkeypatch.setattr(compare, "local_device", lambda: None)
    assert main([str(tiny_bundle), "--only", "text_encoder"]) == 0
    assert capsys.readouterr().out == f"{'text_encoder':<18} bf16: no backend on this machine can run it\n"


def test_the_modules_of_int4_have_its_weights(tmp_path, capsys):
    root = built(tmp_path / "bundle", "--mllm-precision", "int4", "--only", "language_model")
    capsys.readouterr()
    assert main([root, "--modules", "1"]) == 0
    first, worst_module = capsys.readouterr().out.splitlines()
    assert 1e-2 < float(re.search(r"relative error (\S+),", first)[1]) < 1
    # fp16 alone changes no module by more than a few thousandths.
    assert float(worst_module.split()[0]) > 1e-2


@pytest.fixture
def wrong_bundle(tiny_bundle, tmp_path) -> Path:
    """The tiny bundle with one weight of the context projector changed, and its hashes updated."""
    root = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    manifest = read_manifest(root)
    (file,) = manifest.networks["context_projector"].weights
    tensors = {name: tensor.clone() for name, tensor in load_file(root / file).items()}
    places_before = places(root / file)
    weight = max(tensors, key=lambda name: tensors[name].numel())
    tensors[weight].view(-1)[0] += 1.0
    (root / file).chmod(0o644)
    with (root / file).open("r+b") as stream:
        # In its place, since the graphs refer to offsets in the file.
        stream.seek(places_before[weight].offset)
        stream.write(tensors[weight].numpy().tobytes())
    hashes = {file: FileEntry(sha256_file(root / file), (root / file).stat().st_size)}
    write_manifest(root, dataclasses.replace(manifest, files={**manifest.files, **hashes}))
    return root


def test_a_wrong_weight_is_seen(wrong_bundle, capsys):
    assert main([str(wrong_bundle), "--only", "context_projector"]) == 0
    assert float(re.search(r"relative error (\S+),", capsys.readouterr().out)[1]) > 1e-3


def test_engines_of_this_device_are_compared(tiny_bundle, monkeypatch, capsys):
    """Only the engine for this device is run; the device and the run are replaced."""
    from moma_rt.bundle.engines import EngineEntry, Flavour

    bundle = Bundle.open(tiny_bundle)
    entry = bundle.network("context_projector")
    engines = [
        EngineEntry(entry.spec.name, Flavour.TENSORRT, "11.4.0", (c,), False, entry.key, "e", entry.onnx, 1, 1, None)
        for c in (89, 90)
    ]
    bundle = Bundle(tiny_bundle, dataclasses.replace(bundle.manifest, engines=tuple(engines)))
    monkeypatch.setattr(compare, "local_device", lambda: Device("H100", 90))
    monkeypatch.setattr(compare, "is_installed", lambda name: True)
    monkeypatch.setattr(compare, "library_version", lambda flavour: "11.4.0")
    monkeypatch.setattr(compare, "outputs_of", lambda backend, spec, path, weights, inputs: (backend, path, weights))
    found = list(compare.runs(bundle, entry, {"embedding": np.ones((1, 1024), np.float32)}))
    path, weights = bundle.path(entry.onnx), tuple(map(bundle.path, entry.weights))
    assert found == [
        ("onnxruntime", ("onnxruntime", path, weights)),
        ("tensorrt 11.4.0 on H100", ("tensorrt", path, ())),
    ]
    # On a CPU only engines for CPUs are compared.
    monkeypatch.setattr(compare, "local_device", lambda: None)
    assert len(list(compare.runs(bundle, entry, {"embedding": np.ones((1, 1024), np.float32)}))) == 1
    monkeypatch.setattr(compare, "local_device", lambda: Device("H100", 90))
    monkeypatch.setattr(compare, "library_version", lambda flavour: "11.5.0")
    with pytest.warns(MomaWarning, match="was built by tensorrt 11.4.0, which is not installed here: not compared"):
        assert len(list(compare.runs(bundle, entry, {"embedding": np.ones((1, 1024), np.float32)}))) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["none"], "none is not a bundle"),
        (["{tiny}", "--only", "unet"], "no network unet"),
        (["{tiny}", "--modules", "-1"], "--modules -1"),
        (["{tiny}", "--base", "tiny", "--seed", "1"], "weights given are not those of"),
        (["{golden}"], "was made of unet from Realistic_Vision_V4.0_noVAE"),
    ],
)
def test_mistakes_are_one_line(tiny_bundle, golden_bundle, capsys, arguments, said):
    assert main([a.format(tiny=tiny_bundle, golden=golden_bundle) for a in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert err.count("\n") == 1


def test_a_difference_is_a_value():
    assert Difference("x", 0.0, 0.0, (0,)) == difference("x", np.ones(2), np.ones(2))
