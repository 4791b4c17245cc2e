"""A bundle's AOTInductor packages: which are kept, compiled again or refused, and the outputs of compiled ones."""

import dataclasses
import json
import shutil
import subprocess
import zipfile

import numpy as np
import pytest
import torch

from engines.store import SharedStore, Store
from engines.targets import EngineTarget
from export import inductor_export
from export.build import main
from export.bundling import ExportPlan, build_bundle
from export.checkpoints import CheckpointRequest, load_checkpoint, roles_for
from export.compare import outputs_of, runs, worst
from export.inductor_export import build_packages
from export.networks import NETWORKS
from export.packages import PackageOptions
from export.sample_inputs import sample_inputs, usual_sizes
from moma_rt.backends import create
from moma_rt.backends.device import local_device
from moma_rt.bundle.engines import EngineEntry, Flavour
from moma_rt.bundle.manifest import Bundle, read_manifest
from moma_rt.bundle.specs import Precision
from moma_rt.errors import BundleError, InputError
from moma_rt.inspection import describe_bundle
from moma_rt.memory.networks import run_once

NAMES = ("text_encoder", "context_projector")
CPU = EngineTarget(Flavour.INDUCTOR, (0,))


@pytest.fixture
def compiled(monkeypatch):
    """Replaces compiling: every package has other bytes. Returns the list of compiled networks."""
    done = []

    def write(request, folder):
        done.append(request.network.name)
        (folder / "engine.pt2").write_text(f"package {len(done)}")

    monkeypatch.setattr(inductor_export, "write_package", write)
    return done


def build(root, seed=0, target=CPU, plan=ExportPlan(NAMES, graphs=False)):  # noqa: B008
    """Export and compile; return the engines and the messages about them."""
    said, shared = [], SharedStore(root.parent / "store")
    checkpoint = load_checkpoint(CheckpointRequest("tiny", roles=roles_for(NAMES), seed=seed))
    build_bundle(checkpoint, plan, root, lambda *_: None, shared)
    bundle = build_packages(checkpoint, NAMES, target, Store(root, shared), lambda *line: said.append(" ".join(line)))
    ends = [line.split(" in ")[0] for line in said if line.split()[1] in ("kept", "built")]
    return bundle.manifest.engines, ends


def test_engines_are_in_the_manifest(tmp_path, compiled):
    engines, said = build(tmp_path / "bundle")
    bundle = Bundle.open(tmp_path / "bundle")
    bundle.verify(bundle.manifest.files)
    assert compiled == list(NAMES)
    assert said == [f"{name} built for inductor cpu" for name in NAMES]
    assert [engine.network for engine in engines] == list(NAMES)
    for engine in engines:
        assert (engine.flavour, engine.version, engine.capabilities) == (Flavour.INDUCTOR, torch.__version__, (0,))
        assert engine.source == bundle.network(engine.network).structure
        assert engine.measured
        assert engine.file == f"engines/{engine.network}-{engine.key[:16]}/engine.pt2"
        assert EngineEntry.from_json(json.loads(json.dumps(engine.to_json()))) == engine
    assert f"inductor {torch.__version__} on cpu " in describe_bundle(bundle)
    assert {path.name for path in (tmp_path / "bundle" / "engines").iterdir()} == {
        f"{engine.network}-{engine.key[:16]}" for engine in engines
    }, "inductor's temporary files are deleted"


def test_packages_are_kept_and_shared(tmp_path, compiled):
    first, _ = build(tmp_path / "a")
    assert build(tmp_path / "a") == (first, [f"{name} kept for inductor cpu" for name in NAMES])
    second, said = build(tmp_path / "b")
    assert said == [f"{name} kept for inductor cpu: another bundle had it" for name in NAMES]
    assert second == first
    assert compiled == list(NAMES)
    files = [tmp_path / bundle / engine.file for engine in first for bundle in "ab"]
    assert len({path.stat().st_ino for path in files}) == len(NAMES)


def test_another_base_of_one_geometry_compiles_nothing(tmp_path, compiled):
    first, _ = build(tmp_path / "a")
    second, said = build(tmp_path / "b", seed=1)
    assert compiled == list(NAMES)
    assert said == [f"{name} kept for inductor cpu: another bundle had it" for name in NAMES]
    assert second == first
    bundles = [Bundle.open(tmp_path / name) for name in "ab"]
    for engine in first:
        assert bundles[0].path(engine.file).samefile(bundles[1].path(engine.file))
        entries = [bundle.network(engine.network) for bundle in bundles]
        assert entries[0].structure == entries[1].structure
        assert entries[0].weights != entries[1].weights


