"""A network's graph in the operators of TensorRT 10.3, which JetPack 6 has: no `Attention`, nothing newer than opset 20.

What is supported is what the parser of that release documents (docs/operators.md of onnx-tensorrt, release/10.3-GA:
"opset 9 to opset 20"). The page names two things that ONNX itself defines only later: INT4 for `DequantizeLinear`
(since 10.0, by blocks or not; ONNX has the type and `block_size` from opset 21) and bfloat16 for `Conv`, `Sin` and
`Cos` (from opset 22). Graphs that use these import that opset; their operators mean the same as in opset 20. The
parser does not refuse a graph for its opset.
"""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import onnx
import onnx.inliner
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto

# The page's operators, but for those with graphs inside (If, Loop, Scan), into which nothing here looks, and
# GroupNormalization: the page's has a scale for each group, where opset 21 has one for each channel.
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
# The first is the page's; the others are for what it names and opset 20 does not.
OPSETS = (20, 21, 22)
# Operators whose second input, the axes, must be known when the graph is parsed.
_FIXED_AXES = frozenset(name for name in DOCUMENTED if name.startswith("Reduce")) | {"Squeeze", "Unsqueeze"}
_LOWEST = MappingProxyType(
    {TensorProto.FLOAT: -3.4028234663852886e38, TensorProto.FLOAT16: -65504.0, TensorProto.BFLOAT16: -3.38953139e38}
)


class LoweringError(AssertionError):
    """The exporter wrote something that is not known to be understood by TensorRT 10.3: a defect of this project."""


def write_lowered(full: Path, lowered: Path) -> None:
    """Write the graph `full` to `lowered`, in the same folder, in operators that TensorRT 10.3 documents.

    Inputs, outputs and results are the same; weights outside the graph are not read and stay where they are. The file
    is written plainly: a caller that may be killed renames the folder when it is complete.

    Raises:
        LoweringError: names the operator that has no form among those of `DOCUMENTED`.
    """
    model = onnx.inliner.inline_local_functions(onnx.load(full, load_external_data=False))
    version = next(opset.version for opset in model.opset_import if not opset.domain)
    graph = _Graph(onnx.shape_inference.infer_shapes(model, data_prop=True).graph)
    for node in model.graph.node:
        rule = _RULES.get(node.op_type, _Rewrite.keep) if not node.domain else _Rewrite.keep
        rule(_Rewrite(graph, node, version))
    opset = graph.check()
    for field in ("node", "initializer", "value_info"):
        model.graph.ClearField(field)
    model.graph.node.extend(graph.nodes)
    model.graph.initializer.extend(graph.initializers.values())
    model.ClearField("opset_import")
    model.opset_import.append(onnx.helper.make_opsetid("", opset))
    model.ir_version = onnx.helper.find_min_ir_version_for(model.opset_import)
    lowered.write_bytes(model.SerializeToString(deterministic=True))


