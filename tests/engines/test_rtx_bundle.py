"""A whole bundle with engines of TensorRT-RTX, which are built without a GPU."""

import collections
from pathlib import Path

import onnx
import onnx.inliner
import pytest

from engines.plugins import CONTEXT, PLUGINS_SINCE, KernelShape, attention_shapes
from engines.tensorrt import EngineRequest, _configure
from export.lowering import DOCUMENTED
from moma_rt.backends.libraries import library_log
from moma_rt.bundle.engines import Device, Flavour, Library, select
from moma_rt.bundle.footprint import format_bytes
from moma_rt.bundle.manifest import Bundle
from moma_rt.bundle.specs import NetworkSpec, Precision
from moma_rt.inspection import describe_bundle

pytestmark = pytest.mark.tensorrt
TARGET = "sm86,sm89,sm120"
# Of each self-attention: its own and the injected one. Of each cross-attention: to the text and to the context.
SOFTMAXES_PER_LAYER = 2


@pytest.fixture(scope="module")
def bundle(request) -> Bundle:
    pytest.importorskip("tensorrt_rtx")
    return Bundle.open(request.getfixturevalue("rtx_bundle"))


def test_every_network_has_an_engine_for_every_device(bundle):
    library = Library(bundle.manifest.engines[0].flavour, bundle.manifest.engines[0].version)
    bundle.verify(bundle.manifest.files)
    for capability in (86, 89, 120):
        found = select(bundle.manifest.engines, bundle.manifest.networks, library, Device("a GPU", capability))
        assert set(found) == set(bundle.manifest.networks)
    assert len(bundle.manifest.engines) == len(bundle.manifest.networks), "one engine for all devices"
    precisions = {name: entry.precision for name, entry in bundle.manifest.networks.items()}
    assert precisions.pop("context_projector") is Precision.FP32
    assert precisions.pop("language_model") is Precision.INT4
    assert set(precisions.values()) == {Precision.FP16}


def test_engines_can_be_captured_as_cuda_graphs():
    trt = pytest.importorskip("tensorrt_rtx")
    config = trt.Builder(library_log(Flavour.TENSORRT_RTX)).create_builder_config()
    assert not config.get_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    _configure(trt, config, EngineRequest(Flavour.TENSORRT_RTX, (89,), Path(), Path(), NetworkSpec("any", (), ())))
    assert config.get_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)


def test_the_memory_an_engine_needs_is_known(bundle):
    for engine in bundle.manifest.engines:
        assert engine.weight_bytes is not None
        assert engine.activation_bytes is not None
        # All weights are in the engine, beside the compiled code.
        size = bundle.manifest.files[engine.file].size
        assert 0 < engine.weight_bytes <= size
    text = describe_bundle(bundle)
    networks, engines = len(bundle.manifest.networks), bundle.manifest.engines
    (line,) = (line for line in text.splitlines() if line.startswith("tensorrt_rtx "))
    assert line.startswith(f"tensorrt_rtx {engines[0].version} on {TARGET} ")
    memory = sum(e.weight_bytes for e in engines) + max(e.activation_bytes for e in engines)
    assert line.endswith(f" {networks} of {networks} {format_bytes(memory):>10}")


def test_each_softmax_of_the_denoiser_is_one_fused_attention(bundle):
    """The builder refuses an `Attention` that it has no fused kernel for, so all in an engine are fused."""
    model = onnx.load(bundle.path(bundle.network("denoiser").onnx), load_external_data=False)
    calls = collections.Counter(node.op_type for node in model.graph.node if node.domain == "moma")
    layers = len(bundle.manifest.geometry.self_attention)
    assert calls == {"InjectedSelfAttention": layers, "ContextCrossAttention": layers}
    inlined = collections.Counter(node.op_type for node in onnx.inliner.inline_local_functions(model).graph.node)
    assert inlined["Attention"] == SOFTMAXES_PER_LAYER * 2 * layers
    assert inlined["Softmax"] == 0
    assert not [attribute for node in model.graph.node for attribute in node.attribute if "decompos" in attribute.name]


