"""Engines of a bundle with kernels: when TensorRT uses them as plugins, which graph it parses, and what is kept."""

import dataclasses
import shutil
from pathlib import Path

import pytest

from engines import builder as module
from engines import plugins
from engines.build import main
from engines.builder import EnginePlan, build_engines
from engines.store import SharedStore
from engines.targets import EngineTarget
from engines.tensorrt import ENGINE_NAME, EngineFacts, EngineOptions
from moma_rt.bundle.engines import Device, Flavour
from moma_rt.bundle.manifest import Bundle, read_manifest, write_manifest
from moma_rt.inspection import describe_bundle
from tests.engines.kernel_files import NAMES, add_kernels, make_bundle

RTX = EngineTarget(Flavour.TENSORRT_RTX, (86, 89))
H100 = EngineTarget(Flavour.TENSORRT, (90,))
NOTE = "denoiser note: its own kernels are not used for"


@pytest.fixture
def compiled(monkeypatch):
    """Replaces both libraries: an engine is its graph and its kernels' hash. Returns the list of requests."""
    requests = []

    def compile_(request, folder, report):
        requests.append(request)
        kernels = request.kernels.sha256 if request.kernels is not None else "none"
        (folder / ENGINE_NAME).write_text(request.onnx.read_text() + kernels)
        return EngineFacts(10, 20)

    monkeypatch.setattr(module, "build_engine", compile_)
    monkeypatch.setattr(module, "library_version", lambda flavour: "1.7.1" if flavour is RTX.flavour else "11.4.0")
    monkeypatch.setattr(plugins, "is_installed", lambda name: True)
    return requests


def build(root: Path, *targets: EngineTarget, shared=None, **changes):
    """Build engines; return the denoiser's, and the messages about it."""
    said = []
    plan = EnginePlan(targets or (H100,), **changes)
    bundle = build_engines(root, plan, shared, lambda name, state: said.append(f"{name} {state}"))
    bundle.verify(bundle.manifest.files)
    engines = {engine.flavour: engine for engine in bundle.manifest.engines if engine.network == "denoiser"}
    return engines, [line for line in said if line.startswith(("denoiser kept", "denoiser built", "denoiser note"))]


def graphs(requests) -> dict[str, str]:
    return {request.spec.name: request.onnx.name for request in requests}


def test_with_kernels_tensorrt_gets_the_full_graph(tmp_path, compiled):
    engines, said = build(make_bundle(tmp_path, 80, 90))
    assert graphs(compiled) == {"text_encoder": "lowered.onnx", "denoiser": "model.onnx"}
    taken = {request.spec.name: request.kernels for request in compiled}
    assert taken["text_encoder"] is None
    assert {kernel.path.parent.name for kernel in taken["denoiser"].kernels.values()} == {f"denoiser_sm90-{'0' * 16}"}
    assert engines[Flavour.TENSORRT].kernels == taken["denoiser"].sha256
    assert [line.partition(" in ")[0] for line in said] == [f"denoiser built for {H100}"]
    assert build(tmp_path) == (engines, [f"denoiser kept for {H100}"])
    assert len(compiled) == len(NAMES)


@pytest.mark.parametrize(
    ("capabilities", "target", "version", "why"),
    [
        ((90,), RTX, "1.7.1", "TensorRT-RTX has no plugins"),
        ((90,), H100, "10.3.0", "TensorRT 10.3.0 has no plugins ahead of time (since 10.9)"),
        ((80, 86), H100, "11.4.0", "they are for sm80,sm86, and none for sm90"),
    ],
)
def test_a_note_says_once_why_kernels_are_not_used(tmp_path, compiled, monkeypatch, capabilities, target, version, why):
    monkeypatch.setattr(module, "library_version", lambda _: version)
    engines, said = build(make_bundle(tmp_path, *capabilities), target)
    assert said[0] == f"{NOTE} {target}: {why}"
    assert graphs(compiled)["denoiser"] == "lowered.onnx"
    assert [engine.kernels for engine in engines.values()] == [None]
    assert build(tmp_path, target) == (engines, [f"denoiser kept for {target}"])


def test_plugins_off_builds_without_kernels_and_without_a_note(tmp_path, compiled):
    with_them, _ = build(make_bundle(tmp_path, 90))
    compiled.clear()
    without, said = build(tmp_path, plugins=False)
    assert graphs(compiled) == {"denoiser": "lowered.onnx"}
    assert compiled[0].kernels is None
    assert not [line for line in said if "note" in line]
    assert without[Flavour.TENSORRT].file != with_them[Flavour.TENSORRT].file
    again, _ = build(tmp_path)
    assert again == with_them


