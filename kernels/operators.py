"""The list of all custom operators."""

from kernels.context_cross_attention import onnx_function as context_cross_attention
from kernels.injected_self_attention import onnx_function as injected_self_attention
from kernels.registration import OnnxOperator


def onnx_operators() -> tuple[OnnxOperator, ...]:
    """Return the ONNX definition of every operator."""
    return injected_self_attention.onnx_operator(), context_cross_attention.onnx_operator()
