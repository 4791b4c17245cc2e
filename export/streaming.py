"""Trace graphs without weights: linear layers in the graph's own layout, and weights read one at a time.

A language model of 7 billion weights is never in memory as a whole: tracing needs only shapes, and a weight is in
memory only while it is copied from its shard to the weights file.
"""

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir
import torch
from torch import Tensor, nn

from export.quantize import BLOCK
from moma_rt.bundle.specs import Precision

# The axis of DequantizeLinear's scales, for matrices [K, N].
_PER_COLUMN, _PER_BLOCK = 1, 0


class Projection(nn.Module):
    """A linear layer whose weight is stored as a graph multiplies by it, [inputs, outputs]."""

    def __init__(self, weight_kn: Tensor, bias_n: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_kn, requires_grad=False)
        self.bias = None if bias_n is None else nn.Parameter(bias_n, requires_grad=False)

    def forward(self, states: Tensor) -> Tensor:
        if not torch.onnx.is_in_onnx_export():
            # `@` on three-dimensional states may be traced as a product per sample; `linear` never is.
            return nn.functional.linear(states, self.weight.t(), self.bias)
        product = states @ self.weight
        return product if self.bias is None else product + self.bias


@dataclass(frozen=True)
class WeightSource:
    """The source of the weights of a module on the meta device.

    `read` returns the stored tensor of a parameter; those of `Projection` are stored as [outputs, inputs].
    `quantized` names the projection weights that a weight-only precision rounds.
    """

    read: Callable[[str], Tensor]
    quantized: frozenset[str]


def use_projections(module: nn.Module) -> None:
    """Replace every `Linear` inside a module by a `Projection`, so that its graph transposes no weight."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, Projection(child.weight.t().contiguous(), child.bias))
        else:
            use_projections(child)


def quantize_weights(model: onnx_ir.Model, source: WeightSource, precision: Precision) -> None:
    """Replace each quantized weight by `DequantizeLinear` of `<name>.values` and `<name>.scales`."""
    for name in sorted(source.quantized & model.graph.initializers.keys()):
        weight = model.graph.initializers[name]
        assert weight.shape is not None
        inputs, outputs = (int(size) for size in weight.shape)
        is_int4 = precision is Precision.INT4
        dtype = onnx_ir.DataType.INT4 if is_int4 else onnx_ir.DataType.INT8
        scale_shape = (inputs // BLOCK, outputs) if is_int4 else (outputs,)
        values = _initializer(f"{name}.values", dtype, (inputs, outputs))
        scales = _initializer(f"{name}.scales", onnx_ir.DataType.FLOAT16, scale_shape)
        attributes = {"axis": _PER_BLOCK, "block_size": BLOCK} if is_int4 else {"axis": _PER_COLUMN}
        node = onnx_ir.node("DequantizeLinear", [values, scales], attributes, name=f"{name}.dequantized")
        node.outputs[0].name = f"{name}.dequantized"
        node.outputs[0].shape, node.outputs[0].dtype = weight.shape, onnx_ir.DataType.FLOAT16
        for initializer in (values, scales):
            # Their content is set when the graph is made to refer to its weights file.
            model.graph.initializers[initializer.name] = initializer
        model.graph.insert_before(model.graph[0], node)
        onnx_ir.convenience.replace_all_uses_with(weight, node.outputs[0])
        del model.graph.initializers[name]


def _initializer(name: str, dtype: onnx_ir.DataType, shape: tuple[int, ...]) -> onnx_ir.Value:
    return onnx_ir.Value(name=name, shape=onnx_ir.Shape(shape), type=onnx_ir.TensorType(dtype))
