"""Which of a bundle's kernels are chosen, why none is, and which `kernels.json` is refused."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engines import plugins
from engines.plugins import KernelShape, attention_shapes, choose, read_kernels
from moma_rt.bundle.engines import Flavour
from moma_rt.bundle.manifest import Bundle, Manifest, NetworkEntry, read_manifest, write_manifest
from moma_rt.bundle.specs import Geometry, NetworkSpec, Precision, SelfAttentionLayer
from moma_rt.errors import BundleError
from tests.engines.kernel_files import add_kernels, record

LAYERS = (
    SelfAttentionLayer("down", 16, 320, 8),
    SelfAttentionLayer("up", 16, 320, 8),
    SelfAttentionLayer("mid", 8, 640, 8),
)
GEOMETRY = Geometry(128, 4, 16, 77, 768, 4, 1024, LAYERS, None)
FULL, RTX, VERSION = Flavour.TENSORRT, Flavour.TENSORRT_RTX, "11.4.0.106"


@pytest.fixture(autouse=True)
def everything_is_installed(monkeypatch):
    monkeypatch.setattr(plugins, "is_installed", lambda name: True)


def denoiser(precision: Precision = Precision.FP16, name: str = "denoiser") -> NetworkEntry:
    return NetworkEntry(NetworkSpec(name, (), ()), precision, "k", "s", "model.onnx", "lowered.onnx", ())


def make_bundle(root: Path, *capabilities: int, **options: Any) -> Bundle:
    write_manifest(root, Manifest("tests", "tests", GEOMETRY, {}, {}, ()))
    for capability in capabilities:
        add_kernels(root, capability, **options)
    return Bundle.open(root)


def test_layers_of_one_shape_share_their_kernels():
    assert attention_shapes(GEOMETRY) == (
        KernelShape("InjectedSelfAttention", 8, 40, 256),
        KernelShape("ContextCrossAttention", 8, 40, 256, (77, 4)),
        KernelShape("InjectedSelfAttention", 8, 80, 64),
        KernelShape("ContextCrossAttention", 8, 80, 64, (77, 4)),
    )


@pytest.mark.parametrize(("precision", "dtype"), [(Precision.FP16, "float16"), (Precision.BF16, "bfloat16")])
def test_kernels_of_the_networks_dtype_are_chosen(tmp_path, precision, dtype):
    bundle = make_bundle(tmp_path, 80, 90)
    found, why_not = choose(bundle, denoiser(precision), FULL, VERSION, 90)
    assert (found.dtype, why_not) == (dtype, "")
    assert list(found.kernels) == list(attention_shapes(GEOMETRY))
    for shape, kernel in found.kernels.items():
        written = record(shape, dtype, 90)
        assert kernel.ptx == f"// {written['file']}\n"
        assert (kernel.entry, kernel.block_queries, kernel.threads, kernel.shared_bytes) == tuple(
            written[name] for name in ("entry", "block_queries", "threads", "shared_bytes")
        )
        tensorrt_dtype = {"float16": "HALF", "bfloat16": "BF16"}[dtype]
        assert (
            found.find(shape.operator, tensorrt_dtype, shape.heads, shape.width, shape.queries, shape.tokens) == kernel
        )
    assert found.sha256 != choose(bundle, denoiser(precision), FULL, VERSION, 80)[0].sha256


def test_the_hash_covers_every_file(tmp_path):
    def longer(folder: Path) -> None:
        path = min(folder.glob("*-float16-*.ptx"))
        path.write_text(path.read_text() + "// more\n")

    def launched_otherwise(folder: Path) -> None:
        path = folder / "kernels.json"
        path.write_text(path.read_text().replace('"threads": 128', '"threads": 64'))

    hashes = set()
    for number, change in enumerate((lambda folder: None, longer, launched_otherwise)):
        root = tmp_path / str(number)
        root.mkdir()
        hashes.add(choose(make_bundle(root, 80, change=change), denoiser(), FULL, VERSION, 80)[0].sha256)
    assert len(hashes) == 3


@pytest.mark.parametrize(
    ("network", "flavour", "version", "capability", "why"),
    [
        (denoiser(), RTX, "1.7.1", 80, "TensorRT-RTX has no plugins"),
        (denoiser(), FULL, "10.3.0", 80, "TensorRT 10.3.0 has no plugins ahead of time (since 10.9)"),
        (denoiser(), FULL, VERSION, 90, "they are for sm80,sm86, and none for sm90"),
        (denoiser(Precision.FP32), FULL, VERSION, 80, "there are none in fp32"),
        (denoiser(name="vae_decoder"), FULL, VERSION, 80, ""),
    ],
)
def test_why_kernels_are_not_used(tmp_path, network, flavour, version, capability, why):
    assert choose(make_bundle(tmp_path, 80, 86), network, flavour, version, capability) == (None, why)


def test_a_bundle_without_kernels_gives_no_reason(tmp_path):
    assert choose(make_bundle(tmp_path), denoiser(), FULL, "10.3.0", 80) == (None, "")


def test_a_dtype_or_a_shape_without_kernel(tmp_path):
    bundle = make_bundle(tmp_path, 80, dtypes=["bfloat16"])
    first = "InjectedSelfAttention of 8 heads of width 40 with 256 queries"
    assert choose(bundle, denoiser(), FULL, VERSION, 80) == (None, f"there is none in float16 of {first}")
    other = dataclasses.replace(GEOMETRY, text_tokens=78)
    write_manifest(tmp_path, dataclasses.replace(read_manifest(tmp_path), geometry=other))
    _, why = choose(Bundle.open(tmp_path), denoiser(Precision.BF16), FULL, VERSION, 80)
    assert why.endswith("of ContextCrossAttention of 8 heads of width 40 with 256 queries and 78 + 4 tokens")


@pytest.mark.parametrize(
    "missing",
    ["tensorrt.plugin", *(f"kernels.{name}_attention.tensorrt_plugin" for name in ("injected_self", "context_cross"))],
)
def test_a_module_that_is_missing(tmp_path, monkeypatch, missing):
    monkeypatch.setattr(plugins, "is_installed", lambda name: name != missing)
    _, why = choose(make_bundle(tmp_path, 80), denoiser(), FULL, VERSION, 80)
    assert why == f"there is no module {missing}"


@pytest.mark.parametrize(
    ("version", "numpy", "taken"),
    [
        ("10.16.1.11", "2.3.5", True),
        ("10.16.1.11", "2.4.0", False),
        ("10.9.0", "1.26.4", True),
        ("11.3.0", "2.10.1", False),
        ("11.4.0", "2.10.1", True),
    ],
)
def test_a_numpy_that_is_too_new_for_an_old_release(tmp_path, monkeypatch, version, numpy, taken):
    monkeypatch.setattr("numpy.__version__", numpy)
    found, why = choose(make_bundle(tmp_path, 80), denoiser(), FULL, version, 80)
    assert (found is not None) == taken
    assert why == "" if taken else why.endswith(f"do not work with NumPy {numpy}: pip install 'numpy<2.4'")


def edited(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """Return a function that edits kernels.json before it is hashed: malformed, but with the right hash."""

    def edit(folder: Path) -> None:
        data = json.loads((folder / "kernels.json").read_text())
        change(data)
        (folder / "kernels.json").write_text(json.dumps(data))

    return edit


def first(**values: Any) -> Callable[[Path], None]:
    return edited(lambda data: data["kernels"][0].update(values))


def content(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "kernels.json").write_text(text)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (content(""), "JSONDecodeError"),
        (content("[]"), "TypeError"),
        (content("{}"), "KeyError: 'format_version'"),
        (content("[" * 200_000), "RecursionError"),
        (content("\\xff"), "JSONDecodeError"),
        (edited(lambda d: d.update(format_version=2)), "format_version is 2, not 1"),
        (edited(lambda d: d.update(kernels={})), "kernels is {}, not a list"),
        (edited(lambda d: d["kernels"].append(3)), "TypeError"),
        (edited(lambda d: d["kernels"][0].pop("entry")), "KeyError: 'entry'"),
        (edited(lambda d: d["kernels"].append(d["kernels"][0])), "two kernels in float16 of InjectedSelfAttention"),
        (first(operator="Attention"), "an operator is 'Attention', not one of InjectedSelfAttention, Context"),
        (first(operator=[]), "TypeError"),
        (first(capability=90), "a kernel is for sm90, and the folder for sm80"),
        (first(capability="80"), "capability is '80', not a whole number of 1 to 999"),
        (first(dtype="float32"), "a dtype is 'float32', not one of float16, bfloat16"),
        (first(heads=0), "heads is 0, not a whole number"),
        (first(width=True), "width is True, not a whole number"),
        (first(queries=1.5), "queries is 1.5, not a whole number"),
        (first(queries=2**40), f"queries is {2**40}, not a whole number"),
        (first(tokens=[77]), "the tokens of InjectedSelfAttention are [77], not 0 numbers"),
        (edited(lambda d: d["kernels"][2].update(tokens=[77, "4"])), "a number of tokens is '4'"),
        (first(block_queries=0), "block_queries is 0, not a whole number"),
        (first(threads=2048), "threads is 2048, not a whole number of 1 to 1024"),
        (first(shared_bytes=-1), "shared_bytes is -1, not a whole number of 0 to"),
        (first(entry="a kernel"), "an entry is 'a kernel', not the name of a kernel"),
        (first(entry=None), "an entry is None"),
        *(
            (first(file=name), f"a file is {name!r}, not the name of a .ptx beside it")
            for name in (
                "../../etc/passwd",
                "/etc/passwd",
                "../x.ptx",
                "a/b.ptx",
                "..\\x.ptx",
                ".ptx",
                "kernels.json",
                3,
            )
        ),
    ],
)
def test_a_malformed_file_is_named_in_one_line(tmp_path, change, said):
    bundle = make_bundle(tmp_path, 80, change=change)
    with pytest.raises(BundleError) as caught:
        choose(bundle, denoiser(), FULL, VERSION, 80)
    assert "kernels.json is malformed: " in str(caught.value)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["kernels.json", "injectedselfattention-float16-8x40-256-sm80.ptx"])
def test_an_altered_file_is_not_read(tmp_path, name):
    bundle = make_bundle(tmp_path, 80)
    (path,) = tmp_path.glob(f"kernels/*/{name}")
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(BundleError, match=f"{name} was altered"):
        choose(bundle, denoiser(), FULL, VERSION, 80)


def test_a_file_without_a_hash_is_not_read(tmp_path):
    make_bundle(tmp_path, 80)
    manifest = read_manifest(tmp_path)
    files = {name: file for name, file in manifest.files.items() if "8x80" not in name}
    write_manifest(tmp_path, dataclasses.replace(manifest, files=files))
    with pytest.raises(BundleError, match=r"does not list kernels/denoiser_sm80-.*8x80"):
        choose(Bundle.open(tmp_path), denoiser(), FULL, VERSION, 80)


def test_files_that_are_missing_show_when_the_bundle_is_opened(tmp_path):
    make_bundle(tmp_path, 80)
    min(tmp_path.glob("kernels/*/*.ptx")).unlink()
    with pytest.raises(BundleError, match=r"\.ptx is missing; build the bundle again"):
        Bundle.open(tmp_path)


def test_what_a_link_leads_to_is_verified(tmp_path):
    root = tmp_path / "bundle"
    root.mkdir()
    bundle = make_bundle(root, 80)
    path = min(root.glob("kernels/*/*.ptx"))
    path.symlink_to(path.rename(tmp_path / "outside.ptx"))
    (entry,), dtype = bundle.manifest.kernels, "bfloat16" if "bfloat16" in path.name else "float16"
    assert read_kernels(bundle, entry, dtype).kernels
    (tmp_path / "outside.ptx").write_text("// other code")
    with pytest.raises(BundleError, match=r"\.ptx was altered"):
        read_kernels(bundle, entry, dtype)
