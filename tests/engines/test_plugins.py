"""The plugins, called through TensorRT's own `tensorrt.plugin`; TensorRT's native part is replaced."""

import json
from pathlib import Path

import pytest

from engines.plugins import CONTEXT, INJECTED, KernelShape, attention_shapes
from moma_rt.bundle.manifest import Manifest, write_manifest
from moma_rt.bundle.specs import Geometry, SelfAttentionLayer
from tests.engines.kernel_files import add_kernels, make_bundle, record

DRIVE = Path(__file__).parent / "drive_plugins.py"
TEXT_TOKENS, CONTEXT_TOKENS, CAPABILITY = 77, 4, 80
# SD1.5's levels at 512².
LEVELS = ((64, 320), (32, 640), (16, 1280), (8, 1280))
HEADS = 8
GEOMETRY = Geometry(
    *(512, 4, 64, TEXT_TOKENS, 768, CONTEXT_TOKENS, 1024),
    tuple(SelfAttentionLayer(f"level_{grid}", grid, channels, HEADS) for grid, channels in LEVELS),
    None,
)
DTYPES = {"float16": "HALF", "bfloat16": "BF16"}
SIZES = [
    {"rows": rows, "samples": samples, "reference": n} for rows, samples, n in ((2, 1, 17), (8, 4, 4096), (3, 3, 1))
]


def layer_of(shape: KernelShape, dtype: str) -> dict:
    rows = ["rows", shape.queries, shape.heads * shape.width]
    per_query = ["samples", shape.queries]
    if shape.operator == INJECTED:
        reference = ["samples", "reference", shape.heads * shape.width]
        inputs = [rows, rows, rows, reference, reference, ["samples", "reference"], per_query, [1]]
    else:
        text, context = (["rows", tokens, shape.heads * shape.width] for tokens in shape.tokens)
        inputs = [rows, text, text, context, context, per_query, ["samples", shape.tokens[0]]]
    return {
        "operator": shape.operator,
        "attributes": {"num_heads": shape.heads, "softmax_scale": shape.width**-0.5},
        "inputs": inputs,
        "dtype": DTYPES[dtype],
        "sizes": SIZES,
    }


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("bundle")
    write_manifest(root, Manifest("tests", "tests", GEOMETRY, {}, {}, ()))
    add_kernels(root, CAPABILITY)
    return root


