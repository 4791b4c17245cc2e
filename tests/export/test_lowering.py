"""Graphs lowered for TensorRT 10.3 use documented operators only, and compute what the full graphs do."""

import getpass
import shutil
import sysconfig
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator

from export.lowering import DOCUMENTED, OPSETS, LoweringError, write_lowered
from export.networks import NETWORKS
from moma_rt.bundle.manifest import Bundle
from moma_rt.bundle.specs import NetworkSpec

FULL, LOWERED = "model.onnx", "lowered.onnx"
# The dynamic dimensions in two runs of every network; `reference` limits the tokens of every grid.
SMALL = {"batch": 1, "guided_batch": 1, "sequence": 1, "past": 0, "image_sequence": 1, "reference": 1}
LARGE = {"batch": 3, "guided_batch": 6, "sequence": 9, "past": 5, "image_sequence": 7, "reference": 37}
TOLERANCES = {"float": 1e-6, "float16": 2e-3}


@pytest.fixture(scope="module")
def specs(tiny_bundle) -> dict[str, NetworkSpec]:
    return {name: entry.spec for name, entry in Bundle.open(tiny_bundle).manifest.networks.items()}


@pytest.fixture(scope="module")
def folders(tiny_bundle, tmp_path_factory) -> dict[str, Path]:
    """The bundle's graphs of each network, copied beside the weights, where ONNX's tools look for them."""
    bundle, root = Bundle.open(tiny_bundle), tmp_path_factory.mktemp("lowered")
    for name, entry in bundle.manifest.networks.items():
        (root / name).mkdir()
        for graph in (entry.onnx, entry.lowered):
            shutil.copy(bundle.path(graph), root / name)
        for file in entry.weights:
            shutil.copytree(bundle.path(file).parent, root / name / Path(file).parent.name)
    return {name: root / name for name in bundle.manifest.networks}


def graph_of(path: Path) -> onnx.ModelProto:
    return onnx.load(path, load_external_data=False)


def run(path: Path, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, inputs)


def inputs_of(spec: NetworkSpec, wanted: dict[str, int]) -> dict[str, np.ndarray]:
    """Random values in each input's range."""
    dims = {dim for tensor in spec.inputs for dim in tensor.dynamic_axes.values()}
    sizes = {dim.name: min(dim.max, wanted[dim.name.split("_tokens_")[0]]) for dim in dims}
    generator, inputs = np.random.default_rng(wanted["batch"]), {}
    for tensor in spec.inputs:
        shape = tensor.resolve(**sizes)
        if tensor.name == "positions":
            values = sizes["past"] + np.arange(sizes["sequence"])[None]
        elif tensor.name == "token_ids":
            values = generator.integers(0, 50, shape)
        elif tensor.name.startswith("object_mask"):
            values = generator.integers(0, 2, shape)
            # The operator needs at least one token.
            values[:, -1] = 1
        elif tensor.name in ("strength", "foreground_mask", "image", "schedule_row"):
            values = generator.random(shape)
        else:
            values = generator.standard_normal(shape)
        inputs[tensor.name] = values.astype(tensor.dtype)
    return inputs


