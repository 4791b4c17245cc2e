"""Kernels in a bundle: when they are compiled, kept, shared and dropped. A compiled kernel is a line of text here."""

import dataclasses
import sys
from pathlib import Path
from types import ModuleType

import pytest

from engines.plugins import KernelShape, attention_shapes, choose
from engines.store import SharedStore
from engines.targets import EngineTarget
from export import attention_kernels
from export.attention_kernels import DEFAULT_CAPABILITIES, kernel_capabilities, kernels_key
from export.bundling import ExportPlan, build_bundle
from export.checkpoints import CheckpointRequest, load_checkpoint, roles_for
from export.networks import NETWORKS, Precisions
from moma_rt.bundle.engines import Flavour
from moma_rt.bundle.manifest import Bundle
from moma_rt.bundle.specs import Precision
from tests.engines.kernel_files import write_kernels

NAMES = ("text_encoder", "denoiser")
FP16, BF16, FP32 = (Precisions(p, p) for p in (Precision.FP16, Precision.BF16, Precision.FP32))
RTX, H100 = EngineTarget(Flavour.TENSORRT_RTX, (86, 89)), EngineTarget(Flavour.TENSORRT, (90,))


class CompileError(Exception):
    """Replaces that of `kernels.ptx`, which imports Triton."""


@pytest.fixture
def compiled(monkeypatch, exports):
    """Replaces the compiler, and tracing as `exports` does; returns the list of compiled (capabilities, dtypes)."""
    calls = []

    @dataclasses.dataclass(frozen=True)
    class AttentionLayer:
        operator: str
        heads: int
        width: int
        queries: int
        tokens: tuple[int, ...]

    def write(folder, layers, dtypes, capabilities, report):
        calls.append((list(capabilities), list(dtypes)))
        (capability,) = capabilities
        report("a kernel")
        write_kernels(folder, [KernelShape(**vars(layer)) for layer in layers], dtypes, capability)

    module = ModuleType("kernels.ptx")
    module.AttentionLayer, module.write_kernels, module.CompileError = AttentionLayer, write, CompileError
    monkeypatch.setitem(sys.modules, "kernels.ptx", module)
    monkeypatch.setattr("kernels.launch.CAPABILITIES", (80, 90, 100))
    monkeypatch.setattr(attention_kernels, "is_installed", lambda name: True)
    version = attention_kernels.importlib.metadata.version
    monkeypatch.setattr("importlib.metadata.version", lambda name: "3.9" if name == "triton" else version(name))
    return calls


def build(root: Path, *capabilities: int, names=NAMES, precisions=FP16, shared=None, off=False):
    """Build a bundle; return its kernels by capability, and the messages."""
    said = []
    plan = ExportPlan(tuple(names), precisions, None if off else capabilities)
    checkpoint = load_checkpoint(CheckpointRequest("tiny", roles=roles_for(names)))
    bundle = build_bundle(checkpoint, plan, root, lambda name, state: said.append(f"{name} {state}"), shared)
    bundle.verify(bundle.manifest.files)
    assert Bundle.open(root) == bundle
    folders = {entry.folder for entry in bundle.manifest.kernels}
    assert {f"kernels/{path.name}" for path in (root / "kernels").iterdir()} == folders
    assert {str(Path(name).parent) for name in bundle.manifest.files if name.startswith("kernels/")} == folders
    return {entry.capability: entry for entry in bundle.manifest.kernels}, said


@pytest.mark.parametrize(
    ("targets", "later", "precision", "expected"),
    [
        ((), (), Precision.FP32, ()),
        ((), (), Precision.FP16, DEFAULT_CAPABILITIES),
        ((), (), Precision.BF16, DEFAULT_CAPABILITIES),
        ((RTX,), (), Precision.FP16, ()),
        ((RTX, H100), (80,), Precision.FP16, (80, 90)),
        ((), (87,), Precision.BF16, (87,)),
        ((H100,), (80,), Precision.FP32, ()),
    ],
)
def test_for_which_devices(targets, later, precision, expected):
    assert kernel_capabilities(targets, later, precision) == expected


def test_kernels_are_files_of_the_bundle(tmp_path, compiled):
    kernels, said = build(tmp_path, 80, 90)
    assert compiled == [([80], ["float16"]), ([90], ["float16"])]
    assert [line.partition(" in ")[0] for line in said if "sm" in line] == [
        text
        for sm in (80, 90)
        for text in (f"denoiser compiling kernels for sm{sm}", f"denoiser kernels for sm{sm} built")
    ]
    assert list(kernels) == [80, 90]
    for capability, entry in kernels.items():
        assert entry.folder == f"kernels/denoiser_sm{capability}-{entry.key[:16]}"
        assert entry.file == f"{entry.folder}/kernels.json"


def test_the_engine_builder_finds_the_compiled_kernels(tmp_path, compiled, monkeypatch):
    monkeypatch.setattr("engines.plugins.is_installed", lambda name: True)
    build(tmp_path, 80)
    bundle = Bundle.open(tmp_path)
    found, why_not = choose(bundle, bundle.network("denoiser"), Flavour.TENSORRT, "11.4.0", 80)
    assert why_not == ""
    assert set(found.kernels) == set(attention_shapes(bundle.manifest.geometry))
    denoiser = NETWORKS["denoiser"].spec(bundle.manifest.geometry)
    grids = {tensor.shape[1].max for tensor in denoiser.inputs if tensor.name.startswith("object_mask")}
    assert {shape.queries for shape in found.kernels} == grids


def test_a_second_build_does_nothing(tmp_path, compiled):
    first, _ = build(tmp_path, 80)
    inode = (tmp_path / first[80].file).stat().st_ino
    again, said = build(tmp_path, 80)
    assert again == first
    assert (tmp_path / first[80].file).stat().st_ino == inode
    assert len(compiled) == 1
    assert "denoiser kept" in said


def test_kernels_for_other_devices_are_added(tmp_path, compiled):
    first, _ = build(tmp_path, 80)
    both, _ = build(tmp_path, 90)
    assert both[80] == first[80]
    assert list(both) == [80, 90]
    kept, _ = build(tmp_path, names=["text_encoder"])
    assert kept == both
    assert len(compiled) == 2


@pytest.mark.parametrize("change", ["precision", "code", "off"])
def test_outdated_kernels_are_dropped(tmp_path, compiled, monkeypatch, change):
    build(tmp_path, 80, 90)
    if change == "code":
        monkeypatch.setattr(attention_kernels, "kernels_code_hash", lambda: "other code")
    kernels, said = build(tmp_path, precisions=FP32 if change == "precision" else FP16, off=change == "off")
    assert kernels == {}
    for capability in (80, 90):
        assert f"denoiser dropped: the kernels for sm{capability}, which this export does not use" in said


def test_kernels_of_another_dtype_replace_the_first(tmp_path, compiled):
    first, _ = build(tmp_path, 80)
    second, said = build(tmp_path, 80, precisions=BF16)
    assert compiled == [([80], ["float16"]), ([80], ["bfloat16"])]
    assert first[80].folder != second[80].folder
    assert not [line for line in said if "dropped: the kernels" in line]


def test_no_kernels_are_compiled_without_triton(tmp_path, compiled, monkeypatch):
    monkeypatch.setattr(attention_kernels, "is_installed", lambda name: False)
    kernels, said = build(tmp_path, *DEFAULT_CAPABILITIES)
    assert kernels == {}
    notes = [line for line in said if "note" in line]
    assert notes == ["denoiser note: no kernels are compiled, since Triton is not installed: pip install triton"]
    assert compiled == []


def test_a_device_that_nothing_is_compiled_for(tmp_path, compiled):
    kernels, said = build(tmp_path, 80, 110)
    assert list(kernels) == [80]
    assert [line for line in said if "note" in line] == [
        "denoiser note: no kernels are compiled for sm110, only for sm80,sm90,sm100"
    ]


