"""`moma::ContextCrossAttention` as one Triton kernel: a block of queries attends to text and context tokens."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from kernels.dispatch import on_device_of
from kernels.launch import AttentionShape, LaunchConfig, cross_attention_launch, split_width
from kernels.online_softmax import LOG2_E, attend, load_rows, store_rows


def launch(tensors: tuple[Tensor, ...], num_heads: int, config: LaunchConfig | None = None) -> tuple[Tensor, Tensor]:
    """Launch the kernel on the operator's tensors, in the operator's order; strided tensors are made contiguous.

    Args:
        config: the launch configuration; by default the choice of `kernels.launch`.

    Returns:
        The output [G·B, S, C] and the saliency [G·B, S], contiguous.

    Raises:
        TypeError: queries, keys and values have different dtypes.
    """
    q_gsc, text_k_gtc, context_k_gmc, gate_bs = tensors[0], tensors[1], tensors[3], tensors[5]
    if len({t.dtype for t in tensors[:5]}) > 1:
        raise TypeError(f"queries, keys and values must have one dtype, not {[str(t.dtype) for t in tensors[:5]]}")
    rows, queries, channels = q_gsc.shape
    samples = gate_bs.shape[0]
    width = channels // num_heads
    main, tail = split_width(width)
    if config is None:
        config = cross_attention_launch(AttentionShape(queries, width, q_gsc.element_size()))
    out_gsc = torch.empty_like(q_gsc, memory_format=torch.contiguous_format)
    saliency_gs = q_gsc.new_empty(rows, queries)
    grid = (-(-queries // config.block_queries), samples, rows // samples)
    with on_device_of(q_gsc):
        wrap_triton(context_cross_attention_kernel)[grid](
            *(t.contiguous() for t in tensors),
            out_gsc,
            saliency_gs,
            HEADS=num_heads,
            WIDTH=width,
            MAIN=main,
            TAIL=tail,
            QUERIES=queries,
            TEXT_TOKENS=text_k_gtc.shape[1],
            CONTEXT_TOKENS=context_k_gmc.shape[1],
            BLOCK_QUERIES=config.block_queries,
            BLOCK_TOKENS=config.block_tokens,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return out_gsc, saliency_gs


@triton.jit
def context_cross_attention_kernel(
    p_q,
    p_text_k,
    p_text_v,
    p_context_k,
    p_context_v,
    p_gate,
    p_subject_weights,
    p_out,
    p_saliency,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    QUERIES: tl.constexpr,
    TEXT_TOKENS: tl.constexpr,
    CONTEXT_TOKENS: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """Program ids: query block, sample, guidance half. The tensors are those of `reference.py`, contiguous.

    A program loops over all heads, so the saliency, which is a mean over heads, needs no second kernel. The context
    branch is skipped if all gates of the block are 0.
    """
    CHANNELS: tl.constexpr = HEADS * WIDTH
    SCALE_LOG2: tl.constexpr = WIDTH**-0.5 * LOG2_E
    BLOCK_CONTEXT: tl.constexpr = 16
    i_sample = tl.program_id(1).to(tl.int64)
    i_row = tl.program_id(2) * tl.num_programs(1) + i_sample
    o_query = tl.program_id(0) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    m_query = o_query < QUERIES
    EVEN: tl.constexpr = QUERIES % BLOCK_QUERIES == 0
    p_row_q = p_q + i_row * (QUERIES * CHANNELS)
    p_row_out = p_out + i_row * (QUERIES * CHANNELS)
    o_text = i_row * (TEXT_TOKENS * CHANNELS)
    o_context = i_row * (CONTEXT_TOKENS * CHANNELS)
    p_weights = p_subject_weights + i_sample * TEXT_TOKENS

    gate = tl.load(p_gate + i_sample * QUERIES + o_query, mask=m_query, other=0.0).to(tl.float32)
    is_open = tl.max((gate != 0).to(tl.int32), 0) > 0
    saliency = tl.zeros([BLOCK_QUERIES], tl.float32)
    for i_head in range(HEADS):
        o_head = i_head * WIDTH
        # [queries, MAIN], [queries, TAIL]
        q_main = load_rows(p_row_q + o_head, o_query, m_query, CHANNELS, WIDTH, 0, MAIN, EVEN)
        q_tail = q_main
        if TAIL > 0:
            q_tail = load_rows(p_row_q + o_head, o_query, m_query, CHANNELS, WIDTH, MAIN, TAIL, EVEN)
        out_main, out_tail, total, weighted = attend(
            q_main, q_tail, p_text_k + o_text + o_head, p_text_v + o_text + o_head, p_weights, 0, TEXT_TOKENS,
            SCALE_LOG2, 0, CHANNELS, WIDTH, MAIN, TAIL, BLOCK_TOKENS, "weighted", TEXT_TOKENS % BLOCK_TOKENS == 0,
        )  # fmt: skip
        saliency += weighted / total
        out_main = out_main / total[:, None]
        out_tail = out_tail / total[:, None]
        if is_open:
            context_main, context_tail, total, _ = attend(
                q_main, q_tail, p_context_k + o_context + o_head, p_context_v + o_context + o_head, p_weights,
                0, CONTEXT_TOKENS, SCALE_LOG2, 0,
                CHANNELS, WIDTH, MAIN, TAIL, BLOCK_CONTEXT, "plain", CONTEXT_TOKENS % BLOCK_CONTEXT == 0,
            )  # fmt: skip
            weight = gate / total
            out_main += context_main * weight[:, None]
            out_tail += context_tail * weight[:, None]
        store_rows(p_row_out + o_head, out_main, o_query, m_query, CHANNELS, WIDTH, 0, MAIN)
        if TAIL > 0:
            store_rows(p_row_out + o_head, out_tail, o_query, m_query, CHANNELS, WIDTH, MAIN, TAIL)
    o_saliency = i_row * QUERIES + o_query
    saliency = (saliency / HEADS).to(p_saliency.dtype.element_ty)
    tl.store(p_saliency + o_saliency, saliency, mask=m_query)
