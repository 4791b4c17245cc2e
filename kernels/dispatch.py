"""Shared by both torch operators: declaration, size checks, and the choice between Triton and plain PyTorch."""

import contextlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels.launch import CAPABILITIES

HAS_TRITON = importlib.util.find_spec("triton") is not None
_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def torch_operator(name: str) -> Callable[..., Any]:
    """Return the decorator that declares a function of tensors as a torch operator.

    With Triton it is a `triton_op`, which PyTorch's compilers can see into: `torch.export` keeps it as one node, and
    inductor compiles the kernel that the function launches, or its PyTorch code if it launches none.
    """
    declare = torch.library.triton_op if HAS_TRITON else torch.library.custom_op
    return declare(name, mutates_args=())


def uses_triton_kernel(q_gsc: Tensor) -> bool:
    """Return whether a call with these queries runs the Triton kernel: it needs a supported GPU and dtype."""
    if not HAS_TRITON or not q_gsc.is_cuda or q_gsc.dtype not in _KERNEL_DTYPES:
        return False
    return compute_capability(q_gsc) >= min(CAPABILITIES)


def compute_capability(tensor: Tensor) -> int:
    """Return the compute capability of the tensor's device, 90 for 9.0."""
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make the tensor's device current if there are several: Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if torch.cuda.device_count() > 1 else contextlib.nullcontext()


def check_sizes(num_heads: int, layouts: str, tensors: tuple[Tensor, ...]) -> None:
    """Refuse tensors whose sizes do not match, since a kernel would read out of bounds.

    Args:
        layouts: the axes of each tensor, one word per tensor: "gsc gsc bn". Equal letters stand for equal sizes.

    Raises:
        ValueError: axes whose sizes differ or are 0, or sizes that heads or samples do not divide.
    """
    sizes: dict[str, Any] = {}
    for layout, tensor in zip(layouts.split(), tensors, strict=True):
        if tensor.dim() != len(layout):
            raise ValueError(
                f"a tensor of shape {list(tensor.shape)} was given for layout [{', '.join(layout.upper())}]"
            )
        for letter, size in zip(layout, tensor.shape, strict=True):
            known = sizes.setdefault(letter, size)
            if known != size:
                raise ValueError(f"{letter.upper()} is {known} and {size}; tensors are {layouts.upper()}")
    empty = [letter.upper() for letter, size in sizes.items() if size == 0]
    if empty:
        raise ValueError(f"{' and '.join(empty)} may not be 0; tensors are {layouts.upper()}")
    if sizes["g"] % sizes["b"]:
        raise ValueError(f"q has {sizes['g']} rows, which is no multiple of {sizes['b']} samples")
    if num_heads < 1 or sizes["c"] % num_heads:
        raise ValueError(f"{sizes['c']} channels are no multiple of {num_heads} heads")
