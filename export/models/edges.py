"""The conversion of tensors that leave a network."""

import torch
from torch import Tensor


def at_edge(tensor: Tensor) -> Tensor:
    """Convert bfloat16 to float32: networks exchange tensors as NumPy arrays, which have no bfloat16."""
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor
