"""`torch.ops.moma.context_cross_attention`: the Triton kernel on a GPU, plain PyTorch elsewhere."""

import torch
from torch import Tensor

from kernels.context_cross_attention import reference
from kernels.dispatch import HAS_TRITON, check_sizes, torch_operator, uses_triton_kernel

if HAS_TRITON:
    from kernels.context_cross_attention.triton_kernel import launch

_LAYOUTS = "gsc gtc gtc gmc gmc bs bt"


@torch_operator("moma::context_cross_attention")
def context_cross_attention(
    q_gsc: Tensor,
    text_k_gtc: Tensor,
    text_v_gtc: Tensor,
    context_k_gmc: Tensor,
    context_v_gmc: Tensor,
    gate_bs: Tensor,
    subject_weights_bt: Tensor,
    num_heads: int,
) -> tuple[Tensor, Tensor]:
    """Compute `reference.context_cross_attention`, whose docstring describes the tensors.

    Raises:
        ValueError: the tensors' sizes do not match.
        TypeError: on a GPU, queries, keys and values of different dtypes.
    """
    tensors = (q_gsc, text_k_gtc, text_v_gtc, context_k_gmc, context_v_gmc, gate_bs, subject_weights_bt)
    check_sizes(num_heads, _LAYOUTS, tensors)
    if uses_triton_kernel(q_gsc):
        return launch(tensors, num_heads)
    return reference.context_cross_attention(*tensors, num_heads)


@context_cross_attention.register_fake
def _(
    q_gsc: Tensor,
    text_k_gtc: Tensor,
    text_v_gtc: Tensor,
    context_k_gmc: Tensor,
    context_v_gmc: Tensor,
    gate_bs: Tensor,
    subject_weights_bt: Tensor,
    num_heads: int,
) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(q_gsc, memory_format=torch.contiguous_format)
    return out, q_gsc.new_empty(q_gsc.shape[:2])