def test_packages_are_kept_when_the_weights_change(tmp_path, compiled):
    """As refitting does for TensorRT."""
    first, _ = build(tmp_path / "a")
    before = {path.name for path in (tmp_path / "a" / "weights").iterdir()}
    second, said = build(tmp_path / "a", seed=1)
    assert (second, said) == (first, [f"{name} kept for inductor cpu" for name in NAMES])
    assert compiled == list(NAMES)
    assert before.isdisjoint(path.name for path in (tmp_path / "a" / "weights").iterdir())


def test_a_bundle_without_weights_is_completed_without_compiling(tmp_path, compiled):
    """The copy has no store beside it."""
    first, _ = build(tmp_path / "a")
    before = {p.relative_to(tmp_path / "a"): p.read_bytes() for p in (tmp_path / "a").rglob("*") if p.is_file()}
    carried = tmp_path / "elsewhere" / "a"
    shutil.copytree(tmp_path / "a", carried, ignore=shutil.ignore_patterns("weights"))
    again, said = build(carried)
    assert (again, said) == (first, [f"{name} kept for inductor cpu" for name in NAMES])
    assert compiled == list(NAMES)
    assert {p.relative_to(carried): p.read_bytes() for p in carried.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    "change",
    [
        lambda patch: patch.setattr(inductor_export, "library_version", lambda _: "2.99"),
        lambda patch: patch.setattr(inductor_export, "cpu_instructions", lambda: "AVX9000"),
        lambda patch: patch.setattr(inductor_export, "sha256_file", lambda _: "other code"),
        lambda patch: patch.setattr(PackageOptions, "of", lambda *_: PackageOptions(False, False, "O3")),
        lambda patch: patch.setattr("export.keys._code_hash", lambda names: "other code"),
    ],
    ids=["version", "instructions", "compiling code", "options", "networks' code"],
)
def test_what_a_key_depends_on(tmp_path, compiled, monkeypatch, change):
    first, _ = build(tmp_path / "a")
    change(monkeypatch)
    second, said = build(tmp_path / "a")
    assert said == [f"{name} built for inductor cpu" for name in NAMES]
    assert {e.key for e in first}.isdisjoint(e.key for e in second)
    assert len(second) == len(NAMES), "they take the place of the old ones"


def test_packages_for_a_gpu_do_not_replace_those_for_a_cpu(tmp_path, compiled, monkeypatch):
    on_cpu, _ = build(tmp_path / "a")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    both, said = build(tmp_path / "a", target=EngineTarget(Flavour.INDUCTOR, (90,)))
    assert said == [f"{name} built for inductor sm90" for name in NAMES]
    assert [(e.network, e.capabilities) for e in both] == [(name, (c,)) for name in NAMES for c in (0, 90)]
    assert set(on_cpu) < set(both)


def test_damaged_and_lost_packages_are_compiled_again(tmp_path, compiled):
    (first, second), _ = build(tmp_path / "a")
    for engine, content in ((first, "pack"), (second, "PACKAGE 2")):
        for root in (tmp_path / "a", tmp_path / "store"):
            (root / engine.file).chmod(0o644)
            (root / engine.file).write_text(content)
    engines, said = build(tmp_path / "a")
    assert said == [f"{name} built for inductor cpu" for name in NAMES]
    bundle = Bundle.open(tmp_path / "a")
    bundle.verify(engine.file for engine in engines)


