"""Device functions of both kernels: attention of a block of queries in one head, in one pass over the tokens.

Online softmax (Milakov and Gimelshein, arXiv 1805.02867; Dao, arXiv 2307.08691) with statistics and accumulators in
fp32, and powers of two instead of e. A head's width is split into a main part and a tail, each a power of two, so that
40 = 32 + 8, 80 = 64 + 16 and 160 = 128 + 32 load no padding; only a tail of 8 is computed as 16 columns, the minimum of
tensor cores.

Names: `p_` pointer, `o_` offset, `m_` bounds mask of a load, `i_` index; a comment above a tile gives its shape.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_rows(
    p_rows,
    o_token,
    m_token,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    FIRST: tl.constexpr,
    PART: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Load columns FIRST to FIRST + PART of a head for some tokens, [tokens, PART]; zeros outside width and mask.

    EVEN: `m_token` is true for every token.
    """
    o_column = FIRST + tl.arange(0, PART)
    p_tile = p_rows + o_token[:, None] * CHANNELS + o_column[None, :]
    if FIRST + PART > WIDTH:
        tile = tl.load(p_tile, mask=m_token[:, None] & (o_column < WIDTH)[None, :], other=0.0)
    elif EVEN:
        tile = tl.load(p_tile)
    else:
        tile = tl.load(p_tile, mask=m_token[:, None], other=0.0)
    return tile


@triton.jit
def store_rows(
    p_rows,
    tile,
    o_token,
    m_token,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    FIRST: tl.constexpr,
    PART: tl.constexpr,
):
    """Store a tile to where `load_rows` loads it from, converted to the pointer's dtype."""
    o_column = FIRST + tl.arange(0, PART)
    m_tile = m_token[:, None] & (o_column < WIDTH)[None, :]
    tl.store(p_rows + o_token[:, None] * CHANNELS + o_column[None, :], tile.to(p_rows.dtype.element_ty), mask=m_tile)


@triton.jit
def attend(
    q_main,
    q_tail,
    p_k,
    p_v,
    p_token,
    begin,
    end,
    scale_log2,
    mask_end,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    KIND: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Return Σ exp(q·kᵀ · scale) v over the tokens from `begin` to `end`, not yet divided by the softmax denominator.

    The first block must hold an unmasked token: without one a row has no finite maximum to subtract.

    Args:
        q_main, q_tail: [queries, MAIN] and [queries, TAIL]; the latter is not read where TAIL is 0.
        p_k, p_v: this head's columns of the first token.
        p_token: one value per token, used according to KIND. "plain": not read. "masked": 0 masks the token; from
            `mask_end` on the values are not read and no token is masked. "weighted": the token's weight in the last
            result.
        scale_log2: what q·k is multiplied by, times log2(e); positive, or 0 for the uniform average.
        EVEN: the last block is full.

    Returns:
        Main part and tail of the sum, both fp32; the softmax denominator [queries]; Σ exp · weight [queries].
    """
    maximum = tl.full([q_main.shape[0]], float("-inf"), tl.float32)
    total = tl.zeros([q_main.shape[0]], tl.float32)
    weighted = tl.zeros([q_main.shape[0]], tl.float32)
    # [queries, MAIN], [queries, TAIL]
    sum_main = tl.zeros([q_main.shape[0], MAIN], tl.float32)
    sum_tail = tl.zeros([q_main.shape[0], TAIL if TAIL > 0 else 16], tl.float32)
    for start in range(begin, end, BLOCK_TOKENS):
        o_token = start + tl.arange(0, BLOCK_TOKENS)
        m_token = o_token < end
        k_main = load_rows(p_k, o_token, m_token, CHANNELS, WIDTH, 0, MAIN, EVEN)
        # [queries, tokens]
        scores = tl.dot(q_main, tl.trans(k_main), input_precision="ieee")
        if TAIL > 0:
            k_tail = load_rows(p_k, o_token, m_token, CHANNELS, WIDTH, MAIN, TAIL, EVEN)
            scores = tl.dot(q_tail, tl.trans(k_tail), scores, input_precision="ieee")
        if KIND == "masked" or not EVEN:
            m_kept = m_token
            if KIND == "masked":
                kept = tl.load(p_token + o_token, mask=o_token < mask_end, other=1.0).to(tl.float32)
                m_kept = m_token & (kept != 0)
            bias = tl.where(m_kept, 0.0, float("-inf"))
            scores = scores * scale_log2 + bias[None, :]
            new_maximum = tl.maximum(maximum, tl.max(scores, 1))
            exponentials = tl.exp2(scores - new_maximum[:, None])
        else:
            new_maximum = tl.maximum(maximum, tl.max(scores, 1) * scale_log2)
            exponentials = tl.exp2(scores * scale_log2 - new_maximum[:, None])
        alpha = tl.exp2(maximum - new_maximum)
        maximum = new_maximum
        total = total * alpha + tl.sum(exponentials, 1)
        if KIND == "weighted":
            weight = tl.load(p_token + o_token, mask=m_token, other=0.0).to(tl.float32)
            weighted = weighted * alpha + tl.sum(exponentials * weight[None, :], 1)
        v_main = load_rows(p_v, o_token, m_token, CHANNELS, WIDTH, 0, MAIN, EVEN)
        sum_main = tl.dot(exponentials.to(v_main.dtype), v_main, sum_main * alpha[:, None], input_precision="ieee")
        if TAIL > 0:
            v_tail = load_rows(p_v, o_token, m_token, CHANNELS, WIDTH, MAIN, TAIL, EVEN)
            sum_tail = tl.dot(exponentials.to(v_tail.dtype), v_tail, sum_tail * alpha[:, None], input_precision="ieee")
    return sum_main, sum_tail, total, weighted