def test_bundles_share_kernels(tmp_path, compiled):
    shared = SharedStore(tmp_path / "store")
    first, _ = build(tmp_path / "a", 80, shared=shared)
    second, _ = build(tmp_path / "b", 80, shared=shared)
    assert first == second
    assert len(compiled) == 1
    assert (tmp_path / "a" / first[80].file).samefile(tmp_path / "b" / second[80].file)


def test_damaged_kernels_are_compiled_anew(tmp_path, compiled):
    first, _ = build(tmp_path, 80, 90)
    path = min((tmp_path / first[80].folder).glob("*.ptx"))
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[::-1])
    assert build(tmp_path, 80)[0] == first
    assert [capabilities for capabilities, _ in compiled] == [[80], [90], [80]]


def test_interrupted_while_compiling(tmp_path, compiled, monkeypatch):
    before, _ = build(tmp_path, 80)
    module = sys.modules["kernels.ptx"]
    working = module.write_kernels

    def interrupt(folder, *arguments):
        working(folder, *arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_kernels", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, 90, 100)
    assert not list(tmp_path.rglob(".partial-*"))
    bundle = Bundle.open(tmp_path)
    assert bundle.manifest.kernels == tuple(before.values())
    bundle.verify(bundle.manifest.files)
    monkeypatch.setattr(module, "write_kernels", working)
    assert list(build(tmp_path, 90, 100)[0]) == [80, 90, 100]


def test_a_kernel_that_cannot_be_compiled_is_a_note(tmp_path, compiled, monkeypatch):
    module = sys.modules["kernels.ptx"]
    working = module.write_kernels

    def failing(folder, layers, dtypes, capabilities, report):
        if list(capabilities) == [90]:
            raise CompileError("Triton 3.5.0 cannot compile for sm90: no reason")
        working(folder, layers, dtypes, capabilities, report)

    monkeypatch.setattr(module, "write_kernels", failing)
    found, said = build(tmp_path, 80, 90, 100)
    assert list(found) == [80, 100]
    note = "denoiser note: no kernels are compiled for sm90: Triton 3.5.0 cannot compile for sm90: no reason"
    assert note in said


def test_the_key_holds_what_a_kernel_depends_on(tmp_path, compiled, monkeypatch):
    build(tmp_path, 80)
    bundle = Bundle.open(tmp_path)
    network, geometry = bundle.network("denoiser"), bundle.manifest.geometry
    first = kernels_key(network, geometry, 80)
    assert first == kernels_key(dataclasses.replace(network, key="other weights"), geometry, 80)
    bf16 = dataclasses.replace(network, precision=Precision.BF16)
    keys = [first, kernels_key(network, geometry, 90), kernels_key(bf16, geometry, 80)]
    keys.append(kernels_key(network, dataclasses.replace(geometry, text_tokens=78), 80))
    with monkeypatch.context() as patch:
        patch.setattr(attention_kernels, "kernels_code_hash", lambda: "other code")
        keys.append(kernels_key(network, geometry, 80))
    with monkeypatch.context() as patch:
        patch.setattr("importlib.metadata.version", lambda name: "4.0")
        keys.append(kernels_key(network, geometry, 80))
    assert len(set(keys)) == len(keys)


def test_the_code_hash_covers_the_kernels_and_not_the_onnx_functions(monkeypatch, tmp_path):
    for name in ("registration.py", "a/triton_kernel.py", "a/onnx_function.py"):
        (tmp_path / "kernels" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "kernels" / name).write_text("x")
    monkeypatch.setattr(attention_kernels, "__file__", str(tmp_path / "export" / "attention_kernels.py"))
    first = attention_kernels.kernels_code_hash()
    (tmp_path / "kernels" / "a" / "onnx_function.py").write_text("y")
    assert attention_kernels.kernels_code_hash() == first
    (tmp_path / "kernels" / "a" / "triton_kernel.py").write_text("y")
    assert attention_kernels.kernels_code_hash() != first