def test_the_first_tensorrt_with_plugins_knows_the_operators_of_the_full_graph(bundle):
    """`Attention`, which TensorRT knows since 10.15, is only in the functions, which plugins replace."""
    assert PLUGINS_SINCE == (10, 9)
    model = onnx.load(bundle.path(bundle.network("denoiser").onnx), load_external_data=False)
    standard = [node for node in model.graph.node if node.domain == ""]
    names = {node.op_type for node in standard}
    assert "Attention" not in names
    assert {node.op_type for function in model.functions for node in function.node} >= {"Attention"}
    # 10.9 is the first release with opset 21's GroupNormalization; 10.3 documents all others, as of opset 20.
    assert names - DOCUMENTED == {"GroupNormalization"}
    for node in standard:
        if node.op_type != "GroupNormalization":
            schema = onnx.defs.get_schema(node.op_type, 20, "")
            assert {attribute.name for attribute in node.attribute} <= set(schema.attributes), node.op_type
    constants = {t.name for t in model.graph.initializer}
    constants |= {node.output[0] for node in standard if node.op_type == "Constant"}
    for node in standard:
        if node.op_type.startswith("Reduce") or node.op_type in ("Squeeze", "Unsqueeze"):
            assert set(node.input[1:]) <= constants, node.op_type


def test_the_operators_nodes_name_their_plugin_and_inputs_have_one_dtype(bundle):
    model = onnx.load(bundle.path(bundle.network("denoiser").onnx), load_external_data=False)
    nodes = [node for node in model.graph.node if node.domain == "moma"]
    dtypes = {value.name: value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.value_info)}
    dtypes |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    for node in nodes:
        assert {a.name: a.s for a in node.attribute if a.type == onnx.AttributeProto.STRING} == {
            "plugin_namespace": b"moma"
        }
        assert {dtypes[name] for name in (*node.input, *node.output)} == {onnx.TensorProto.FLOAT16}, node.name


def test_kernels_are_compiled_for_the_shapes_in_the_graph(bundle):
    model = onnx.load(bundle.path(bundle.network("denoiser").onnx), load_external_data=False)
    values = (*model.graph.input, *model.graph.value_info)
    sizes = {value.name: [d.dim_value for d in value.type.tensor_type.shape.dim] for value in values}
    met = set()
    for node in model.graph.node:
        if node.domain == "moma":
            heads = next(a.i for a in node.attribute if a.name == "num_heads")
            _, queries, channels = sizes[node.input[0]]
            tokens = [sizes[node.input[index]][1] for index in (1, 3)] if node.op_type == CONTEXT else []
            met.add(KernelShape(node.op_type, heads, channels // heads, queries, tuple(tokens)))
            dynamic = [name for name in (*node.input, *node.output) if 0 in sizes[name][2:]]
            assert not dynamic
    assert met == set(attention_shapes(bundle.manifest.geometry))


def test_memory_grows_with_the_batch_and_not_with_its_square(bundle):
    """Rows that TensorRT cannot bound would multiply: 16 times the memory for a batch of 4."""
    denoiser = next(engine for engine in bundle.manifest.engines if engine.network == "denoiser")
    spec = bundle.network("denoiser").spec
    largest = sum(int(bytes_of(tensor)) for tensor in (*spec.inputs, *spec.outputs))
    assert denoiser.activation_bytes < 20 * largest


def bytes_of(tensor) -> int:
    size = {"float32": 4, "float16": 2, "int32": 4}[tensor.dtype]
    for length in tensor.max_shape:
        size *= length
    return size


def test_the_same_bundle_still_runs_on_a_cpu(bundle, repository):
    from moma_rt.runtime import Runtime

    runtime = Runtime.load(bundle.root, backend="onnxruntime")
    assets = repository / "assets"
    subject = runtime.enroll(assets / "coffee.jpg", assets / "coffee_mask.png", "coffee cup")
    picture = runtime.generate(subject, "A coffee cup on a beach.", steps=2).images[0]
    assert picture.size == (256, 256)
    assert len(set(picture.tobytes())) > 16