def drive(bindings, bundle: Path, dtype: str, layers: list[dict]) -> list[dict]:
    request = {"kernels": str(bundle), "capability": CAPABILITY, "dtype": dtype, "layers": layers}
    done = bindings.run(DRIVE, stdin=json.dumps(request))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def grid_of(shape: KernelShape, block: int, sizes: dict[str, int]) -> dict[str, int]:
    lanes = shape.heads if shape.operator == INJECTED else 1
    return {
        "grid_x": -(-shape.queries // block),
        "grid_y": sizes["samples"] * lanes,
        "grid_z": sizes["rows"] // sizes["samples"],
    }


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_plugin_of_every_layer(plugin_bindings, bundle, dtype):
    shapes = attention_shapes(GEOMETRY)
    assert len(shapes) == 2 * len(LEVELS)
    answers = drive(plugin_bindings, bundle, dtype, [layer_of(shape, dtype) for shape in shapes])
    for shape, answer in zip(shapes, answers, strict=True):
        assert "error" not in answer
        written = record(shape, dtype, CAPABILITY)
        outputs = 1 if shape.operator == INJECTED else 2
        assert answer["outputs"] == outputs
        assert answer["dtypes"] == [DTYPES[dtype]] * outputs
        assert answer["combinations"] == [[DTYPES[dtype], "LINEAR"]] * 9
        assert answer["tactics"] == [0]
        assert answer["kernel"] == [written["entry"], f"// {written['file']}\n"]
        for sizes, found in zip(SIZES, answer["at"], strict=True):
            whole = [sizes["rows"], shape.queries, shape.heads * shape.width]
            assert found["shapes"] == [whole, whole[:2]][:outputs]
            block = {"block_x": written["threads"], "block_y": 1, "block_z": 1, "shared_mem": written["shared_bytes"]}
            assert found["launch"] == {**grid_of(shape, written["block_queries"], sizes), **block}
            further = [["INT", "INT32", sizes["reference"]]] if shape.operator == INJECTED else []
            assert found["arguments"] == further


def test_a_missing_kernel_is_named(plugin_bindings, bundle):
    shape = attention_shapes(GEOMETRY)[0]
    layers = [
        layer_of(KernelShape(INJECTED, 8, 48, 4096), "float16"),
        layer_of(KernelShape(CONTEXT, 8, 40, 4096, (77, 5)), "float16"),
        layer_of(shape, "bfloat16"),
        {**layer_of(shape, "float16"), "dtype": "FLOAT"},
    ]
    found = [answer["error"] for answer in drive(plugin_bindings, bundle, "float16", layers)]
    wanted = [
        "in HALF of InjectedSelfAttention of 8 heads of width 48 with 4096 queries",
        "in HALF of ContextCrossAttention of 8 heads of width 40 with 4096 queries and 77 + 5 tokens",
        "in BF16 of InjectedSelfAttention of 8 heads of width 40 with 4096 queries",
        "in FLOAT of InjectedSelfAttention of 8 heads of width 40 with 4096 queries",
    ]
    assert found == [f"there is no kernel {text}; the bundle's kernels are in float16" for text in wanted]


# Uses the plugin registry of the libraries that are installed.
REGISTER = """
import json, sys
from types import MappingProxyType
import tensorrt as trt
from engines.plugins import NetworkKernels, registered

def known():
    found = [trt.get_plugin_registry().get_creator(name, "1", "moma") for name in json.loads(sys.argv[1])]
    return [creator is not None for creator in found]

kernels = [NetworkKernels(name, "float16", MappingProxyType({})) for name in "ab"]
said = [known()]
for one in kernels:
    with registered(one):
        said.append(known())
    said.append(known())
try:
    with registered(kernels[0]):
        raise KeyboardInterrupt
except KeyboardInterrupt:
    said.append(known())
with registered(None):
    said.append(known())
print(json.dumps(said))
"""


def test_plugins_are_deregistered(bindings_over_rtx):
    done = bindings_over_rtx.run("-c", REGISTER, json.dumps([INJECTED, CONTEXT]))
    assert done.returncode == 0, done.stderr
    both, none = [True, True], [False, False]
    assert json.loads(done.stdout.splitlines()[-1]) == [none, both, none, both, none, none, none]


# A build up to its parser. The real one would crash when it creates a plugin; this one looks into the registry.
PARSE = """
import json, sys
from pathlib import Path
from types import MappingProxyType
import tensorrt as trt
from engines.plugins import NetworkKernels
from engines.tensorrt import EngineRequest, build_engine, refit_engine
from moma_rt.bundle.engines import Flavour
from moma_rt.errors import BundleError
from moma_rt.bundle.specs import NetworkSpec

seen, flags = [], []

def known():
    found = [trt.get_plugin_registry().get_creator(name, "1", "moma") for name in json.loads(sys.argv[1])]
    return [creator is not None for creator in found]

class Builder(trt.Builder):
    def create_network(self, asked):
        known_flags = trt.NetworkDefinitionCreationFlag.__members__
        flags.append([name for name, flag in known_flags.items() if asked >> int(flag) & 1])
        # The library is TensorRT-RTX, which has no such flag.
        return super().create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))

class Parser:
    num_errors = 0

    def __init__(self, network, log):
        pass

    def parse(self, graph, path):
        seen.append(known())
        return False

class Runtime:
    def __init__(self, log):
        pass

    def deserialize_cuda_engine(self, data):
        seen.append(known())
        return None

trt.Builder, trt.OnnxParser, trt.Runtime = Builder, Parser, Runtime
spec, file = NetworkSpec("denoiser", (), ()), Path(sys.argv[2])
for kernels in (NetworkKernels("a", "float16", MappingProxyType({})), None):
    request = EngineRequest(Flavour.TENSORRT, (90,), file, file.parent, spec, kernels=kernels)
    for act in (lambda: build_engine(request, file.parent, print), lambda: refit_engine(file, request, file.parent)):
        try:
            act()
        except BundleError:
            seen.append(known())
print()
print(json.dumps([flags, seen]))
"""


def test_plugins_are_registered_while_a_build_parses(bindings_over_rtx):
    done = bindings_over_rtx.run("-c", PARSE, json.dumps([INJECTED, CONTEXT]), DRIVE)
    assert done.returncode == 0, done.stderr
    flags, seen = json.loads(done.stdout.splitlines()[-1])
    assert flags == [["STRONGLY_TYPED", "PREFER_AOT_PYTHON_PLUGINS"], ["STRONGLY_TYPED"]]
    both, none = [True, True], [False, False]
    assert seen == [both, none] * 2 + [none, none] * 2


def test_a_library_that_cannot_use_plugins_ends_in_one_line(tmp_path, bindings_over_rtx):
    """TensorRT-RTX's libraries cannot create a network with plugins; TensorRT's would go on to parse the graph."""
    root = make_bundle(tmp_path / "bundle", 90)
    command = ("-m", "engines.build", root, "--target", "local", "--only", "denoiser")
    done = bindings_over_rtx.run(*command)
    assert done.returncode == 2
    assert done.stderr.startswith("engines.build: error: denoiser: tensorrt ")
    assert "cannot build here: " in done.stderr
    assert done.stderr.count("\n") == 1
    off = bindings_over_rtx.run(*command, "--plugins", "off")
    assert "cannot compile it: " in off.stderr, "without plugins it gets as far as the graph"