class _Graph:
    """The graph being written, and what is known of its values: dtypes of all, shapes of those that `source` had.

    A dimension that is not fixed is None.
    """

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

    def constant(self, dtype: int, shape: tuple[int, ...], values: Iterable[float]) -> str:
        """The name of a constant; equal ones are one."""
        key = (dtype, shape, tuple(values))
        if key not in self._constants:
            name = self._constants[key] = self._name(f"lowered.{len(self._constants)}")
            self.initializers[name] = onnx.helper.make_tensor(name, dtype, shape, key[2])
            self.dtypes[name] = dtype
        return self._constants[key]

    def bias(self, mask: str, dtype: int) -> str:
        """What is added to scores where a boolean mask is given: one for all layers that share it.

        The lowest number instead of -inf, which turns to NaN in kernels that work on parts of a row; so a row without
        any token averages all, where `Attention` gives zeros.
        """
        if (mask, dtype) not in self._biases:
            zero, lowest = (self.constant(dtype, (), [value]) for value in (0.0, _LOWEST[dtype]))
            name = self._name(f"{mask}.bias_{dtype}")
            self.append(onnx.helper.make_node("Where", [mask, zero, lowest], [name], name), dtype)
            self._biases[mask, dtype] = name
        return self._biases[mask, dtype]

    def append(self, node: NodeProto, dtype: int) -> None:
        """A node of one output."""
        self.dtypes[node.output[0]] = dtype
        self.nodes.append(node)

    def _name(self, wanted: str) -> str:
        assert wanted not in self.dtypes, f"a value is called {wanted} already"
        return wanted

    def check(self) -> int:
        """The first opset in which every node is valid.

        Raises:
            LoweringError: one is valid in none, or in a form that TensorRT 10.3 does not document.
        """
        forms = {}
        for node in self.nodes:
            if node.domain or node.op_type not in DOCUMENTED:
                raise _undocumented(node, "is not among its operators")
            if node.op_type in _FIXED_AXES and len(node.input) > 1 and node.input[1] not in self.initializers:
                raise _undocumented(node, "needs constant axes")
            if node.op_type == "LayerNormalization" and len(node.output) > 1:
                raise _undocumented(node, "has one output")
            dtypes = [tuple(self.dtypes.get(name) for name in names) for names in (node.input, node.output)]
            forms[node.op_type, tuple(a.name for a in node.attribute), *dtypes] = node
        # Thousands of nodes have some tens of forms, and a schema takes milliseconds to read.
        return max((_opset(node, *form[2:]) for form, node in forms.items()), default=OPSETS[0])


def _undocumented(node: NodeProto, why: str) -> LoweringError:
    name = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
    return LoweringError(f"{name} (node {node.name or node.output[0]!r}) {why}, as TensorRT 10.3 documents it")


def _opset(node: NodeProto, inputs: tuple[int | None, ...], outputs: tuple[int | None, ...]) -> int:
    """The first opset in which the operator has these attributes, inputs and dtypes (None: left out)."""
    for version in OPSETS:
        schema = onnx.defs.get_schema(node.op_type, version, "")
        known = all(attribute.name in schema.attributes for attribute in node.attribute)
        if known and _fits(inputs, schema.inputs) and _fits(outputs, schema.outputs):
            return version
    raise _undocumented(node, f"has no such form up to opset {OPSETS[-1]}")


def _fits(dtypes: tuple[int | None, ...], parameters: Any) -> bool:
    # The last parameter may be one that repeats, and takes all that follow.
    kinds = [p.types for p in parameters]
    repeats = bool(parameters) and parameters[-1].option == onnx.defs.OpSchema.FormalParameterOption.Variadic
    if len(dtypes) > len(kinds) and not repeats:
        return False
    return all(
        dtype is None or f"tensor({TensorProto.DataType.Name(dtype).lower()})" in kinds[min(i, len(kinds) - 1)]
        for i, dtype in enumerate(dtypes)
    )


