"""Graphs exported from placeholders, whose weights are read, rounded and written one after another.

A language model of 7 billion weights is never held: a graph needs its shapes only, and a weight is in memory while it
passes from its shard to the graph's file.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir
from numpy.typing import NDArray
from onnx_ir.tensor_adapters import TorchTensor, from_torch_dtype
from torch import Tensor, nn

from export.quantize import BLOCK, Quantized, packed_int4, quantize
from moma_rt.specs import Precision

# Of DequantizeLinear: the axis of the scales, for matrices [K, N].
_PER_COLUMN, _PER_BLOCK = 1, 0


class Projection(nn.Module):
    """A linear layer without bias whose weight is kept as the graph multiplies by it, [inputs, outputs]."""

    def __init__(self, weight_kn: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_kn, requires_grad=False)

    def forward(self, states: Tensor) -> Tensor:
        return states @ self.weight


@dataclass(frozen=True)
class WeightSource:
    """Where the weights of a module on the meta device are.

    `read` gives the stored tensor of a parameter, of which those of `Projection` are stored [outputs, inputs];
    `quantized` are the names of the projections that a weight-only precision rounds.
    """

    read: Callable[[str], Tensor]
    quantized: frozenset[str]


def use_projections(module: nn.Module) -> None:
    """Replace every `Linear` without bias inside a module, so that no transposed weight is in its graph."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear) and child.bias is None:
            setattr(module, name, Projection(child.weight.t()))
        else:
            use_projections(child)


def fill(model: onnx_ir.Model, module: nn.Module, source: WeightSource) -> None:
    """Give every placeholder of a graph the tensor that is read when the graph is written."""
    transposed = {f"{name}.weight" for name, child in module.named_modules() if isinstance(child, Projection)}
    for name, parameter in module.named_parameters():
        value = model.graph.initializers.get(name)
        if value is not None:
            value.const_value = _read_later(name, parameter, source, name in transposed)


def quantize_weights(model: onnx_ir.Model, source: WeightSource, precision: Precision) -> None:
    """Put `DequantizeLinear` of integers in the place of each quantized weight."""
    for name in sorted(source.quantized & model.graph.initializers.keys()):
        weight = model.graph.initializers[name]
        assert weight.shape is not None
        inputs, outputs = (int(size) for size in weight.shape)
        pair = _Pair(name, source, precision)
        is_int4 = precision is Precision.INT4
        dtype = onnx_ir.DataType.INT4 if is_int4 else onnx_ir.DataType.INT8
        scale_shape = (inputs // BLOCK, outputs) if is_int4 else (outputs,)
        values = _initializer(f"{name}.values", dtype, (inputs, outputs), pair.values)
        scales = _initializer(f"{name}.scales", onnx_ir.DataType.FLOAT16, scale_shape, pair.scales)
        attributes = {"axis": _PER_BLOCK, "block_size": BLOCK} if is_int4 else {"axis": _PER_COLUMN}
        node = onnx_ir.node("DequantizeLinear", [values, scales], attributes, name=f"{name}.dequantized")
        node.outputs[0].name = f"{name}.dequantized"
        node.outputs[0].shape, node.outputs[0].dtype = weight.shape, onnx_ir.DataType.FLOAT16
        for initializer in (values, scales):
            model.graph.register_initializer(initializer)
        model.graph.insert_before(model.graph[0], node)
        onnx_ir.convenience.replace_all_uses_with(weight, node.outputs[0])
        del model.graph.initializers[name]


class _Pair:
    """A matrix's integers and scales, of which the integers are written first: the scales are kept from then on."""

    def __init__(self, name: str, source: WeightSource, precision: Precision) -> None:
        self._name, self._source, self._precision = name, source, precision
        self._scales: NDArray[np.float16] | None = None

    def values(self) -> onnx_ir.TensorProtocol:
        quantized = self._quantize()
        self._scales = quantized.scales
        values = quantized.values_kn
        if self._precision is Precision.INT4:
            return onnx_ir.PackedTensor(packed_int4(values), onnx_ir.DataType.INT4, shape=values.shape)
        return onnx_ir.Tensor(values)

    def scales(self) -> onnx_ir.TensorProtocol:
        kept, self._scales = self._scales, None
        return onnx_ir.Tensor(kept if kept is not None else self._quantize().scales)

    def _quantize(self) -> Quantized:
        return quantize(self._source.read(self._name), self._precision, self._name)


def _initializer(
    name: str, dtype: onnx_ir.DataType, shape: tuple[int, ...], make: Callable[[], onnx_ir.TensorProtocol]
) -> onnx_ir.Value:
    tensor = onnx_ir.LazyTensor(make, dtype, onnx_ir.Shape(shape), name=name)
    value = onnx_ir.Value(name=name, shape=onnx_ir.Shape(shape), type=onnx_ir.TensorType(dtype))
    value.const_value = tensor
    return value


def _read_later(name: str, parameter: Tensor, source: WeightSource, transposed: bool) -> onnx_ir.TensorProtocol:
    shape, dtype = tuple(parameter.shape), parameter.dtype

    def read() -> onnx_ir.TensorProtocol:
        tensor = source.read(name).to(dtype)
        return TorchTensor((tensor.t() if transposed else tensor).contiguous(), name)

    return onnx_ir.LazyTensor(read, from_torch_dtype(dtype), onnx_ir.Shape(shape), name=name)
