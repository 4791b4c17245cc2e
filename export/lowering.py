"""Rewrite a network's graph for TensorRT 10.3 (JetPack 6): no `Attention`, and nothing newer than opset 20.

The supported forms are those that the release's parser documents (docs/operators.md of onnx-tensorrt at
release/10.3-GA: "opset 9 to opset 20"). Two of them are newer in ONNX itself: INT4 weights of `DequantizeLinear` with
a scale per block (opset 21), and bfloat16 for `Conv`, `Sin`, `Cos` and others (opset 22). Graphs that use these import
that opset: operators in `DOCUMENTED` mean the same in all three, and the parser reads the opset only to tell an
operator's older forms apart.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import onnx
import onnx.inliner
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto

# The documented operators, without those with subgraphs (If, Loop, Scan), which are not checked here, those that ONNX
# no longer has, and GroupNormalization, whose scale is per group there and per channel in opset 21.
DOCUMENTED = frozenset(
    """
    Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization Cast CastLike Ceil Celu
    Clip Concat Constant ConstantOfShape Conv ConvTranspose Cos Cosh CumSum DeformConv DepthToSpace DequantizeLinear
    Div Dropout Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor GRU Gather GatherElements GatherND Gelu Gemm
    GlobalAveragePool GlobalLpPool GlobalMaxPool Greater GreaterOrEqual GridSample HardSigmoid HardSwish Hardmax
    Identity InstanceNormalization IsInf IsNaN LRN LSTM LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax
    LpNormalization LpPool MatMul Max MaxPool Mean MeanVarianceNormalization Min Mish Mod Mul Neg NonMaxSuppression
    NonZero Not OneHot Or PRelu Pad Pow QuantizeLinear RNN RandomNormal RandomNormalLike RandomUniform
    RandomUniformLike Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin
    ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize ReverseSequence RoiAlign Round ScatterElements ScatterND
    Selu Shape Shrink Sigmoid Sign Sin Sinh Size Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub
    Sum Tan Tanh ThresholdedRelu Tile TopK Transpose Trilu Unsqueeze Where Xor
    """.split()
)
OPSETS = (20, 21, 22)
# Operators whose second input, the axes, must be an initializer.
_FIXED_AXES = frozenset(name for name in DOCUMENTED if name.startswith("Reduce")) | {"Squeeze", "Unsqueeze"}
_LOWEST = MappingProxyType(
    {
        TensorProto.FLOAT: -3.4028234663852886e38,
        TensorProto.FLOAT16: -65504.0,
        TensorProto.BFLOAT16: -3.3895313892515355e38,
    }
)


class LoweringError(AssertionError):
    """The exported graph uses a form that TensorRT 10.3 does not document: a defect of this project."""


def write_lowered(full: Path, lowered: Path) -> None:
    """Write the graph `full` to `lowered`, in the same folder, in forms that TensorRT 10.3 documents.

    Inputs, outputs and results are the same. Weights outside the graph are not read; both files refer to them. The
    write is not atomic, so write to a temporary folder if the process may be killed.

    Raises:
        LoweringError: an operator, named in the message, has no documented form or no known rewrite.
    """
    model = onnx.inliner.inline_local_functions(onnx.load(full, load_external_data=False))
    opset = next(entry.version for entry in model.opset_import if not entry.domain)
    graph = _Graph(onnx.shape_inference.infer_shapes(model).graph)
    for node in model.graph.node:
        rule = _keep if node.domain else _RULES.get(node.op_type, _keep)
        rule(_Rewrite(graph, node, opset))
    opset = graph.first_opset()
    for field in ("node", "initializer", "value_info"):
        model.graph.ClearField(field)
    model.graph.node.extend(graph.nodes)
    model.graph.initializer.extend(graph.initializers.values())
    model.ClearField("opset_import")
    model.opset_import.append(onnx.helper.make_opsetid("", opset))
    model.ir_version = onnx.helper.find_min_ir_version_for(model.opset_import)
    lowered.write_bytes(model.SerializeToString(deterministic=True))


class _Graph:
    """The graph being written, the dtypes of all its values, and the shapes of those in `source` (None: dynamic)."""

    def __init__(self, source: GraphProto) -> None:
        self.nodes: list[NodeProto] = []
        self.initializers = {tensor.name: tensor for tensor in source.initializer}
        self.dtypes = {tensor.name: tensor.data_type for tensor in source.initializer}
        self.shapes: dict[str, tuple[int | None, ...]] = {t.name: tuple(t.dims) for t in source.initializer}
        for value in (*source.input, *source.value_info, *source.output):
            tensor = value.type.tensor_type
            self.dtypes[value.name] = tensor.elem_type
            self.shapes[value.name] = tuple(d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim)
        self._constants: dict[tuple[Any, ...], str] = {}
        self._biases: dict[tuple[str, int], str] = {}

    def declare(self, name: str, dtype: int) -> str:
        """Register the dtype of a new value, and return its name."""
        assert name not in self.dtypes, f"a value is called {name} already"
        self.dtypes[name] = dtype
        return name

    def constant(self, dtype: int, shape: Sequence[int], values: Sequence[float]) -> str:
        """Return the name of a constant; equal constants share one."""
        key = (dtype, tuple(shape), tuple(values))
        if key not in self._constants:
            name = self._constants[key] = self.declare(f"lowered.constant_{len(self._constants)}", dtype)
            self.initializers[name] = onnx.helper.make_tensor(name, dtype, shape, values)
        return self._constants[key]

    def bias(self, mask: str, dtype: int) -> str:
        """Return the bias to add to scores for a boolean mask; layers with the same mask share it.

        Masked keys get the lowest finite number, not -inf, which may become NaN in kernels that read a row in parts.
        A query whose keys are all masked therefore averages all values.
        """
        if (mask, dtype) not in self._biases:
            zero, lowest = (self.constant(dtype, (), [value]) for value in (0.0, _LOWEST[dtype]))
            name = self._biases[mask, dtype] = self.declare(f"{mask}.bias_{dtype}", dtype)
            self.nodes.append(onnx.helper.make_node("Where", [mask, zero, lowest], [name], name))
        return self._biases[mask, dtype]

    def first_opset(self) -> int:
        """Return the first opset in which every node is valid.

        Raises:
            LoweringError: a node is valid in none, or TensorRT 10.3 does not document its form.
        """
        forms = {}
        for node in self.nodes:
            _check_documented(node, self.initializers.keys())
            inputs, outputs = (tuple(self.dtypes.get(x) for x in names) for names in (node.input, node.output))
            # Thousands of nodes have only tens of distinct forms.
            forms[node.op_type, tuple(a.name for a in node.attribute), inputs, outputs] = node
        return max((_first_opset(node, form[2], form[3]) for form, node in forms.items()), default=OPSETS[0])


def _check_documented(node: NodeProto, initializers: Any) -> None:
    if node.domain or node.op_type not in DOCUMENTED:
        raise _error(node, "TensorRT 10.3 does not document it")
    if node.op_type in _FIXED_AXES and len(node.input) > 1 and node.input[1] not in initializers:
        raise _error(node, "TensorRT 10.3 documents it with constant axes only")
    if node.op_type == "LayerNormalization" and len(node.output) > 1:
        raise _error(node, "TensorRT 10.3 documents its first output only")


def _first_opset(node: NodeProto, inputs: tuple[int | None, ...], outputs: tuple[int | None, ...]) -> int:
    """Return the first opset whose operator takes the node's attributes and these dtypes (None: an omitted input)."""
    for version in OPSETS:
        schema = onnx.defs.get_schema(node.op_type, version, "")
        known = all(attribute.name in schema.attributes for attribute in node.attribute)
        if known and _fits(inputs, schema.inputs) and _fits(outputs, schema.outputs):
            return version
    raise _error(node, f"no opset up to {OPSETS[-1]} has it with these attributes and dtypes")