class _Rewrite:
    """One node, and the writing of what stands for it; new values and nodes are named after its output."""

    def __init__(self, graph: _Graph, node: NodeProto, opset: int) -> None:
        self.graph, self.node, self._opset = graph, node, opset
        self.attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        self._count = 0

    def dtype(self, name: str) -> int:
        return self.graph.dtypes[name]

    def shape(self, name: str) -> tuple[int | None, ...]:
        return self.graph.shapes[name]

    def ints(self, *values: int) -> str:
        """A constant shape, or constant axes."""
        return self.graph.constant(TensorProto.INT64, (len(values),), values)

    def add(self, op_type: str, *inputs: str, dtype: int | None = None, **attributes: Any) -> str:
        """Write a node of one output, by default of the first input's dtype; returns the output."""
        self._count += 1
        output = f"{self.node.output[0]}.{op_type}_{self._count}"
        assert output not in self.graph.dtypes
        node = onnx.helper.make_node(op_type, inputs, [output], output, **attributes)
        self.graph.append(node, self.dtype(inputs[0]) if dtype is None else dtype)
        return output

    def finish(self, op_type: str, *inputs: str, **attributes: Any) -> None:
        """Write the node that has the original's output and name."""
        node = onnx.helper.make_node(op_type, inputs, self.node.output, self.node.name, **attributes)
        self.graph.append(node, self.dtype(self.node.output[0]))

    def cast(self, name: str, dtype: int) -> str:
        return name if self.dtype(name) == dtype else self.add("Cast", name, dtype=dtype, to=dtype)

    def halves(self, name: str) -> tuple[str, str]:
        """The two halves of the last axis."""
        first, second = (f"{self.node.output[0]}.half_{i}_of_{name}" for i in (0, 1))
        node = onnx.helper.make_node("Split", [name], [first, second], first, axis=-1, num_outputs=2)
        self.graph.append(node, self.dtype(name))
        self.graph.dtypes[second] = self.dtype(name)
        return first, second

    def expect(self, condition: bool, what: str) -> None:
        if not condition:
            raise LoweringError(f"{self.node.op_type} (node {self.node.name!r}) cannot be lowered: {what}")

    def keep(self) -> None:
        """Write the node as it is, without attributes that are newer than opset 20 and have their default."""
        node = NodeProto()
        node.CopyFrom(self.node)
        if node.op_type in DOCUMENTED and not node.domain:
            schema = onnx.defs.get_schema(node.op_type, self._opset, "")
            if schema.since_version > OPSETS[0]:
                old = onnx.defs.get_schema(node.op_type, OPSETS[0], "").attributes
                new = schema.attributes
                kept = [a for a in node.attribute if a.name in old or a != new[a.name].default_value]
                del node.attribute[:]
                node.attribute.extend(kept)
        self.graph.nodes.append(node)


def _constant(r: _Rewrite) -> None:
    """To an initializer, which is what the parser's documentation asks of axes."""
    (attribute,) = r.node.attribute
    name = r.node.output[0]
    tensor = TensorProto()
    if attribute.type == AttributeProto.TENSOR:
        tensor.CopyFrom(attribute.t)
        tensor.name = name
    else:
        dtype = {"value_int": TensorProto.INT64, "value_ints": TensorProto.INT64}.get(attribute.name, TensorProto.FLOAT)
        values = onnx.helper.get_attribute_value(attribute)
        dims, values = ([len(values)], values) if attribute.name.endswith("s") else ([], [values])
        tensor = onnx.helper.make_tensor(name, dtype, dims, values)
    r.graph.initializers[name] = tensor


def _attention(r: _Rewrite) -> None:
    """`softmax(scale · q · kᵀ + bias) · v` over heads, q, k and v given as [B, S, C] or [B, heads, S, D].

    q is scaled first: the products of wide heads overflow fp16, and may hold a mask of fp16's lowest number.
    """
    q, k, v, mask, *past = (*r.node.input, "")[: max(4, len(r.node.input))]
    known = {"scale", "q_num_heads", "kv_num_heads", "is_causal", "softcap", "qk_matmul_output_mode"}
    r.expect(r.attributes.keys() <= known and not r.attributes.get("softcap"), "it has an attribute without such a form")
    r.expect(not any(past) and len(r.node.output) == 1, "it has past or present keys and values")
    dtype, flat = r.dtype(q), "q_num_heads" in r.attributes
    if flat:
        heads = tuple(r.attributes[f"{name}_num_heads"] for name in ("q", "kv"))
        lengths = tuple(r.shape(name)[1] for name in (q, k))
        widths = tuple(c and c // h for c, h in zip((r.shape(q)[2], r.shape(k)[2]), heads, strict=True))
    else:
        heads, lengths, widths = (tuple(r.shape(name)[axis] for name in (q, k)) for axis in (1, 2, 3))
    scale = r.attributes.get("scale")
