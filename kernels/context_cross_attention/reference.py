"""The definition of `moma::context_cross_attention` in plain PyTorch, which is also its implementation on a CPU."""

import torch
import torch.nn.functional as F
from torch import Tensor


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
    """Return `CA(q, text) + gate · CA(q, context)`, and how much each query attends to the subject's words.

    Decoupled cross-attention (MoMA, section 3.2) and the saliency of its foreground mask (section 3.3).

    Args:
        q_gsc: [G·B, S, C], C = num_heads × head width; G guidance halves of B samples.
        text_k_gtc, text_v_gtc: [G·B, T, C].
        context_k_gmc, context_v_gmc: [G·B, M, C].
        gate_bs: [B, S], the weight of the context branch for each query; row g uses sample g mod B.
        subject_weights_bt: [B, T], the weight of each text token in the saliency.
        num_heads: the number of heads.

    Returns:
        The output [G·B, S, C], and the saliency [G·B, S]: the mean over heads of Σ_t weight_t · probability_t.
    """
    groups = q_gsc.shape[0] // gate_bs.shape[0]
    q, text_k, text_v, context_k, context_v = (
        t.unflatten(-1, (num_heads, -1)).transpose(1, 2)
        for t in (q_gsc, text_k_gtc, text_v_gtc, context_k_gmc, context_v_gmc)
    )
    probabilities_ghst = (q @ text_k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
    weights_gt = subject_weights_bt.to(q_gsc.dtype).repeat(groups, 1)
    saliency_gs = torch.einsum("ghst,gt->gs", probabilities_ghst, weights_gt) / num_heads
    text_gsc = (probabilities_ghst @ text_v).transpose(1, 2).flatten(2)
    context_gsc = F.scaled_dot_product_attention(q, context_k, context_v).transpose(1, 2).flatten(2)
    gate_gs1 = gate_bs.to(q_gsc.dtype).repeat(groups, 1)[..., None]
    return text_gsc + gate_gs1 * context_gsc, saliency_gs
