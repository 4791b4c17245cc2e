"""Quantize weights to 8 or 4 bits, one matrix at a time; arithmetic stays 16-bit.

A language model that reads one prompt is bound by reading its weights, so fewer bits save time as well as memory.
Rounding needs only the matrix itself; tools that calibrate hold the whole model, which at 7 billion weights may not
fit the memory of the machine that exports.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moma_rt.bundle.specs import Precision
from moma_rt.errors import CheckpointError

# Inputs that share a scale in INT4. TensorRT takes 64 and 128; with 64, an outlier coarsens half as many weights.
BLOCK = 64
# Values to try for the largest code, as fractions of a block's largest weight: clipping it rounds all others finer.
_CLIPPING = (1.0, 0.95, 0.9, 0.85, 0.8)
# Weights quantized at once: with their intermediate results they fit a core's cache.
_CHUNK_WEIGHTS = 1 << 18


@dataclass(frozen=True, eq=False)
class Quantized:
    """A weight matrix of K inputs and N outputs, as the product of integers and scales.

    `values_kn`: int8 [K, N], from -128 to 127 in INT8 and from -8 to 7 in INT4; `scales`: float16, [N] in INT8 and
    [K / BLOCK, N] in INT4.
    """

    precision: Precision
    values_kn: NDArray[np.int8]
    scales: NDArray[np.float16]


def quantize(weight_nk: Tensor, precision: Precision, name: str) -> Quantized:
    """Quantize a linear layer's weight, symmetrically: per output in INT8, per `BLOCK` inputs of an output in INT4.

    Args:
        weight_nk: [outputs N, inputs K], of any floating-point dtype.
        name: for messages.

    Raises:
        CheckpointError: NaN or infinity, a number of inputs that is no multiple of `BLOCK` (INT4), or weights too
            large for float16 scales.
    """
    if precision is Precision.INT4 and weight_nk.shape[1] % BLOCK:
        raise CheckpointError(f"{name} has {weight_nk.shape[1]} inputs; int4 takes a multiple of {BLOCK}")
    rows = max(1, _CHUNK_WEIGHTS // weight_nk.shape[1])
    quantize_rows = _int8_rows if precision is Precision.INT8 else _int4_rows
    values, scales = zip(*(quantize_rows(chunk.float()) for chunk in weight_nk.split(rows)), strict=True)
    scales_n = torch.cat(scales)
    if not bool(scales_n.isfinite().all()):
        raise CheckpointError(f"{name} contains NaN, infinity or weights too large for {precision.value}")
    return Quantized(
        precision,
        np.ascontiguousarray(torch.cat(values).numpy().T),
        np.ascontiguousarray(scales_n.numpy().T),
    )


def dequantize(quantized: Quantized) -> Tensor:
    """The matrix that the integers stand for, float16 [K, N], as ONNX's DequantizeLinear computes it."""
    values, scales = torch.from_numpy(quantized.values_kn).half(), torch.from_numpy(quantized.scales)
    if quantized.precision is Precision.INT4:
        scales = scales.repeat_interleave(BLOCK, dim=0)
    return values * scales


def packed_int4(values: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Pack pairs of 4-bit integers, in memory order, into bytes; the first of a pair is the low half."""
    pairs = values.reshape(-1, 2).view(np.uint8) & 0xF
    packed: NDArray[np.uint8] = pairs[:, 0] | pairs[:, 1] << 4
    return packed


def _int8_rows(weight_nk: Tensor) -> tuple[Tensor, Tensor]:
    scale_n1 = _half(weight_nk.abs().amax(1, keepdim=True) / 127)
    return _rounded(weight_nk, scale_n1, 127), scale_n1[:, 0].half()


def _int4_rows(weight_nk: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize rows block by block, each with the clipping of the least squared error."""
    blocks = weight_nk.unflatten(1, (-1, BLOCK))
    largest = blocks.abs().amax(2, keepdim=True)
    best_error = torch.full_like(largest, torch.inf)
    best_scale, best_values = _half(largest / 7), torch.zeros_like(blocks, dtype=torch.int8)
    for clipping in _CLIPPING:
        scale = _half(clipping * largest / 7)
        values = _rounded(blocks, scale, 7)
        error = (values * scale - blocks).square_().sum(2, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_values = torch.where(better, values, best_values)
    return best_values.flatten(1), best_scale[..., 0].half()


def _half(scale: Tensor) -> Tensor:
    """Return the scale rounded to float16, so that values are rounded for the scale in use; 1 in place of 0."""
    held = scale.half().float()
    return torch.where(held == 0, 1.0, held)


def _rounded(weight: Tensor, scale: Tensor, largest: int) -> Tensor:
    return (weight / scale).round_().clamp_(-largest - 1, largest).to(torch.int8)
