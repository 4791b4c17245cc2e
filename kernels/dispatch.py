"""What both torch operators share: how they are declared, and when a kernel takes the place of the definition."""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

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
    """Whether a call with these queries runs the Triton kernel: on a GPU, in a precision that the kernel has."""
    return HAS_TRITON and q_gsc.is_cuda and q_gsc.dtype in _KERNEL_DTYPES


def compute_capability(tensor: Tensor) -> int:
    """That of the tensor's device, 90 for 9.0."""
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


def check_rows(q_gsc: Tensor, samples: int) -> None:
    """Raises ValueError where the rows of `q_gsc` are no whole number of guidance halves of `samples`."""
    if q_gsc.shape[0] % samples:
        raise ValueError(f"q has {q_gsc.shape[0]} rows, which is no multiple of {samples} samples")
