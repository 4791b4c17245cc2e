"""`moma::InjectedSelfAttention` as one Triton kernel: a block of queries attends to its own and to reference tokens."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from kernels.dispatch import compute_capability, on_device_of
from kernels.launch import AttentionShape, LaunchConfig, self_attention_launch, split_width
from kernels.online_softmax import LOG2_E, attend, load_rows, store_rows

# Mask values per iteration of the search for unmasked tokens.
_SCAN = tl.constexpr(1024)


def launch(tensors: tuple[Tensor, ...], num_heads: int, config: LaunchConfig | None = None) -> Tensor:
    """Launch the kernel on the operator's tensors, in the operator's order; strided tensors are made contiguous.

    Args:
        config: the launch configuration; by default the choice of `kernels.launch`.

    Returns:
        [G·B, S, C], contiguous.

    Raises:
        TypeError: queries, keys and values have different dtypes.
    """
    q_gsc, ref_k_bnc = tensors[0], tensors[3]
    if len({t.dtype for t in tensors[:5]}) > 1:
        raise TypeError(f"queries, keys and values must have one dtype, not {[str(t.dtype) for t in tensors[:5]]}")
    rows, queries, channels = q_gsc.shape
    samples, reference_tokens, _ = ref_k_bnc.shape
    width = channels // num_heads
    main, tail = split_width(width)
    if config is None:
        config = self_attention_launch(AttentionShape(queries, width, q_gsc.element_size()), compute_capability(q_gsc))
    out_gsc = torch.empty_like(q_gsc, memory_format=torch.contiguous_format)
    grid = (-(-queries // config.block_queries), samples * num_heads, rows // samples)
    with on_device_of(q_gsc):
        wrap_triton(injected_self_attention_kernel)[grid](
            *(t.contiguous() for t in tensors),
            reference_tokens,
            out_gsc,
            HEADS=num_heads,
            WIDTH=width,
            MAIN=main,
            TAIL=tail,
            QUERIES=queries,
            BLOCK_QUERIES=config.block_queries,
            BLOCK_TOKENS=config.block_tokens,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return out_gsc


@triton.jit
def injected_self_attention_kernel(
    p_q,
    p_k,
    p_v,
    p_ref_k,
    p_ref_v,
    p_mask,
    p_gate,
    p_scale,
    reference_tokens,
    p_out,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """Program ids: query block, sample · heads + head, guidance half. Tensors as in `reference.py`, contiguous.

    The number of samples follows from the grid, so only pointers and the number of reference tokens are passed.
    Everything skipped contributes exactly zero: the reference branch if the scale or all gates of the block are 0, and
    the reference tokens before the first and after the last unmasked one.
    """
    CHANNELS: tl.constexpr = HEADS * WIDTH
    EVEN: tl.constexpr = QUERIES % BLOCK_TOKENS == 0
    SCALE_LOG2: tl.constexpr = WIDTH**-0.5 * LOG2_E
    i_head = tl.program_id(1) % HEADS
    i_sample = (tl.program_id(1) // HEADS).to(tl.int64)
    i_row = tl.program_id(2) * (tl.num_programs(1) // HEADS) + i_sample
    o_query = tl.program_id(0) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    m_query = o_query < QUERIES
    o_own = i_row * (QUERIES * CHANNELS) + i_head * WIDTH
    o_reference = i_sample * reference_tokens * CHANNELS + i_head * WIDTH

    # [queries, MAIN], [queries, TAIL]
    q_main = load_rows(p_q + o_own, o_query, m_query, CHANNELS, WIDTH, 0, MAIN, QUERIES % BLOCK_QUERIES == 0)
    q_tail = q_main
    if TAIL > 0:
        q_tail = load_rows(p_q + o_own, o_query, m_query, CHANNELS, WIDTH, MAIN, TAIL, QUERIES % BLOCK_QUERIES == 0)
    out_main, out_tail, total, _ = attend(
        q_main, q_tail, p_k + o_own, p_v + o_own, p_mask, 0, QUERIES, SCALE_LOG2, 0,
        CHANNELS, WIDTH, MAIN, TAIL, BLOCK_TOKENS, "plain", EVEN,
    )  # fmt: skip
    out_main = out_main / total[:, None]
    out_tail = out_tail / total[:, None]

    weight = tl.load(p_gate + i_sample * QUERIES + o_query, mask=m_query, other=0.0).to(tl.float32)
    weight = weight * tl.load(p_scale).to(tl.float32)
    if tl.max((weight != 0).to(tl.int32), 0) > 0:
        p_sample_mask = p_mask + i_sample * reference_tokens
        first, last, kept = _extent(p_sample_mask, reference_tokens)
        # If all tokens are masked the result is their average, as adding the lowest number to every score gives.
        is_empty = kept == 0
        begin = tl.where(is_empty, 0, first // BLOCK_TOKENS * BLOCK_TOKENS)
        end = tl.where(is_empty, reference_tokens, last + 1)
        # Enrollment keeps only tokens inside the mask, so usually none is masked here and the mask is not read again.
        mask_end = tl.where(is_empty | (kept == end - begin), begin, end)
        injected_main, injected_tail, total, _ = attend(
            q_main, q_tail, p_ref_k + o_reference, p_ref_v + o_reference, p_sample_mask, begin, end,
            tl.where(is_empty, 0.0, SCALE_LOG2), mask_end,
            CHANNELS, WIDTH, MAIN, TAIL, BLOCK_TOKENS, "masked", False,
        )  # fmt: skip
        weight = weight / total
        out_main += injected_main * weight[:, None]
        out_tail += injected_tail * weight[:, None]
    store_rows(p_out + o_own, out_main, o_query, m_query, CHANNELS, WIDTH, 0, MAIN)
    if TAIL > 0:
        store_rows(p_out + o_own, out_tail, o_query, m_query, CHANNELS, WIDTH, MAIN, TAIL)


@triton.jit
def _extent(p_mask, tokens):
    """Return the first and last index of a mask's nonzero values, and their number."""
    first = tl.full([_SCAN], 2147483647, tl.int32)
    last = tl.full([_SCAN], -1, tl.int32)
    kept = tl.zeros([_SCAN], tl.int32)
    for start in range(0, tokens, _SCAN):
        o_token = start + tl.arange(0, _SCAN)
        m_kept = tl.load(p_mask + o_token, mask=o_token < tokens, other=0.0).to(tl.float32) != 0
        first = tl.where(m_kept, tl.minimum(first, o_token), first)
        last = tl.where(m_kept, o_token, last)
        kept += m_kept.to(tl.int32)
    return tl.min(first, 0), tl.max(last, 0), tl.sum(kept, 0)
