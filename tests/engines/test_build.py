"""What a build of engines keeps, replaces and refuses; compiling only writes a few bytes, except where noted."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engines import builder as module
from engines.build import main
from engines.builder import EnginePlan, build_engines, needs_lowered_graph
from engines.store import SharedStore
from engines.targets import EngineTarget
from engines.tensorrt import ENGINE_NAME, LAYERS_NAME, EngineFacts, EngineOptions
from moma_rt.bundle.engines import Flavour
from moma_rt.bundle.manifest import Bundle, FileEntry, Manifest, NetworkEntry, Source, read_manifest, write_manifest
from moma_rt.bundle.specs import Dim, Geometry, NetworkSpec, Precision, SelfAttentionLayer, TensorSpec
from moma_rt.errors import BundleError, InputError
from moma_rt.files import sha256_file

RTX = EngineTarget(Flavour.TENSORRT_RTX, (86, 89))
FULL = EngineTarget(Flavour.TENSORRT, (90,))
GEOMETRY = Geometry(64, 4, 8, 77, 32, 4, 1024, (SelfAttentionLayer("mid_block", 8, 64, 2),), None)
NAMES = ("text_encoder", "vae_decoder")
ENDS = ("kept", "built", "refitted", "note")
BATCH = Dim("batch", 1, 2, 4)


def make_bundle(root: Path, weights: bytes = b"weights", precision: Precision = Precision.FP16) -> Path:
    """A bundle of two networks whose graphs and weights are a few bytes."""
    networks, files = {}, {}
    for name in NAMES:
        content = {
            f"networks/{name}-{weights.hex():0>16.16}/model.onnx": b"graph of " + name.encode(),
            f"networks/{name}-{weights.hex():0>16.16}/lowered.onnx": b"lowered",
            f"weights/{name}-{weights.hex():0>16.16}/weights.safetensors": weights,
        }
        for file, written in content.items():
            path = root / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(written)
            files[file] = FileEntry(sha256_file(path), len(written))
        spec = NetworkSpec(name, (TensorSpec("x", "float32", (BATCH, 3)),), (TensorSpec("y", "float32", (BATCH, 3)),))
        key, structure = f"{name}-{weights.hex()}-{precision.value}", f"structure of {name} in {precision.value}"
        onnx, lowered, weights_file = content
        networks[name] = NetworkEntry(spec, precision, key, structure, onnx, lowered, (weights_file,))
    sources = (Source("unet", "tests", "0" * 64),)
    write_manifest(root, Manifest("tests", "tests", GEOMETRY, networks, files, sources))
    return root


@pytest.fixture
def compiled(monkeypatch):
    """Replaces both libraries: an engine is the content of its graph. Returns the list of requests."""
    requests = []

    def compile_(request, folder, report):
        requests.append(request)
        report("compiling: half of it")
        (folder / ENGINE_NAME).write_bytes(request.onnx.read_bytes() + str(request.capabilities).encode())
        if request.options.layers:
            (folder / LAYERS_NAME).write_text("{}")
        return EngineFacts(10, 20)

    monkeypatch.setattr(module, "build_engine", compile_)
    monkeypatch.setattr(module, "library_version", lambda flavour: "1.7.1" if flavour is RTX.flavour else "11.4.0")
    return requests


def build(root: Path, *targets: EngineTarget, shared=None, **changes):
    said = []
    plan = EnginePlan(targets or (RTX,), **changes)
    bundle = build_engines(root, plan, shared, lambda name, state: said.append(f"{name} {state}"))
    bundle.verify(bundle.manifest.files)
    used = {str(Path(file).parent) for file in bundle.manifest.files}
    assert {f"engines/{path.name}" for path in (root / "engines").iterdir()} <= used
    return bundle.manifest.engines, [line for line in said if line.split()[1].rstrip(":") in ENDS]


def names_of(requests) -> list[str]:
    return [request.spec.name for request in requests]


def test_every_network_gets_an_engine(tmp_path, compiled):
    engines, said = build(make_bundle(tmp_path))
    assert [engine.network for engine in engines] == list(NAMES) == names_of(compiled)
    assert {(e.flavour, e.version, e.capabilities, e.refittable) for e in engines} == {
        (Flavour.TENSORRT_RTX, "1.7.1", (86, 89), False)
    }
    assert {(e.weight_bytes, e.activation_bytes) for e in engines} == {(10, 20)}
    networks = Bundle.open(tmp_path).manifest.networks
    assert all(engine.source == networks[engine.network].key for engine in engines)
    assert [line.split(" in ")[0] for line in said] == [f"{n} built for {RTX}" for n in NAMES]
    written = json.loads((tmp_path / "manifest.json").read_text())["engines"][0]
    assert (written["flavour"], written["capabilities"]) == ("tensorrt_rtx", [86, 89])


def test_a_second_build_does_nothing(tmp_path, compiled):
    first, _ = build(make_bundle(tmp_path))
    before = (tmp_path / "manifest.json").read_bytes()
    again, said = build(tmp_path)
    assert again == first
    assert (tmp_path / "manifest.json").read_bytes() == before
    assert len(compiled) == len(NAMES)
    assert said == [f"{name} kept for {RTX}" for name in NAMES]


def test_an_engine_for_more_devices_serves_fewer(tmp_path, compiled):
    first, _ = build(make_bundle(tmp_path))
    one = EngineTarget(Flavour.TENSORRT_RTX, (89,))
    assert build(tmp_path, one)[0] == first
    other = EngineTarget(Flavour.TENSORRT_RTX, (120,))
    assert {engine.capabilities for engine in build(tmp_path, other)[0]} == {(86, 89), (120,)}
    both = EngineTarget(Flavour.TENSORRT_RTX, (86, 89, 120))
    assert {engine.capabilities for engine in build(tmp_path, both)[0]} == {(86, 89, 120)}


def test_flavours_stand_beside_each_other(tmp_path, compiled):
    engines, _ = build(make_bundle(tmp_path), RTX, FULL)
    assert [(e.network, e.flavour) for e in engines] == [
        (name, flavour) for name in NAMES for flavour in (Flavour.TENSORRT, Flavour.TENSORRT_RTX)
    ]


def test_another_version_builds_anew(tmp_path, compiled, monkeypatch):
    first, _ = build(make_bundle(tmp_path))
    monkeypatch.setattr(module, "library_version", lambda flavour: "1.8.0")
    second, _ = build(tmp_path)
    assert {engine.version for engine in second} == {"1.8.0"}
    assert not {engine.file for engine in first} & {engine.file for engine in second}


def test_only_some_networks(tmp_path, compiled):
    engines, _ = build(make_bundle(tmp_path), names=("vae_decoder",))
    assert [engine.network for engine in engines] == ["vae_decoder"]
    with pytest.raises(BundleError, match="has no unet network"):
        build(tmp_path, names=("unet",))


@pytest.mark.parametrize("damage", [b"", b"other"])
def test_a_damaged_engine_is_built_anew(tmp_path, compiled, damage):
    engines, _ = build(make_bundle(tmp_path))
    path = tmp_path / engines[0].file
    content = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(content[: len(damage)] and damage.ljust(len(content), b"x"))
    assert build(tmp_path)[0] == engines
    assert path.read_bytes() == content
    assert names_of(compiled) == [*NAMES, engines[0].network]


def test_an_altered_graph_is_not_compiled(tmp_path, compiled):
    make_bundle(tmp_path)
    entry = Bundle.open(tmp_path).manifest.networks["text_encoder"]
    path = tmp_path / entry.onnx
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(BundleError, match="was altered"):
        build(tmp_path)
    assert compiled == []
    assert Bundle.open(tmp_path).manifest.engines == ()


def test_altered_weights_are_not_compiled(tmp_path, compiled):
    make_bundle(tmp_path)
    (weights_file,) = Bundle.open(tmp_path).network("text_encoder").weights
    (tmp_path / weights_file).write_bytes(b"WEIGHTS")
    with pytest.raises(BundleError, match=r"weights\.safetensors was altered"):
        build(tmp_path)
    assert compiled == []


def test_a_network_without_a_graph_is_not_compiled(tmp_path, compiled):
    """As `--target inductor` alone leaves it."""
    manifest = read_manifest(make_bundle(tmp_path))
    entries = {n: dataclasses.replace(e, onnx=None, lowered=None) for n, e in manifest.networks.items()}
    files = {name: file for name, file in manifest.files.items() if name.startswith("weights/")}
    write_manifest(tmp_path, dataclasses.replace(manifest, networks=entries, files=files))
    with pytest.raises(
        BundleError,
        match="no graph of text_encoder for tensorrt_rtx .*, since it was built for inductor alone",
    ):
        build(tmp_path)
    assert compiled == []


def test_the_library_looks_for_weights_where_the_graph_says(tmp_path, compiled):
    """A graph parsed from memory has no path, so the library is given one beside the folders of the weights."""
    build(make_bundle(tmp_path))
    for request in compiled:
        content, place = request.graph
        assert content == request.onnx.read_bytes()
        assert Path(place).parent == tmp_path / "weights" == request.weights_root


def test_bundles_share_engines_of_equal_networks(tmp_path, compiled):
    shared = SharedStore(tmp_path / "store")
    first, _ = build(make_bundle(tmp_path / "a"), shared=shared)
    second, said = build(make_bundle(tmp_path / "b"), shared=shared)
    assert first == second
    assert len(compiled) == len(NAMES)
    assert said == [f"{name} kept for {RTX}: another bundle had it" for name in NAMES]
    assert (tmp_path / "a" / first[0].file).samefile(tmp_path / "b" / second[0].file)
    build(make_bundle(tmp_path / "c", b"others"), shared=shared)
    assert len(compiled) == 2 * len(NAMES), "other weights, another engine"


def test_a_failing_network_leaves_the_finished_ones(tmp_path, compiled, monkeypatch):
    make_bundle(tmp_path)
    working = module.build_engine

    def fail(request, folder, report):
        if request.spec.name == "vae_decoder":
            raise BundleError("vae_decoder: no kernel")
        return working(request, folder, report)

    with monkeypatch.context() as patch:
        patch.setattr(module, "build_engine", fail)
        with pytest.raises(BundleError, match="no kernel"):
            build(tmp_path)
    assert Bundle.open(tmp_path).manifest.engines == ()
    assert not list(tmp_path.rglob(".partial-*"))
    build(tmp_path)
    assert names_of(compiled) == list(NAMES), "the first network's engine is reused"


@pytest.mark.parametrize(
    ("flavour", "version", "precision", "width", "lowered"),
    [
        (Flavour.TENSORRT_RTX, "1.7.1.116", Precision.FP16, 32, False),
        (Flavour.TENSORRT_RTX, "1.7.1.116", Precision.INT4, 40, False),
        (Flavour.TENSORRT_RTX, "1.7.1.116", Precision.BF16, 32, False),
        (Flavour.TENSORRT_RTX, "1.7.1.116", Precision.FP32, 32, True),
        (Flavour.TENSORRT_RTX, "1.7.1.116", Precision.FP16, 8, True),
        (Flavour.TENSORRT, "10.3.0", Precision.FP16, 40, True),
        (Flavour.TENSORRT, "10.14.1.48", Precision.FP16, 40, True),
        (Flavour.TENSORRT, "10.15.1.29", Precision.FP16, 40, False),
        (Flavour.TENSORRT, "11.4.0.106", Precision.FP16, 40, False),
        (Flavour.TENSORRT, "11.4.0.106", Precision.FP32, 40, True),
    ],
)
def test_which_graph_a_library_gets(tmp_path, compiled, monkeypatch, flavour, version, precision, width, lowered):
    geometry = dataclasses.replace(GEOMETRY, self_attention=(SelfAttentionLayer("mid_block", 8, 4 * width, 4),))
    assert needs_lowered_graph(flavour, version, precision, geometry) == lowered
    make_bundle(tmp_path, precision=precision)
    write_manifest(tmp_path, dataclasses.replace(read_manifest(tmp_path), geometry=geometry))
    monkeypatch.setattr(module, "library_version", lambda _: version)
    build(tmp_path, EngineTarget(flavour, (89,)))
    assert {request.onnx.name for request in compiled} == {"lowered.onnx" if lowered else "model.onnx"}


def test_refitting(tmp_path, compiled, monkeypatch):
    refitted = []

    def refit(engine_file, request, folder):
        (weights_file,) = request.weights_root.glob(f"{request.onnx.parent.name}/*")
        if b"odd" in weights_file.read_bytes():
            raise BundleError("another structure")
        refitted.append((engine_file, request.onnx))
        (folder / ENGINE_NAME).write_bytes(engine_file.read_bytes() + b" refitted")

    monkeypatch.setattr(module, "refit_engine", refit)
    options = EngineOptions(refittable=True)
    donor = make_bundle(tmp_path / "donor")
    build(donor, FULL, options=options)
    compiled.clear()

    engines, said = build(make_bundle(tmp_path / "b", b"others"), FULL, options=options, refit_from=donor)
    assert compiled == []
    assert len(refitted) == len(NAMES)
    assert [line.split(" in ")[0] for line in said] == [f"{name} refitted for {FULL}" for name in NAMES]
    assert all(engine.refittable and engine.activation_bytes == 20 for engine in engines)
    engines, _ = build(make_bundle(tmp_path / "unasked", b"other"), FULL, refit_from=donor)
    assert all(engine.refittable for engine in engines)
    assert compiled == []

    _, said = build(make_bundle(tmp_path / "c", b"odd weights"), FULL, options=options, refit_from=donor)
    assert [line.split(" in ")[0] for line in said[:2]] == [
        "text_encoder note: another structure; it is built anew",
        f"text_encoder built for {FULL}",
    ]
    assert names_of(compiled) == list(NAMES)

    _, said = build(make_bundle(tmp_path / "d", b"third"), RTX, refit_from=donor)
    assert said[0] == "text_encoder note: TensorRT-RTX cannot refit ahead of time, so it is built anew"


def test_what_cannot_be_refitted_is_refused(tmp_path, compiled, monkeypatch):
    make_bundle(tmp_path)
    with pytest.raises(InputError, match="leave out --refittable"):
        build(tmp_path, RTX, options=EngineOptions(refittable=True))
    monkeypatch.setattr(module, "library_version", lambda _: "11.3.0.99")
    with pytest.raises(InputError, match="TensorRT 11.3.0.99 builds refittable engines that may be wrong"):
        build(tmp_path, FULL, options=EngineOptions(refittable=True))
    assert compiled == []


def test_a_target_of_inductor_is_refused(tmp_path, compiled):
    make_bundle(tmp_path)
    with pytest.raises(
        InputError, match=r"^--target inductor: .*: build them with python -m export.build ... --target i"
    ):
        build(tmp_path, RTX, EngineTarget(Flavour.INDUCTOR, (0,)))
    assert compiled == []


def test_layers_are_part_of_the_bundle(tmp_path, compiled):
    engines, _ = build(make_bundle(tmp_path), FULL, options=EngineOptions(layers=True))
    listed = Bundle.open(tmp_path).manifest.files
    assert all(str(Path(engine.file).with_name(LAYERS_NAME)) in listed for engine in engines)
    build(tmp_path, EngineTarget(Flavour.TENSORRT, (90, 100)))
    assert not [name for name in Bundle.open(tmp_path).manifest.files if name.endswith(LAYERS_NAME)]


def test_layers_are_written_for_an_engine_that_has_none(tmp_path, compiled):
    build(make_bundle(tmp_path), FULL)
    compiled.clear()
    engines, _ = build(tmp_path, FULL, options=EngineOptions(layers=True))
    assert names_of(compiled) == list(NAMES)
    assert all((tmp_path / engine.folder / LAYERS_NAME).is_file() for engine in engines)
    build(tmp_path, FULL, options=EngineOptions(layers=True))
    build(tmp_path, FULL)
    assert names_of(compiled) == list(NAMES), "engines with layers serve both"


def test_engines_of_other_code_are_not_taken_from_the_store(tmp_path, compiled, monkeypatch):
    shared = SharedStore(tmp_path / "store")
    build(make_bundle(tmp_path / "a"), shared=shared)
    monkeypatch.setattr(module, "sha256_file", lambda _: "other code")
    build(make_bundle(tmp_path / "b"), shared=shared)
    assert names_of(compiled) == [*NAMES, *NAMES]


def test_a_killed_build_leaves_nothing_beside_the_engines(tmp_path, compiled):
    make_bundle(tmp_path)
    (tmp_path / ".partial-manifest.json").write_text("half")
    (tmp_path / "engines" / ".partial-x").mkdir(parents=True)
    (tmp_path / ".lock").touch()
    build(tmp_path)
    assert not list(tmp_path.rglob(".partial-*"))


def test_a_timing_cache_lies_in_the_store(tmp_path, compiled):
    build(make_bundle(tmp_path / "a"), FULL, RTX, shared=SharedStore(tmp_path / "store"))
    caches = {request.flavour: request.options.timing_cache for request in compiled}
    assert caches == {
        Flavour.TENSORRT: tmp_path / "store" / "timing-11.4.0-sm90.cache",
        Flavour.TENSORRT_RTX: None,
    }


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["none"], "none is not a bundle"),
        (["{bundle}", "--target", "sm61"], "no target sm61"),
        (["{bundle}", "--target", "sm90"], "this machine has no GPU"),
        (["{bundle}", "--target", "sm86", "--only", ","], "no network is named"),
        (["{bundle}", "--target", "sm86", "--refit-from", "nowhere"], "nowhere is not a bundle"),
        (["{bundle}", "--target", "sm86", "--layers"], "--layers: an engine's layers can be listed only on a machine"),
        (["{bundle}", "--target", "sm86", "--only", "unet"], "no network unet; there are: text_encoder, vae_decoder"),
        (["{bundle}", "--target", "cpu", "--only", "unet"], "no network unet; there are: text_encoder, vae_decoder"),
    ],
)
def test_mistakes_are_one_line(tmp_path, compiled, monkeypatch, capsys, arguments, said):
    monkeypatch.setattr("engines.targets.local_device", lambda: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    bundle = make_bundle(tmp_path / "bundle")
    if arguments[0] == "none":
        arguments = ["none", "--target", "sm86"]
    assert main([argument.format(bundle=bundle) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert err.startswith("engines.build: error: ")
    assert err.count("\n") == 1


def test_the_command_line(tmp_path, compiled, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    bundle = make_bundle(tmp_path / "bundle")
    assert main([str(bundle), "--target", "rtx", "--only", "vae_decoder", "--store", str(tmp_path / "store")]) == 0
    out, err = capsys.readouterr()
    assert out == f"{bundle}: 1 engines\n"
    assert err.startswith("vae_decoder        built for tensorrt_rtx sm86,sm89,sm120,sm121 in ")
    assert list((tmp_path / "store" / "engines").iterdir())


# What a Jetson or a locked-down server has: the standard library, NumPy and TensorRT.
BARE = """
import sys

class Only:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in sys.stdlib_module_names and top not in {allowed} and not top.startswith("_"):
            raise ModuleNotFoundError(f"{{name}} is not installed here")
        return None

sys.meta_path.insert(0, Only())
sys.path.insert(0, {repository!r})
from engines.build import main
sys.exit(main({arguments!r}))
"""


def run_bare(repository: Path, *arguments: str) -> subprocess.CompletedProcess:
    allowed = {"engines", "moma_rt", "kernels", "numpy", "filelock", "tensorrt", "tensorrt_rtx"} | {
        f"tensorrt_rtx_{part}" for part in ("bindings", "libs", "cu13", "cu13_bindings", "cu13_libs")
    }
    code = BARE.format(allowed=allowed, repository=str(repository), arguments=list(arguments))
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)


def test_the_device_needs_tensorrt_numpy_and_filelock_only(repository, tmp_path):
    """The whole command line runs, until the library fails to parse the graph."""
    done = run_bare(repository, str(make_bundle(tmp_path)), "--target", "sm86")
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert "cannot parse it" in last or "tensorrt_rtx is not installed" in last, done.stderr
