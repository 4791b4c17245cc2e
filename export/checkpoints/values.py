"""Check the values of weights and of numbers in configs: NaN, infinity, and what a precision cannot hold.

A network with one NaN among its weights computes NaN, which a picture shows as plain black.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from moma_rt.errors import CheckpointError

_CHUNK = 1 << 22


def check_finite(tensors: Mapping[str, Tensor], where: object) -> None:
    """Check that tensors of any dtype contain neither NaN nor infinity; tensors on the meta device are not checked.

    Raises:
        CheckpointError: the message names `where` and the first such tensor.
    """
    for name, tensor in tensors.items():
        if fault := _fault(tensor):
            raise CheckpointError(
                f"{where} has {fault} in {name}: the file is damaged or its training diverged; take another copy of it"
            )


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor contains neither NaN nor infinity."""
    return not _fault(tensor)


def check_floating(tensors: Mapping[str, Tensor], where: object) -> None:
    """Check that weights are floating-point numbers: integers are another program's quantized weights.

    Raises:
        CheckpointError: the message names `where` and the first tensor that is not.
    """
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise CheckpointError(f"{where} has {name} as {kind}; weights must be floating-point numbers")


def converted(tensor: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    """Return finite weights in another dtype.

    Raises:
        CheckpointError: a weight lies beyond the dtype's range; the message names `what` and the precisions that help.
    """
    result = tensor.to(dtype)
    limit = torch.finfo(dtype).max
    if tensor.is_floating_point() and torch.finfo(tensor.dtype).max > limit and not is_finite(result):
        wider = "bf16 or fp32" if dtype == torch.float16 else "fp32"
        raise CheckpointError(
            f"{what} has weights of up to {_largest(tensor):.3g}, but {str(dtype).removeprefix('torch.')} ends at "
            f"{limit:.5g}: build in {wider} (--precision; for the language model --mllm-precision)"
        )
    return result


def check_positive(config: Mapping[str, Any], keys: Iterable[str], where: object) -> None:
    """Check that the config's entries of these names, where it has them, are finite numbers above 0.

    Raises:
        CheckpointError: one is not; JSON files may hold NaN and Infinity.
    """
    for key in keys:
        value = config.get(key)
        if value is not None and not is_positive(value):
            raise CheckpointError(f"{where} has {key} {value!r}; it must be a finite number above 0")


def is_positive(value: object) -> bool:
    """Whether a config's value is a finite number above 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _fault(tensor: Tensor) -> str:
    """Return "NaN" or "infinity" if the tensor contains it, else an empty text."""
    if not tensor.is_floating_point() or tensor.is_meta:
        return ""
    # aminmax passes NaN on and is many times faster than isfinite, which makes a tensor of booleans.
    bounds = [float(bound) for part in _parts(tensor) for bound in torch.aminmax(part)]
    if any(math.isnan(bound) for bound in bounds):
        return "NaN"
    return "infinity" if any(math.isinf(bound) for bound in bounds) else ""


def _largest(tensor: Tensor) -> float:
    return max(abs(float(bound)) for part in _parts(tensor) for bound in torch.aminmax(part))


def _parts(tensor: Tensor) -> Iterable[Tensor]:
    """The tensor itself; if PyTorch cannot compare its dtype, as those of 8 bits, pieces of it in float32."""
    if tensor.numel() == 0:
        return ()
    if tensor.element_size() > 1:
        return (tensor,)
    return (piece.float() for piece in tensor.reshape(-1).split(_CHUNK))