def _fits(dtypes: tuple[int | None, ...], parameters: Sequence[onnx.defs.OpSchema.FormalParameter]) -> bool:
    for index, dtype in enumerate(dtypes):
        parameter = parameters[min(index, len(parameters) - 1)]
        repeats = parameter.option == onnx.defs.OpSchema.FormalParameterOption.Variadic
        if index >= len(parameters) and not repeats:
            return False
        if dtype is not None and f"tensor({TensorProto.DataType.Name(dtype).lower()})" not in parameter.types:
            return False
    return True


def _error(node: NodeProto, why: str) -> LoweringError:
    operator = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
    return LoweringError(f"{operator} (node {node.name or node.output[0]}) cannot be lowered: {why}")


class _Rewrite:
    """Writes the replacement of one node of a graph in opset `opset`; new values are named after its first output."""

    def __init__(self, graph: _Graph, node: NodeProto, opset: int) -> None:
        self.graph, self.node, self.opset = graph, node, opset
        self.attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        self._count = 0

    def expect(self, condition: bool, otherwise: str) -> None:
        """Raise LoweringError unless `condition` holds."""
        if not condition:
            raise _error(self.node, otherwise)

    def dtype(self, name: str) -> int:
        return self.graph.dtypes[name]

    def shape(self, name: str) -> tuple[int | None, ...]:
        return self.graph.shapes[name]

    def ints(self, *values: int) -> str:
        """Return an int64 constant for a shape, indices or axes."""
        return self.graph.constant(TensorProto.INT64, [len(values)], values)

    def add(self, op_type: str, *inputs: str, dtype: int | None = None, **attributes: Any) -> str:
        """Write a node, and return its output; `dtype` defaults to the first input's."""
        return self._add(op_type, inputs, 1, dtype, **attributes)[0]

    def halves(self, name: str) -> list[str]:
        """Split the last axis into two halves."""
        return self._add("Split", (name,), 2, None, axis=-1, num_outputs=2)

    def _add(
        self, op_type: str, inputs: Sequence[str], outputs: int, dtype: int | None, **attributes: Any
    ) -> list[str]:
        names = []
        for _ in range(outputs):
            self._count += 1
            name = f"{self.node.output[0]}.{op_type}_{self._count}"
            names.append(self.graph.declare(name, self.dtype(inputs[0]) if dtype is None else dtype))
        self.graph.nodes.append(onnx.helper.make_node(op_type, inputs, names, names[0], **attributes))
        return names

    def cast(self, name: str, dtype: int) -> str:
        """Cast to `dtype` if needed."""
        return name if self.dtype(name) == dtype else self.add("Cast", name, dtype=dtype, to=dtype)

    def finish(self, op_type: str, *inputs: str, **attributes: Any) -> None:
        """Write the last node, which has the original's name and output."""
        node = onnx.helper.make_node(op_type, inputs, self.node.output, self.node.name, **attributes)
        self.graph.nodes.append(node)