def test_an_interrupted_build_leaves_the_bundle_unchanged_and_resumes(tmp_path, compiled, monkeypatch):
    root, write = tmp_path / "a", inductor_export.write_package

    def interrupted(request, folder):
        (folder / "engine.pt2").write_text("half a pack")
        if request.network.name == NAMES[1]:
            raise KeyboardInterrupt
        write(request, folder)

    with monkeypatch.context() as patch:
        patch.setattr(inductor_export, "write_package", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build(root)
    assert read_manifest(root).engines == ()
    (finished,) = (root / "engines").iterdir()
    assert finished.name.startswith(f"{NAMES[0]}-")
    # Leftovers of a killed build, with inductor's temporary files.
    for name in (".partial-x", ".partial-y"):
        (root / "engines" / name / "cache").mkdir(parents=True)
        (root / "engines" / name / "cache" / "half.so").write_text("half")
    engines, said = build(root)
    assert said == [f"{NAMES[0]} kept for inductor cpu: another bundle had it", f"{NAMES[1]} built for inductor cpu"]
    assert {path.name for path in (root / "engines").iterdir()} == {f"{e.network}-{e.key[:16]}" for e in engines}


def test_a_network_of_other_weights_is_not_compiled_in_its_place(tmp_path, compiled):
    build(tmp_path / "a")
    other = load_checkpoint(CheckpointRequest("tiny", roles=roles_for(NAMES), seed=1))
    with pytest.raises(BundleError, match="its text_encoder comes from other weights; build the bundle again"):
        build_packages(other, NAMES, CPU, Store(tmp_path / "a"), lambda *_: None)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("No working C++ compiler found\nin torch"), "No working C++ compiler found in torch"),
        (RuntimeError("Command:\ng++ a.cpp\n\nOutput:\na.cpp:1: fatal error: cuda.h"), "a.cpp:1: fatal error: cuda.h"),
        (subprocess.CalledProcessError(1, ["ld"], stderr="ld: error: no room"), "ld: error: no room"),
    ],
)
def test_a_failed_compilation_is_one_line(tmp_path, monkeypatch, capsys, error, said):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("export.packages.aoti_compile_and_package", fail)
    command = ["--base", "tiny", "--only", "context_projector", "--target", "inductor", "--out", str(tmp_path / "a")]
    assert main(command) == 2
    found = capsys.readouterr().err.splitlines()[1:]
    assert len(found) == 1
    assert found[0].startswith(
        f"export.build: error: context_projector: PyTorch {torch.__version__} cannot compile it: {said}"
    )
    assert [path.name for path in (tmp_path / "a" / "engines").iterdir()] == []


def test_a_gpu_that_pytorch_cannot_use(tmp_path, compiled, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        InputError, match=r"^inductor sm90: PyTorch \S+ cannot use this GPU: install a build for its CUDA v"
    ):
        build(tmp_path / "a", target=EngineTarget(Flavour.INDUCTOR, (90,)))
    assert compiled == []


def test_a_measured_package_replaces_one_chosen_by_rule_only_if_asked_for(tmp_path, compiled, monkeypatch):
    here = EngineTarget(Flavour.INDUCTOR, (90,))
    anywhere = dataclasses.replace(here, measured=False)
    monkeypatch.setattr(inductor_export, "check_cross", lambda capability: None)
    monkeypatch.setattr(inductor_export, "cross_compile", inductor_export.write_package)
    by_rule, _ = build(tmp_path / "a", target=anywhere)
    assert [engine.measured for engine in by_rule] == [False, False]
    # On such a device the package is kept, unless one measured on this machine is asked for.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert build(tmp_path / "a", target=anywhere)[0] == by_rule
    assert compiled == list(NAMES)
    measured, said = build(tmp_path / "a", target=here)
    assert said == [f"{name} built for inductor sm90" for name in NAMES]
    assert [engine.measured for engine in measured] == [True, True]
    kept, said = build(tmp_path / "a", target=anywhere)
    assert said == [f"{name} kept for inductor sm90" for name in NAMES]
    assert kept == measured, "a measured package is not replaced"
    assert compiled == [*NAMES, *NAMES]


def test_a_pytorch_that_is_too_old(tmp_path, compiled, monkeypatch):
    monkeypatch.setattr(inductor_export, "library_version", lambda _: "2.9.1+cu128")
    with pytest.raises(
        InputError, match=r"^inductor cpu: PyTorch 2.9.1\+cu128 is too old for packages: install 2.10 or "
    ):
        build(tmp_path / "a")
    assert compiled == []


def outputs(bundle, backend, file, inputs):
    """Run a graph or a package of a network of the bundle, with the bundle's weights."""
    entry = next(e for n, e in bundle.manifest.networks.items() if file.split("/")[1].startswith(f"{n}-"))
    return outputs_of(backend, entry.spec, bundle.path(file), tuple(map(bundle.path, entry.weights)), inputs)


