"""How tensors leave a network."""

import torch
from torch import Tensor


def at_edge(tensor: Tensor) -> Tensor:
    """The tensor as it passes to another network: NumPy, which stands between them, has no bfloat16."""
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor
