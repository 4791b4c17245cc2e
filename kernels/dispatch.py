"""What both torch operators share: how they are declared, and when a kernel takes the place of the definition."""

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
    """The decorator that makes a function of tensors a torch operator.

    With Triton it is one that PyTorch's compilers look into: `torch.export` keeps it whole, and inductor compiles the
    kernel that the function launches, or what it computes where it launches none.
    """
    declare = torch.library.triton_op if HAS_TRITON else torch.library.custom_op
    return declare(name, mutates_args=())


def takes_kernel(q_gsc: Tensor) -> bool:
    """Whether a call with these queries runs the Triton kernel: on a GPU it is made for, in a precision that it has."""
    if not HAS_TRITON or not q_gsc.is_cuda or q_gsc.dtype not in _KERNEL_DTYPES:
        return False
    return compute_capability(q_gsc) >= min(CAPABILITIES)


def compute_capability(tensor: Tensor) -> int:
    """That of the tensor's device, 90 for 9.0."""
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes the tensor's device the current one, on which Triton launches, where there are several."""
    return torch.cuda.device(tensor.device) if torch.cuda.device_count() > 1 else contextlib.nullcontext()


def check_sizes(num_heads: int, layouts: str, tensors: tuple[Tensor, ...]) -> None:
    """Refuse tensors whose sizes do not go together: a kernel would read beyond them.

    Args:
        layouts: what the tensors' axes are, a word a tensor: "gsc gsc bn" where the same letter is the same size.

    Raises:
        ValueError: an axis of another size, or of none; or sizes that heads or samples do not divide.
    """
    sizes: dict[str, Any] = {}
    for layout, tensor in zip(layouts.split(), tensors, strict=True):
        if tensor.dim() != len(layout):
            raise ValueError(
                f"a tensor of {list(tensor.shape)} is given for one of layout [{', '.join(layout.upper())}]"
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
