"""The definition of `moma::injected_self_attention` in plain PyTorch, which is also its implementation on a CPU."""

import torch
import torch.nn.functional as F
from torch import Tensor


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
    """Return `SA(q, k, v) + scale · gate · SA(q, ref_k, ref_v | mask)`: two separate softmaxes (MoMA, section 3.3).

    Args:
        q_gsc, k_gsc, v_gsc: [G·B, S, C], C = num_heads × head width; G guidance halves of B samples.
        ref_k_bnc, ref_v_bnc: [B, N, C]; row g of the first three uses the reference of sample g mod B.
        mask_bn: [B, N]; reference tokens with value 0 are masked, all others attended to. Every sample must have an
            unmasked token. (Zero keys with an all-ones mask give the uniform average that the original falls back to.)
        gate_bs: [B, S], the weight of the reference branch for each query.
        scale: [1], the weight of the reference branch.
        num_heads: the number of heads.

    Returns:
        [G·B, S, C], in the dtype of `q_gsc`.
    """
    groups = q_gsc.shape[0] // ref_k_bnc.shape[0]
    own = _attention(q_gsc, k_gsc, v_gsc, num_heads, None)
    bias_bn = torch.zeros_like(mask_bn, dtype=q_gsc.dtype).masked_fill_(mask_bn == 0, torch.finfo(q_gsc.dtype).min)
    bias_g11n = bias_bn.repeat(groups, 1)[:, None, None, :]
    injected = _attention(q_gsc, ref_k_bnc.repeat(groups, 1, 1), ref_v_bnc.repeat(groups, 1, 1), num_heads, bias_g11n)
    gate_gs1 = (gate_bs * scale).to(q_gsc.dtype).repeat(groups, 1)[..., None]
    return own + gate_gs1 * injected


def _attention(q_bsc: Tensor, k_bnc: Tensor, v_bnc: Tensor, num_heads: int, bias: Tensor | None) -> Tensor:
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q_bsc, k_bnc, v_bnc))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)