def _keep(r: _Rewrite) -> None:
    """Copy the node, without attributes that opset 20 does not know and that have their default value."""
    node = NodeProto()
    node.CopyFrom(r.node)
    r.graph.nodes.append(node)
    if node.domain or node.op_type not in DOCUMENTED:
        return
    new, old = (onnx.defs.get_schema(node.op_type, version, "") for version in (r.opset, OPSETS[0]))
    if new.since_version > OPSETS[0]:
        kept = [a for a in r.node.attribute if a.name in old.attributes or a != new.attributes[a.name].default_value]
        node.ClearField("attribute")
        node.attribute.extend(kept)


def _constant(r: _Rewrite) -> None:
    """Replace a constant by an initializer, which the parser's documentation requires for axes."""
    (attribute,) = r.node.attribute
    (name,) = r.node.output
    tensor = TensorProto()
    if attribute.type == AttributeProto.TENSOR:
        tensor.CopyFrom(attribute.t)
        tensor.name = name
    else:
        values = onnx.helper.get_attribute_value(attribute)
        shape = [len(values)] if isinstance(values, list) else []
        tensor = onnx.helper.make_tensor(name, r.dtype(name), shape, values if shape else [values])
    r.graph.initializers[name] = tensor


def _attention(r: _Rewrite) -> None:
    """Write `softmax(scale · q · kᵀ + bias) · v` per head, for q, k and v of [B, S, C] or [B, heads, S, D].

    q is scaled first: unscaled products of wide heads overflow fp16, as can their sum with a mask of its lowest number.
    """
    q, k, v = r.node.input[:3]
    mask = r.node.input[3] if len(r.node.input) > 3 else ""
    known = {"scale", "q_num_heads", "kv_num_heads", "is_causal", "softcap", "qk_matmul_output_mode"}
    r.expect(r.attributes.keys() <= known and not r.attributes.get("softcap"), "it has an unsupported attribute")
    r.expect(not any(r.node.input[4:]) and len(r.node.output) == 1, "past keys and values are not supported")
    dtype, width, flat = r.dtype(q), r.shape(q)[-1], "q_num_heads" in r.attributes
    q_length, k_length = (r.shape(name)[1 if flat else 2] for name in (q, k))
    if flat:
        q_heads, kv_heads = r.attributes["q_num_heads"], r.attributes["kv_num_heads"]
        width = width and width // q_heads
        q, k, v = (_by_head(r, name, heads) for name, heads in ((q, q_heads), (k, kv_heads), (v, kv_heads)))
    else:
        q_heads, kv_heads = r.shape(q)[1], r.shape(k)[1]
    if None not in (q_heads, kv_heads) and q_heads != kv_heads:
        served_by = r.ints(*(head * kv_heads // q_heads for head in range(q_heads)))
        k, v = (r.add("Gather", name, served_by, axis=1) for name in (k, v))
    r.expect("scale" in r.attributes or width is not None, "it has no scale, and its head width is dynamic")
    scale = r.attributes["scale"] if "scale" in r.attributes else 1 / math.sqrt(width)
    scaled = r.add("Mul", q, r.graph.constant(dtype, [], [scale]))
    scores = r.add("MatMul", scaled, r.add("Transpose", k, perm=[0, 1, 3, 2]))
    if mask:
        is_bool = r.dtype(mask) == TensorProto.BOOL
        scores = r.add("Add", scores, r.graph.bias(mask, dtype) if is_bool else r.cast(mask, dtype))
    if r.attributes.get("is_causal"):
        r.expect(None not in (q_length, k_length), "it is causal, and its lengths are dynamic")
        causal = [0.0 if key <= query else _LOWEST[dtype] for query in range(q_length) for key in range(k_length)]
        scores = r.add("Add", scores, r.graph.constant(dtype, [q_length, k_length], causal))
    probabilities = r.add("Softmax", scores, axis=-1)
    if flat:
        attended = r.add("Transpose", r.add("MatMul", probabilities, v), perm=[0, 2, 1, 3])
        r.finish("Reshape", attended, r.ints(0, 0, -1))
    else:
        r.finish("MatMul", probabilities, v)


def _by_head(r: _Rewrite, name: str, heads: int) -> str:
    """Reshape [B, S, C] to [B, heads, S, D]."""
    return r.add("Transpose", r.add("Reshape", name, r.ints(0, 0, heads, -1)), perm=[0, 2, 1, 3])


def _group_normalization(r: _Rewrite) -> None:
    """Write InstanceNormalization with groups as channels, in the precision of `stash_type`; then scale and bias.

    The parser refuses bfloat16 for InstanceNormalization, although its documentation names it.
    """
    x, scale, bias = r.node.input
    groups, stash = r.attributes["num_groups"], r.attributes.get("stash_type", TensorProto.FLOAT)
    sizes, epsilon = r.shape(x), r.attributes.get("epsilon", 1e-5)
    grouped = r.cast(r.add("Reshape", x, r.ints(0, groups, -1)), stash)
    one, zero = (r.graph.constant(stash, [groups], [value] * groups) for value in (1.0, 0.0))
    normalized = r.cast(r.add("InstanceNormalization", grouped, one, zero, epsilon=epsilon), r.dtype(x))
    shape = r.add("Shape", x, dtype=TensorProto.INT64) if None in sizes[1:] else r.ints(0, *sizes[1:])
    channels = r.ints(-1, *[1] * (len(sizes) - 2))
    scaled = r.add("Mul", r.add("Reshape", normalized, shape), r.add("Reshape", scale, channels))
    r.finish("Add", scaled, r.add("Reshape", bias, channels))


def _rms_normalization(r: _Rewrite) -> None:
    """Write `x / √(mean(x²) + ε)` in the precision of `stash_type`; then the scale."""
    x, scale = r.node.input
    stash, rank = r.attributes.get("stash_type", TensorProto.FLOAT), len(r.shape(x))
    axes = r.ints(*range(r.attributes.get("axis", -1) % rank, rank))
    precise = r.cast(x, stash)
    mean = r.add("ReduceMean", r.add("Mul", precise, precise), axes, keepdims=1)
    epsilon = r.graph.constant(stash, [], [r.attributes.get("epsilon", 1e-5)])
    normalized = r.add("Div", precise, r.add("Sqrt", r.add("Add", mean, epsilon)))
    r.finish("Mul", r.cast(normalized, r.dtype(scale)), scale)


def _rotary_embedding(r: _Rewrite) -> None:
    """Rotate x [B, heads, S, D], whose halves are real and imaginary parts, by the angles of cos, sin [B, S, D/2]."""
    r.expect(
        len(r.node.input) == 3 and len(r.shape(r.node.input[0])) == 4, "only [B, heads, S, D] inputs are supported"
    )
    whole = not r.attributes.get("interleaved") and not r.attributes.get("rotary_embedding_dim")
    r.expect(whole, "only rotation of both halves is supported")
    x, cos, sin = r.node.input
    cos, sin = (r.add("Unsqueeze", name, r.ints(1)) for name in (cos, sin))
    real, imaginary = r.halves(x)
    rotated_real = r.add("Sub", r.add("Mul", real, cos), r.add("Mul", imaginary, sin))
    rotated_imaginary = r.add("Add", r.add("Mul", real, sin), r.add("Mul", imaginary, cos))
    r.finish("Concat", rotated_real, rotated_imaginary, axis=-1)


_RULES: MappingProxyType[str, Callable[[_Rewrite], None]] = MappingProxyType(
    {
        "Attention": _attention,
        "Constant": _constant,
        "GroupNormalization": _group_normalization,
        "RMSNormalization": _rms_normalization,
        "RotaryEmbedding": _rotary_embedding,
    }
)
