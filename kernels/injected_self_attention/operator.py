"""`torch.ops.moma.injected_self_attention`: the Triton kernel on a GPU, plain PyTorch elsewhere."""

import torch
from torch import Tensor

from kernels.dispatch import HAS_TRITON, check_sizes, torch_operator, uses_triton_kernel
from kernels.injected_self_attention import reference

if HAS_TRITON:
    from kernels.injected_self_attention.triton_kernel import launch

# The last one is the axis of `scale`, a single number.
_LAYOUTS = "gsc gsc gsc bnc bnc bn bs i"


@torch_operator("moma::injected_self_attention")
def injected_self_attention(
    q_gsc: Tensor,
    k_gsc: Tensor,
    v_gsc: Tensor,
    ref_k_bnc: Tensor,
    ref_v_bnc: Tensor,
    mask_bn: Tensor,
    gate_bs: Tensor,
    scale: Tensor,
    num_heads: int,
) -> Tensor:
    """Compute `reference.injected_self_attention`, whose docstring describes the tensors.

    Raises:
        ValueError: the tensors' sizes do not match.
        TypeError: on a GPU, queries, keys and values of different dtypes.
    """
    tensors = (q_gsc, k_gsc, v_gsc, ref_k_bnc, ref_v_bnc, mask_bn, gate_bs, scale)
    check_sizes(num_heads, _LAYOUTS, tensors)
    if uses_triton_kernel(q_gsc):
        return launch(tensors, num_heads)
    return reference.injected_self_attention(*tensors, num_heads)


@injected_self_attention.register_fake
def _(
    q_gsc: Tensor,
    k_gsc: Tensor,
    v_gsc: Tensor,
    ref_k_bnc: Tensor,
    ref_v_bnc: Tensor,
    mask_bn: Tensor,
    gate_bs: Tensor,
    scale: Tensor,
    num_heads: int,
) -> Tensor:
    return torch.empty_like(q_gsc, memory_format=torch.contiguous_format)
