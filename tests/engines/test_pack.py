"""Packed bundles: which files they hold, how they describe what was left out, and what is refused."""

import dataclasses
import os

import pytest

from engines.builder import EnginePlan, build_engines, refuse_packed
from engines.pack import main, pack
from engines.targets import EngineTarget
from moma_rt.backends.selection import choose
from moma_rt.bundle.engines import Device, EngineEntry, Flavour, KernelsEntry, Library, select
from moma_rt.bundle.manifest import (
    LANGUAGE_TOKENIZER,
    TEXT_TOKENIZER,
    Bundle,
    FileEntry,
    Manifest,
    NetworkEntry,
    Source,
    read_manifest,
    write_manifest,
)
from moma_rt.bundle.specs import Geometry, NetworkSpec, Precision, SelfAttentionLayer
from moma_rt.errors import BundleError, InputError
from moma_rt.files import move, sha256_file
from moma_rt.inspection import describe_bundle

GEOMETRY = Geometry(64, 4, 8, 77, 6, 4, 16, (SelfAttentionLayer("mid_block", 8, 4, 2),), None)
NAMES = ("denoiser", "subject_encoder")
SHARED = "weights/unet-1/weights.safetensors"
ENGINES = (
    (Flavour.TENSORRT_RTX, (86, 89)),
    (Flavour.TENSORRT_RTX, (120,)),
    (Flavour.TENSORRT, (90,)),
    (Flavour.INDUCTOR, (90,)),
    (Flavour.INDUCTOR, (0,)),
)


@pytest.fixture
def bundle(tmp_path):
    """Two networks with every kind of file that a bundle can hold."""
    root, files, networks, engines = tmp_path / "whole", {}, {}, []

    def add(name):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"content of {name}")
        files[name] = FileEntry(sha256_file(root / name), (root / name).stat().st_size)
        return name

    for name in NAMES:
        graphs = (add(f"networks/{name}-1/model.onnx"), add(f"networks/{name}-1/lowered.onnx"))
        weights = (add(SHARED), add(f"weights/{name}-1/weights.safetensors"))
        networks[name] = NetworkEntry(NetworkSpec(name, (), ()), Precision.FP16, "k", "s", *graphs, weights)
        for index, (flavour, capabilities) in enumerate(ENGINES):
            file = add(f"engines/{name}-{index}/engine")
            add(f"engines/{name}-{index}/layers.json")
            source = "s" if flavour is Flavour.INDUCTOR else "k"
            engines.append(
                EngineEntry(name, flavour, "1", capabilities, False, source, f"e{index}", file, 1, 1, None, index != 3)
            )
    kernels = KernelsEntry("denoiser", 90, "k", add("kernels/denoiser_sm90-1/kernels.json"))
    add("kernels/denoiser_sm90-1/self.ptx")
    for tokenizer in (TEXT_TOKENIZER, LANGUAGE_TOKENIZER):
        add(tokenizer)
    sources = (Source("unet", "random", "0" * 64),)
    write_manifest(root, Manifest("tiny", "tests", GEOMETRY, networks, files, sources, tuple(engines), (kernels,)))
    return Bundle.open(root)


def contents(root):
    """Verify a bundle's files; return them without the manifest and the tokenizers."""
    packed = Bundle.open(root)
    packed.verify(packed.manifest.files)
    found = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    assert found == {*packed.manifest.files, "manifest.json"}
    return found - {"manifest.json", TEXT_TOKENIZER, LANGUAGE_TOKENIZER}


def engine_files(*indices):
    return {f"engines/{name}-{i}/{file}" for name in NAMES for i in indices for file in ("engine", "layers.json")}


WEIGHTS = {SHARED, *(f"weights/{name}-1/weights.safetensors" for name in NAMES)}
GRAPHS = {f"networks/{name}-1/model.onnx" for name in NAMES}


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("cpu", GRAPHS | WEIGHTS),
        ("sm86", engine_files(0)),
        ("rtx", engine_files(0, 1)),
        ("sm90", engine_files(2)),
        ("inductor", engine_files(3, 4) | WEIGHTS),
    ],
)
def test_a_packed_bundle_holds_what_the_target_needs_and_nothing_else(bundle, tmp_path, target, expected):
    packed = pack(bundle, target, tmp_path / "packed")
    assert contents(tmp_path / "packed") == expected
    assert packed.manifest.sources == bundle.manifest.sources
    assert packed.manifest.packed_for == target
    assert read_manifest(tmp_path / "packed") == packed.manifest
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_what_was_left_out_is_described(bundle, tmp_path, capsys):
    assert main([str(bundle.root), "--target", "sm86", "--out", str(tmp_path / "packed")]) == 0
    left_out = (
        "ONNX graphs; graphs for TensorRT 10.3; weights files; kernels for sm90; engines of inductor 1 for cpu; "
        "engines of inductor 1 for sm90; engines of tensorrt 1 for sm90; engines of tensorrt_rtx 1 for sm120"
    )
    assert f"left out: {left_out}" in capsys.readouterr().out
    described = describe_bundle(Bundle.open(tmp_path / "packed"))
    assert f"packed for  sm86; left out: {left_out}" in described
    assert f"{'denoiser':<20} {'fp16':<9} {'0 B':>10} {'none':>10}  k" in described


def test_shared_weights_and_unmeasured_kernels_are_described(bundle):
    described = describe_bundle(bundle)
    assert "denoiser and subject_encoder share unet-1, 45 B" in described
    assert described.count("kernels chosen by rule, not measured") == 1
    described = describe_bundle(bundle, tensors=True)
    assert described.count("kernels chosen by rule, not measured") == 1 + len(NAMES)


def test_files_are_not_stored_twice(bundle, tmp_path):
    pack(bundle, "cpu", tmp_path / "packed")
    assert os.path.samefile(tmp_path / "packed" / SHARED, bundle.root / SHARED)


class NoGpu:
    device, missing, has_cuda_provider = None, (), False

    def version(self, flavour):
        return "1"


def test_errors_name_the_target_that_was_packed(bundle, tmp_path):
    packed = pack(bundle, "sm86", tmp_path / "packed").manifest
    with pytest.raises(BundleError, match="no ONNX graphs, since it was packed for sm86: pack the whole bundle again"):
        choose("onnxruntime", packed, NoGpu())
    with pytest.raises(BundleError, match="it was packed for sm86; pack the whole bundle again for this device"):
        select(packed.engines, packed.networks, Library(Flavour.TENSORRT, "1"), Device("H100", 90), packed.packed_for)