def test_other_kernels_are_another_engine(tmp_path, compiled):
    first, _ = build(make_bundle(tmp_path, 90))
    manifest = read_manifest(tmp_path)
    shutil.rmtree(tmp_path / "kernels")
    old = {name for name in manifest.files if name.startswith("kernels/")}
    files = {name: file for name, file in manifest.files.items() if name not in old}
    write_manifest(tmp_path, dataclasses.replace(manifest, kernels=(), files=files))
    add_kernels(tmp_path, 90, change=lambda folder: min(folder.glob("*-float16-*")).write_text("// better\n"))
    compiled.clear()
    second, _ = build(tmp_path)
    assert graphs(compiled) == {"denoiser": "model.onnx"}
    assert first[Flavour.TENSORRT].kernels != second[Flavour.TENSORRT].kernels
    assert first[Flavour.TENSORRT].key != second[Flavour.TENSORRT].key


def test_engines_of_other_plugin_code_are_not_taken_from_the_store(tmp_path, compiled, monkeypatch):
    shared = SharedStore(tmp_path / "store")
    build(make_bundle(tmp_path / "a", 90), shared=shared)
    monkeypatch.setattr(module, "code_hash", lambda: "other code")
    compiled.clear()
    build(make_bundle(tmp_path / "b", 90), shared=shared)
    assert graphs(compiled) == {"denoiser": "model.onnx"}


def test_an_engine_is_refitted_with_the_kernels_it_has(tmp_path, compiled, monkeypatch):
    refitted = []

    def refit(engine_file, request, folder):
        refitted.append((request.spec.name, request.kernels is not None))
        (folder / ENGINE_NAME).write_bytes(engine_file.read_bytes())

    monkeypatch.setattr(module, "refit_engine", refit)
    options = EngineOptions(refittable=True)
    donor = make_bundle(tmp_path / "donor", 90)
    build(donor, options=options)
    compiled.clear()
    engines, _ = build(make_bundle(tmp_path / "b", 90, weights=b"others"), options=options, refit_from=donor)
    assert refitted == [("text_encoder", False), ("denoiser", True)]
    assert engines[Flavour.TENSORRT].kernels is not None
    _, said = build(make_bundle(tmp_path / "c", weights=b"third"), options=options, refit_from=donor)
    assert said[0] == f"denoiser note: {donor} has no refittable engine of it, so it is built anew"
    assert graphs(compiled) == {"denoiser": "lowered.onnx"}


def test_engines_leave_the_kernels_in_the_bundle(tmp_path, compiled):
    make_bundle(tmp_path, 80, 90)
    before = read_manifest(tmp_path).kernels
    shutil.rmtree(tmp_path / "engines", ignore_errors=True)
    (tmp_path / "kernels" / "denoiser_sm80-00000000000000aa").mkdir()
    build(tmp_path)
    assert read_manifest(tmp_path).kernels == before
    assert sorted(path.name for path in (tmp_path / "kernels").iterdir()) == [
        f"denoiser_sm{capability}-{'0' * 16}" for capability in (80, 90)
    ]


def test_kernels_and_plugins_are_described(tmp_path, compiled):
    build(make_bundle(tmp_path, 80, 90), H100, RTX)
    lines = describe_bundle(Bundle.open(tmp_path), tensors=True).splitlines()
    assert "kernels of the denoiser for TensorRT's plugins: sm80,sm90" in lines
    assert f"kernels of the denoiser on sm80: kernels/denoiser_sm80-{'0' * 16}" in lines
    target, engine = (line for line in lines if line.endswith("  with plugins"))
    assert target.startswith("tensorrt ")
    assert engine.startswith("  denoiser ")


@pytest.mark.parametrize(("choice", "with_kernels"), [("auto", True), ("off", False)])
def test_the_command_line(tmp_path, compiled, monkeypatch, choice, with_kernels):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("engines.targets.local_device", lambda: Device("H100", 90))
    arguments = [str(make_bundle(tmp_path / "bundle", 90)), "--target", "local", "--plugins", choice]
    assert main([*arguments, "--store", str(tmp_path / "store")]) == 0
    assert {r.spec.name: r.kernels is not None for r in compiled} == {"text_encoder": False, "denoiser": with_kernels}