def assert_as_onnxruntime(bundle, name, *cases):
    """Check that a network's package and its graph agree within 1e-4, and uint8 pictures within 1.

    Each case gives sizes of dynamic dimensions that differ from the usual ones.
    """
    entry = bundle.network(name)
    (engine,) = (e for e in bundle.manifest.engines if e.network == name)
    weights = tuple(map(bundle.path, entry.weights))
    compiled, graph = create("inductor"), create("onnxruntime")
    package = compiled.load(entry.spec, bundle.path(engine.file), weights)
    session = graph.load(entry.spec, bundle.path(entry.onnx), weights)
    for sizes in cases:
        inputs = sample_inputs(entry.spec, bundle.manifest.geometry, {**usual_sizes(entry.spec), **sizes})
        found = run_once(compiled, package, inputs)
        for tensor, wanted in run_once(graph, session, inputs).items():
            assert found[tensor].dtype == wanted.dtype
            a, b = found[tensor].astype(float), wanted.astype(float)
            tolerance = 1 if wanted.dtype == np.uint8 else 1e-4
            np.testing.assert_allclose(a, b, rtol=0, atol=tolerance, err_msg=f"{tensor} of {sizes}")


@pytest.mark.parametrize("name", ["text_encoder", "context_projector", "denoiser", "vae_decoder"])
def test_compiled_for_this_cpu(on_a_cpu, small_bundles, name):
    # The number of reference tokens may be any, down to one.
    cases = [
        {"batch": b, "guided_batch": b * halves, "reference_tokens_32": 37 * b, "reference_tokens_16": 1}
        for b, halves in ((1, 1), (1, 2), (2, 1), (3, 2))
    ]
    assert_as_onnxruntime(Bundle.open(small_bundles[1]), name, *cases)


def test_this_cpus_engines_are_compared(on_a_cpu, small_bundles):
    bundle = Bundle.open(small_bundles[1])
    entry = bundle.network("context_projector")
    inputs = sample_inputs(entry.spec, bundle.manifest.geometry, usual_sizes(entry.spec))
    names = [name for name, _ in runs(bundle, entry, inputs)]
    assert names == ["onnxruntime", f"inductor {torch.__version__} on this machine's CPU"]


@pytest.mark.slow
def test_every_network_of_a_whole_bundle(on_a_cpu, tmp_path):
    assert main(["--base", "tiny", "--target", "cpu,inductor", "--out", str(tmp_path / "whole")]) == 0
    bundle = Bundle.open(tmp_path / "whole")
    assert [engine.network for engine in bundle.manifest.engines] == list(NETWORKS)
    cases = {name: [{}] for name in NETWORKS}
    cases["language_model"] += [{"past": 0, "sequence": 40}, {"past": 1, "sequence": 1, "image_sequence": 1}]
    for name in NETWORKS:
        assert_as_onnxruntime(bundle, name, *cases[name])


@pytest.mark.gpu
@pytest.mark.parametrize("halves", [1, 2])
def test_compiled_for_this_gpu(small_gpu_bundle, halves):
    """Both backends round to fp16, so the outputs differ by two rounding errors."""
    bundle = Bundle.open(small_gpu_bundle)
    for engine in bundle.manifest.engines:
        entry = bundle.network(engine.network)
        assert (engine.capabilities, entry.precision) == ((local_device().capability,), Precision.FP16)
        sizes = {**usual_sizes(entry.spec), "batch": 2, "guided_batch": 2 * halves}
        inputs = sample_inputs(entry.spec, bundle.manifest.geometry, sizes)
        expected = outputs(bundle, "onnxruntime", entry.onnx, inputs)
        assert worst(outputs(bundle, "inductor", engine.file, inputs), expected).relative < 2e-2


@pytest.mark.gpu
def test_the_operators_kernels_are_in_the_gpus_package(small_gpu_bundle):
    bundle = Bundle.open(small_gpu_bundle)
    (engine,) = (e for e in bundle.manifest.engines if e.network == "denoiser")
    with zipfile.ZipFile(bundle.path(engine.file)) as package:
        names = package.namelist()
        (code,) = (package.read(name) for name in names if name.endswith(".so"))
    assert not [name for name in names if name.endswith(".cubin")], "all kernels are in the library"
    for kernel in (b"injected_self_attention_kernel", b"context_cross_attention_kernel"):
        assert kernel in code