def test_packages_for_a_cpu_are_chosen_without_a_gpu(bundle, tmp_path):
    packed = pack(bundle, "inductor", tmp_path / "packed").manifest
    found = choose("auto", packed, NoGpu())
    assert found.backend == "inductor"
    assert {engine.capabilities for engine in found.engines.values()} == {(0,)}


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("sm80", "has no engine of denoiser, subject_encoder for sm80: build them first"),
        ("rtx,cpu", "a bundle is packed for one target by its name"),
        ("local", "a bundle is packed for one target by its name"),
        ("sm12", "no target sm12"),
    ],
)
def test_targets_that_cannot_be_packed(bundle, tmp_path, capsys, target, says):
    assert main([str(bundle.root), "--target", target, "--out", str(tmp_path / "packed")]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not (tmp_path / "packed").exists()


def test_nothing_is_built_into_a_packed_bundle(bundle, tmp_path):
    pack(bundle, "cpu", tmp_path / "packed")
    before = contents(tmp_path / "packed")
    target = EngineTarget(Flavour.TENSORRT_RTX, (86,))
    with pytest.raises(InputError, match="was packed for cpu: build in the whole bundle, and pack that again"):
        build_engines(tmp_path / "packed", EnginePlan((target,)), None, lambda *_: None)
    with pytest.raises(InputError, match="was packed for cpu"):
        refuse_packed(read_manifest(tmp_path / "packed"), tmp_path / "packed")
    assert contents(tmp_path / "packed") == before


def test_engines_that_no_library_has_for_every_network(bundle, tmp_path):
    engines = [e for e in bundle.manifest.engines if (e.network, e.flavour) != ("denoiser", Flavour.TENSORRT)]
    write_manifest(bundle.root, dataclasses.replace(bundle.manifest, engines=tuple(engines)))
    with pytest.raises(BundleError, match="has no engine of denoiser for sm90: build them first"):
        pack(Bundle.open(bundle.root), "sm90", tmp_path / "packed")


def test_an_altered_file_is_not_packed(bundle, tmp_path, capsys):
    (bundle.root / SHARED).write_text("content of something else, as long"[:45].ljust(45))
    assert main([str(bundle.root), "--target", "inductor", "--out", str(tmp_path / "packed")]) == 2
    assert f"{SHARED} was altered" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["whole"]


def test_a_folder_that_cannot_be_written(bundle, capsys):
    assert main([str(bundle.root), "--target", "cpu", "--out", "/proc/packed"]) == 2
    assert "--out /proc/packed: cannot be written: No such file or directory" in capsys.readouterr().err


def test_a_bundle_that_changes_meanwhile(bundle, tmp_path, monkeypatch, capsys):
    def lose(source, target):
        source.unlink()
        raise FileNotFoundError(2, "No such file or directory", str(source))

    monkeypatch.setattr("engines.pack.link_or_copy", lose)
    assert main([str(bundle.root), "--target", "cpu", "--out", str(tmp_path / "packed")]) == 2
    assert f"{bundle.root} changed while it was packed: " in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["whole"]


def test_a_folder_with_something_in_it(bundle, tmp_path, capsys):
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "mine").write_text("")
    assert main([str(bundle.root), "--target", "cpu", "--out", str(tmp_path / "packed")]) == 2
    assert "holds other files" in capsys.readouterr().err
    (tmp_path / "packed" / "mine").unlink()
    for stray in (".DS_Store", "desktop.ini"):
        (tmp_path / "packed" / stray).touch()
    for folder in ("lost+found", ".partial-killed"):
        (tmp_path / "packed" / folder).mkdir()
    assert main([str(bundle.root), "--target", "cpu", "--out", str(tmp_path / "packed")]) == 0, "an empty one is valid"
    assert not list((tmp_path / "packed").glob(".partial-*"))


@pytest.mark.parametrize("exists", [True, False])
def test_a_disk_that_is_full(bundle, tmp_path, capsys, monkeypatch, exists):
    def fail(root, manifest):
        raise OSError(28, "No space left on device")

    out = tmp_path / "packed"
    if exists:
        out.mkdir()
    monkeypatch.setattr("engines.pack.write_manifest", fail)
    assert main([str(bundle.root), "--target", "cpu", "--out", str(out)]) == 2
    assert capsys.readouterr().err == (
        f"engines.pack: error: --out {out}: cannot be written: No space left on device\n"
    )
    assert out.exists() == exists
    assert not exists or list(out.iterdir()) == []


def test_a_disk_that_is_full_when_files_are_moved(bundle, tmp_path, monkeypatch):
    def fail(source, target, last):
        if target.name == "weights":
            raise OSError(28, "No space left on device")
        move(source, target, last)

    monkeypatch.setattr("engines.pack.move", fail)
    with pytest.raises(InputError, match="No space left on device"):
        pack(bundle, "cpu", tmp_path / "packed")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["whole"]


def test_links_are_followed(bundle, tmp_path):
    """As in a cache of Hugging Face's hub."""
    (tmp_path / "blobs").mkdir()
    for name, entry in bundle.manifest.files.items():
        (bundle.root / name).rename(tmp_path / "blobs" / entry.sha256)
        (bundle.root / name).symlink_to(tmp_path / "blobs" / entry.sha256)
    packed = pack(Bundle.open(bundle.root), "cpu", tmp_path / "packed")
    assert contents(packed.root) == GRAPHS | WEIGHTS
    assert not [path for path in packed.root.rglob("*") if path.is_symlink()]