def assert_close(found: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """Compare the L2 norm and the maximum of the difference, each relative to that of the expected values."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    a, b = found.astype(np.float64), expected.astype(np.float64)
    assert np.isfinite(a).all()
    norm, worst = np.linalg.norm(a - b), np.abs(a - b).max(initial=0)
    assert norm <= tolerance * np.linalg.norm(b), f"{norm / np.linalg.norm(b):.1e} would have passed"
    assert worst <= tolerance * np.abs(b).max(initial=0), f"{worst / np.abs(b).max():.1e} would have passed"


class TestNetworks:
    @pytest.mark.parametrize("name", NETWORKS)
    def test_only_documented_operators_are_left(self, folders, name):
        path = folders[name] / LOWERED
        onnx.checker.check_model(path, full_check=True)
        model = graph_of(path)
        assert {node.op_type for node in model.graph.node} <= DOCUMENTED
        assert not any(node.domain for node in model.graph.node)
        assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 20)]
        assert model.ir_version == 9
        assert not model.functions

    @pytest.mark.parametrize("name", NETWORKS)
    def test_documented_restrictions_hold(self, folders, name):
        model = onnx.shape_inference.infer_shapes(graph_of(folders[name] / LOWERED))
        constants = {tensor.name for tensor in model.graph.initializer}
        edges = {value.name for value in (*model.graph.input, *model.graph.output)}
        dtypes = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
        for node in model.graph.node:
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            if node.op_type in ("Squeeze", "Unsqueeze") or node.op_type.startswith("Reduce"):
                assert len(node.input) == 1 or node.input[1] in constants, node.name
            if node.op_type == "Resize":
                assert attributes["mode"] in (b"nearest", b"linear")
                assert attributes["coordinate_transformation_mode"] == b"asymmetric"
                assert attributes["nearest_mode"] == b"floor"
                assert not attributes["antialias"]
            if node.op_type == "LayerNormalization":
                assert len(node.output) == 1
        inner_bytes = {name for name, dtype in dtypes.items() if dtype == TensorProto.UINT8}
        assert inner_bytes <= edges, "UINT8 is for inputs and outputs of the network"

    @pytest.mark.parametrize("name", NETWORKS)
    def test_inputs_outputs_and_weights_are_the_full_graphs(self, folders, name):
        full, lowered = (graph_of(folders[name] / file) for file in (FULL, LOWERED))
        assert list(lowered.graph.input) == list(full.graph.input)
        assert list(lowered.graph.output) == list(full.graph.output)
        assert lowered.graph.name == full.graph.name
        weights = {tensor.name: tensor for tensor in lowered.graph.initializer}
        assert any(tensor.external_data for tensor in full.graph.initializer)
        for tensor in full.graph.initializer:
            assert weights[tensor.name] == tensor
        added = [weights[name] for name in weights.keys() - {tensor.name for tensor in full.graph.initializer}]
        assert not any(tensor.external_data for tensor in added)

    @pytest.mark.parametrize("sizes", [SMALL, LARGE], ids=["small", "large"])
    @pytest.mark.parametrize("name", NETWORKS)
    def test_onnx_runtime_computes_the_same(self, folders, specs, name, sizes):
        inputs = inputs_of(specs[name], sizes)
        found, expected = (run(folders[name] / file, inputs) for file in (LOWERED, FULL))
        for tensor, a, b in zip(specs[name].outputs, found, expected, strict=True):
            if tensor.dtype == "uint8":
                steps = np.abs(a.astype(int) - b)
                assert steps.max() <= 1, "a value may be rounded the other way"
                assert (steps > 0).mean() < 1e-3
            else:
                assert_close(a, b, 1e-5)

    @pytest.mark.parametrize("name", NETWORKS)
    def test_nothing_of_the_machine_is_in_the_file(self, folders, tiny_bundle, repository, name):
        path = folders[name] / LOWERED
        content = path.read_bytes()
        for place in (str(repository), sysconfig.get_paths()["purelib"], str(tiny_bundle.parent), '.py"', ".py:"):
            assert place.encode() not in content, place
        assert getpass.getuser() not in graph_of(path).producer_name

    def test_weights_are_not_read_and_the_file_is_the_same_every_time(self, folders, tmp_path):
        shutil.copy(folders["denoiser"] / FULL, tmp_path)
        write_lowered(tmp_path / FULL, tmp_path / LOWERED)
        assert (tmp_path / LOWERED).read_bytes() == (folders["denoiser"] / LOWERED).read_bytes()


def test_the_documented_operators_are_in_opset_20():
    for name in DOCUMENTED:
        assert not onnx.defs.get_schema(name, OPSETS[0], "").deprecated, name
    assert not DOCUMENTED & {"Attention", "GroupNormalization", "RMSNormalization", "RotaryEmbedding", "If", "Loop"}


class Graph:
    """A graph of opset 23 with external weights, and its lowered graph."""

    def __init__(self, folder: Path, text: str, *initializers: TensorProto) -> None:
        imports = '"" : 23, "com.microsoft" : 1' if "com.microsoft" in text else '"" : 23'
        model = onnx.parser.parse_model(f"<ir_version: 11, opset_import: [{imports}]>\nexample {text}")
        model.graph.initializer.extend(initializers)
        self.full, self.lowered = folder / FULL, folder / LOWERED
        onnx.save(model, self.full, save_as_external_data=True, location="weights", size_threshold=0)
        onnx.checker.check_model(self.full, full_check=True)

    def lower(self) -> onnx.GraphProto:
        write_lowered(self.full, self.lowered)
        onnx.checker.check_model(self.lowered, full_check=True)
        return graph_of(self.lowered).graph

    @property
    def opset(self) -> int:
        return graph_of(self.lowered).opset_import[0].version

    def inputs(self, **sizes: int) -> dict[str, np.ndarray]:
        """Random values; `sizes` are those of the dynamic dimensions. In a mask, every query sees the first key."""
        generator, inputs = np.random.default_rng(0), {}
        for value in graph_of(self.full).graph.input:
            shape = [sizes.get(d.dim_param, d.dim_value) for d in value.type.tensor_type.shape.dim]
            values = generator.standard_normal(shape)
            if value.type.tensor_type.elem_type == TensorProto.BOOL:
                values = values > 0
                values[..., 0] = True
            inputs[value.name] = values.astype(onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))
        return inputs

    def assert_same(self, tolerance: float, **sizes: int) -> None:
        """ONNX Runtime computes the same from both."""
        inputs = self.inputs(**sizes)
        for found, expected in zip(run(self.lowered, inputs), run(self.full, inputs), strict=True):
            assert_close(found, expected, tolerance)


def operators(graph: onnx.GraphProto) -> list[str]:
    return [node.op_type for node in graph.node]


FLAT = "T[2,7,32] q, T[2,9,32] k, T[2,9,32] v"
BY_HEAD = "T[2,4,7,8] q, T[2,4,9,8] k, T[2,4,9,6] v"
SQUARE = "T[2,4,7,8] q, T[2,4,7,8] k, T[2,4,7,8] v"
ATTENTIONS = {
    "flat": (FLAT, "q, k, v", "q_num_heads = 4, kv_num_heads = 4"),
    "flat, scaled": (FLAT, "q, k, v", "q_num_heads = 4, kv_num_heads = 4, scale = 0.2"),
    "flat, heads shared": ("T[2,7,64] q, T[2,9,32] k, T[2,9,32] v", "q, k, v", "q_num_heads = 8, kv_num_heads = 4"),
    "by head": (BY_HEAD, "q, k, v", ""),
    "by head, scaled": (BY_HEAD, "q, k, v", "scale = 0.7, softcap = 0.0, qk_matmul_output_mode = 0"),
    "heads shared": ("T[2,6,7,8] q, T[2,2,9,8] k, T[2,2,9,8] v", "q, k, v", ""),
    "one head for all": ("T[2,6,7,8] q, T[2,1,9,8] k, T[2,1,9,8] v", "q, k, v", ""),
    "dynamic": ("T[B,4,S,8] q, T[B,4,N,8] k, T[B,4,N,8] v, bool[1,1,S,N] mask", "q, k, v, mask", ""),
    "unknown heads": ("T[B,H,S,8] q, T[B,H,N,8] k, T[B,H,N,8] v", "q, k, v", ""),
    "causal": (SQUARE, "q, k, v", "is_causal = 1"),
    "causal, other lengths": (BY_HEAD, "q, k, v", "is_causal = 1"),
    "flat, causal": ("T[2,9,32] q, T[2,9,32] k, T[2,9,32] v", "q, k, v", "q_num_heads=4, kv_num_heads=4, is_causal=1"),
    "boolean mask": (BY_HEAD + ", bool[7,9] mask", "q, k, v, mask", ""),
    "boolean mask of a batch": (BY_HEAD + ", bool[2,1,7,9] mask", "q, k, v, mask", ""),
    "mask that is added": (FLAT + ", T[2,4,7,9] mask", "q, k, v, mask", "q_num_heads = 4, kv_num_heads = 4"),
    "causal and masked": (SQUARE + ", bool[1,1,7,7] mask", "q, k, v, mask", "is_causal = 1"),
}


class TestAttention:
    @pytest.mark.parametrize("dtype", TOLERANCES)
    @pytest.mark.parametrize("form", ATTENTIONS)
    def test_every_form(self, tmp_path, form, dtype):
        inputs, names, attributes = ATTENTIONS[form]
        node = f"Attention <{attributes}> ({names})" if attributes else f"Attention ({names})"
        rank = "A,B,C" if "q_num_heads" in attributes else "A,B,C,D"
        text = f"({inputs.replace('T[', dtype + '[')}) => ({dtype}[{rank}] y) {{ y = {node} }}"
        graph = Graph(tmp_path, text)
        lowered = graph.lower()
        assert set(operators(lowered)) <= {"Mul", "Transpose", "MatMul", "Softmax", "Reshape", "Gather", "Where", "Add"}
        assert graph.opset == 20
        graph.assert_same(TOLERANCES[dtype], B=2, S=5, N=3, H=4)

    def test_q_is_scaled_before_the_product_so_that_fp16_does_not_overflow(self, tmp_path):
        graph = Graph(tmp_path, "(float16[1,1,4,160] q) => (float16[1,1,4,160] y) { y = Attention (q, q, q) }")
        graph.lower()
        inputs = {"q": np.full((1, 1, 4, 160), 30, np.float16)}
        assert 160 * 30 * 30 > float(np.finfo(np.float16).max)
        np.testing.assert_array_equal(run(graph.lowered, inputs)[0], inputs["q"])

    def test_layers_share_the_additive_mask(self, tmp_path):
        text = """(float[1,2,3,4] q, bool[3,3] mask) => (float[1,2,3,4] y) {
            x = Attention (q, q, q, mask)
            y = Attention (x, x, x, mask)
        }"""
        graph = Graph(tmp_path, text)
        assert operators(graph.lower()).count("Where") == 1
        graph.assert_same(1e-6)

    def test_a_fully_masked_query_averages_all_values(self, tmp_path):
        text = "(float[1,1,3,4] q, bool[3,3] mask) => (float[1,1,3,4] y) { y = Attention (q, q, q, mask) }"
        graph = Graph(tmp_path, text)
        graph.lower()
        inputs = {**graph.inputs(), "mask": np.zeros((3, 3), bool)}
        (found,) = run(graph.lowered, inputs)
        np.testing.assert_allclose(found[0, 0], np.tile(inputs["q"][0, 0].mean(0), (3, 1)), rtol=1e-6)


def group_normalization(dtype: str, shape: str, attributes: str = "") -> str:
    return f"""({dtype}[{shape}] x, {dtype}[16] scale, {dtype}[16] bias) => ({dtype}[{shape}] y) {{
        y = GroupNormalization <num_groups = 4, epsilon = 0.001 {attributes}> (x, scale, bias)
    }}"""


class TestGroupNormalization:
    @pytest.mark.parametrize("shape", ["B,16,6,5", "2,16,6,5", "2,16,H,5", "B,16,9"])
    @pytest.mark.parametrize("dtype", TOLERANCES)
    def test_it_is_an_instance_normalization_of_groups(self, tmp_path, dtype, shape):
        graph = Graph(tmp_path, group_normalization(dtype, shape))
        assert operators(graph.lower()).count("InstanceNormalization") == 1
        assert graph.opset == 20
        graph.assert_same(TOLERANCES[dtype], B=3, H=6)

    @pytest.mark.parametrize(("attributes", "casts"), [("", 2), (", stash_type = 10", 0)])
    def test_statistics_have_the_precision_that_is_asked_for(self, tmp_path, attributes, casts):
        graph = Graph(tmp_path, group_normalization("float16", "2,16,6,5", attributes))
        assert operators(graph.lower()).count("Cast") == casts

    def test_bfloat16_passes_through_fp32(self, tmp_path):
        graph = Graph(tmp_path, group_normalization("bfloat16", "2,16,6,5"))
        lowered = graph.lower()
        dtypes = {tensor.name: tensor.data_type for tensor in lowered.initializer}
        inferred = onnx.shape_inference.infer_shapes(graph_of(graph.lowered)).graph.value_info
        dtypes |= {value.name: value.type.tensor_type.elem_type for value in inferred}
        (node,) = (node for node in lowered.node if node.op_type == "InstanceNormalization")
        assert [dtypes[name] for name in node.input] == [TensorProto.FLOAT] * 3
        inputs = graph.inputs()
        (found,) = ReferenceEvaluator(str(graph.lowered)).run(None, inputs)
        exact = Graph(tmp_path, group_normalization("float", "2,16,6,5"))
        (expected,) = run(exact.full, {name: values.astype(np.float32) for name, values in inputs.items()})
        assert_close(found.astype(np.float32), expected, 1e-2)


class TestNewerOperators:
    @pytest.mark.parametrize("dtype", TOLERANCES)
    @pytest.mark.parametrize("axis", [-1, 1])
    def test_rms_normalization(self, tmp_path, dtype, axis):
        inputs = f"{dtype}[B,3,8] x, {dtype}[{'8' if axis == -1 else '3,8'}] scale"
        text = f"({inputs}) => ({dtype}[B,3,8] y) {{ y = RMSNormalization <axis = {axis}> (x, scale) }}"
        graph = Graph(tmp_path, text)
        graph.lower()
        graph.assert_same(TOLERANCES[dtype], B=2)

    @pytest.mark.parametrize("dtype", TOLERANCES)
    def test_rotary_embedding(self, tmp_path, dtype):
        inputs = f"{dtype}[2,4,S,16] x, {dtype}[2,S,8] cos, {dtype}[2,S,8] sin"
        graph = Graph(tmp_path, f"({inputs}) => ({dtype}[2,4,S,16] y) {{ y = RotaryEmbedding (x, cos, sin) }}")
        graph.lower()
        graph.assert_same(TOLERANCES[dtype], S=5)


def quantized(folder: Path, weight: TensorProto, attributes: str, scale_shape: tuple[int, ...]) -> Graph:
    """x of [B, 64] times a quantized weight of [64, 8]."""
    scales = np.random.default_rng(1).random(scale_shape).astype(np.float16)
    text = f"""(float16[B,64] x) => (float16[B,8] y) {{
        w = DequantizeLinear <{attributes}> (weight, scale)
        y = MatMul (x, w)
    }}"""
    return Graph(folder, text, weight, onnx.numpy_helper.from_array(scales, "scale"))


class TestQuantizedWeights:
    def test_int4_with_a_scale_for_each_block_stays_and_needs_opset_21(self, tmp_path):
        values = np.random.default_rng(0).integers(-7, 8, 64 * 8)
        weight = onnx.helper.make_tensor("weight", TensorProto.INT4, [64, 8], values)
        graph = quantized(tmp_path, weight, "axis = 0, block_size = 32, output_dtype = 0", (2, 8))
        lowered = graph.lower()
        assert operators(lowered) == ["DequantizeLinear", "MatMul"]
        assert {a.name: a.i for a in lowered.node[0].attribute} == {"axis": 0, "block_size": 32}
        assert list(lowered.initializer) == list(graph_of(graph.full).graph.initializer)
        assert graph.opset == 21
        assert graph_of(graph.lowered).ir_version == 10
        graph.assert_same(TOLERANCES["float16"], B=3)

    def test_int8_with_a_scale_for_each_column_is_in_opset_20(self, tmp_path):
        values = np.random.default_rng(0).integers(-127, 128, (64, 8), np.int8)
        weight = onnx.numpy_helper.from_array(values, "weight")
        graph = quantized(tmp_path, weight, "axis = 1, block_size = 0, output_dtype = 0", (8,))
        assert {a.name: a.i for a in graph.lower().node[0].attribute} == {"axis": 1}
        assert graph.opset == 20
        graph.assert_same(TOLERANCES["float16"], B=3)

    def test_bfloat16_convolutions_need_opset_22(self, tmp_path):
        text = "(bfloat16[1,4,8,8] x, bfloat16[4,4,3,3] w) => (bfloat16[1,4,6,6] y) { y = Conv (x, w) }"
        graph = Graph(tmp_path, text)
        graph.lower()
        assert graph.opset == 22


REFUSED = [
    ("Det", "(float[3,3] x) => (float y) { y = Det (x) }"),
    ("com.microsoft::FusedMatMul", "(float[3,3] x) => (float[3,3] y) { y = com.microsoft.FusedMatMul (x, x) }"),
    ("Squeeze", "(float[1,3] x, int64[1] axes) => (float[3] y) { y = Squeeze (x, axes) }"),
    (
        "LayerNormalization",
        "(float[2,3] x, float[3] s) => (float[2,3] y, float[2,1] m) { y, m = LayerNormalization (x, s) }",
    ),
    ("DequantizeLinear", "(int8[3] x, float s) => (float16[3] y) { y = DequantizeLinear <output_dtype = 10> (x, s) }"),
    (
        "RotaryEmbedding",
        "(float[1,2,3,4] x, float[1,3,2] c) => (float[A,B,C,D] y) { y = RotaryEmbedding <interleaved = 1> (x, c, c) }",
    ),
    (
        "RotaryEmbedding",
        "(float[1,2,3,4] x, float[9,2] c, int64[1,3] i) => (float[A,B,C,D] y) { y = RotaryEmbedding (x, c, c, i) }",
    ),
    ("Attention", "(float[1,2,3,4] q) => (float[A,B,C,D] y) { y = Attention <softcap = 3.0> (q, q, q) }"),
    ("Attention", "(float[1,2,3,4] q) => (float[A,B,C,D] y) { y = Attention <softmax_precision = 1> (q, q, q) }"),
    (
        "Attention",
        "(float[1,1,1,4] q) => (float[A,B,C,D] y, float[A,B,E,D] k) { y, k = Attention (q, q, q, , q, q) }",
    ),
    ("Attention", "(float[1,2,S,4] q) => (float[A,B,C,D] y) { y = Attention <is_causal = 1> (q, q, q) }"),
    ("Attention", "(float[1,2,3,D] q) => (float[A,B,C,D] y) { y = Attention (q, q, q) }"),
]


@pytest.mark.parametrize(("operator", "text"), REFUSED)
def test_unsupported_operators_are_refused_by_name(tmp_path, operator, text):
    graph = Graph(tmp_path, text)
    with pytest.raises(LoweringError) as error:
        graph.lower()
    assert str(error.value).startswith(f"{operator} (node y) cannot be lowered: ")
    assert not graph.lowered.exists()
