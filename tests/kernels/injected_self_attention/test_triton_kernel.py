"""The kernel of `moma::InjectedSelfAttention`: no further from float64 than twice what PyTorch is in its precision."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kernels.launch import LaunchConfig

OPERATOR = "injected_self_attention"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Groups, samples, queries, reference tokens, heads, head width.
SIZES = [
    (1, 1, 1, 1, 1, 2),
    (2, 3, 63, 7, 2, 4),
    (1, 2, 111, 77, 1, 40),
    (2, 1, 64, 63, 1, 80),
    (2, 2, 17, 33, 2, 160),
    (2, 1, 33, 111, 1, 64),
    (1, 1, 31, 65, 1, 128),
    # More tokens than the kernel scans at a time for those inside the mask.
    (2, 1, 16, 2100, 1, 16),
]


def make_inputs(random, sizes, dtype):
    groups, batch, queries, tokens, heads, width = sizes
    own = [random(groups * batch, queries, heads * width).to(dtype) for _ in range(3)]
    reference = [random(batch, tokens, heads * width).to(dtype) for _ in range(2)]
    mask = (random(batch, tokens) > 0.3).to(dtype)
    mask[:, tokens // 2] = 1.0
    gate = random(batch, queries).sigmoid().to(dtype)
    gate[:, ::3] = 0.0
    return (*own, *reference, mask, gate, torch.tensor([0.7]).to(dtype))


def replaced(inputs, **changes):
    names = ("q", "k", "v", "ref_k", "ref_v", "mask", "gate", "scale")
    return tuple(changes.get(name, tensor) for name, tensor in zip(names, inputs, strict=True))


def expected(naive, inputs, heads):
    """In float64; a mask without a token is the average of all."""
    q, k, v, ref_k, ref_v, mask, gate, scale = inputs
    out = []
    for row in range(len(q)):
        sample = row % len(ref_k)
        keep = np.asarray((mask[sample] != 0).cpu())
        own, _ = naive(q[row], k[row], v[row], heads)
        if keep.any():
            injected, _ = naive(q[row], ref_k[sample], ref_v[sample], heads, keep)
        else:
            injected = np.asarray(ref_v[sample].double()).mean(0)
        out.append(own + float(scale) * np.asarray(gate[sample].double())[:, None] * injected)
    return np.stack(out)


def composition(inputs, heads):
    """What a user of PyTorch would write, in the inputs' precision."""
    q, k, v, ref_k, ref_v, mask, gate, scale = inputs
    groups = len(q) // len(ref_k)

    def attend(q, k, v, bias=None):
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)

    bias = torch.zeros_like(mask).masked_fill(mask == 0, torch.finfo(q.dtype).min).repeat(groups, 1)[:, None, None]
    injected = attend(q, ref_k.repeat(groups, 1, 1), ref_v.repeat(groups, 1, 1), bias)
    return attend(q, k, v) + (gate * scale).repeat(groups, 1)[..., None] * injected


def check(found, inputs, heads, naive):
    """At most twice PyTorch's error, or the rounding of the largest output."""
    wanted = expected(naive, inputs, heads)
    error = np.abs(np.asarray(found.double()) - wanted)
    plain = np.abs(np.asarray(composition(inputs, heads).double()) - wanted).max()
    allowed = max(2 * plain, torch.finfo(found.dtype).eps * np.abs(wanted).max())
    worst = np.unravel_index(error.argmax(), error.shape)
    assert found.shape == inputs[0].shape
    assert found.dtype == inputs[0].dtype
    assert not np.isnan(error).any(), "memory that was not written, or NaN that was computed"
    assert error.max() <= allowed, f"off by {error.max():.3g} at {worst}; {allowed:.3g} is allowed"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_equals_the_definition(sizes, dtype, random, naive, run_kernel):
    inputs, heads = make_inputs(random, sizes, dtype), sizes[4]
    check(run_kernel(OPERATOR, inputs, heads), inputs, heads, naive)


@pytest.mark.parametrize("kept", ["none", "all", "first", "last", "middle"])
def test_masks(kept, random, naive, run_kernel):
    inputs = make_inputs(random, (2, 2, 17, 70, 1, 40), torch.float16)
    mask = torch.zeros(2, 70, dtype=torch.float16)
    mask[:, {"none": [], "all": slice(None), "first": 0, "last": 69, "middle": slice(20, 50, 7)}[kept]] = 0.25
    inputs = replaced(inputs, mask=mask)
    check(run_kernel(OPERATOR, inputs, 1), inputs, 1, naive)


def test_samples_with_different_masks(random, naive, run_kernel):
    inputs = make_inputs(random, (2, 3, 17, 70, 1, 40), torch.float16)
    mask = torch.zeros(3, 70, dtype=torch.float16)
    mask[1, :3] = mask[2, 40:] = 1.0
    inputs = replaced(inputs, mask=mask)
    check(run_kernel(OPERATOR, inputs, 1), inputs, 1, naive)


@pytest.mark.parametrize("blocks", [(16, 16), (32, 64), (64, 32), (128, 64)], ids=str)
def test_every_block_size(blocks, random, naive, interpreter):
    inputs = make_inputs(random, (2, 1, 63, 111, 1, 40), torch.float16)
    found = interpreter(OPERATOR, inputs, 1, LaunchConfig(*blocks, 4, 2))
    check(found, inputs, 1, naive)


@pytest.mark.parametrize("which", ["gate", "scale"])
def test_a_branch_without_weight_is_not_read(which, random, naive, run_kernel):
    inputs = make_inputs(random, (2, 1, 40, 70, 1, 40), torch.float16)
    closed = replaced(inputs, **{which: torch.zeros_like(inputs[6 if which == "gate" else 7])})
    unreadable = replaced(closed, ref_k=inputs[3] * torch.nan, ref_v=inputs[4] * torch.nan)
    found = run_kernel(OPERATOR, unreadable, 1)
    check(found, closed, 1, naive)
    assert torch.equal(found, run_kernel(OPERATOR, closed, 1))


def test_a_closed_gate_skips_only_its_own_block(random, naive, run_kernel):
    inputs = make_inputs(random, (1, 1, 300, 40, 1, 16), torch.float16)
    gate = inputs[6].clone()
    gate[:, :128] = 0.0
    unreadable = replaced(inputs, gate=gate, ref_v=inputs[4] * torch.nan)
    found = run_kernel(OPERATOR, unreadable, 1)
    assert not found[:, :128].isnan().any()
    assert found[:, 299].isnan().all()


def test_tokens_after_the_last_in_the_mask_are_not_read(random, run_kernel):
    inputs = make_inputs(random, (2, 1, 20, 400, 1, 16), torch.float16)
    mask = inputs[5].clone()
    mask[:, 130:] = 0.0
    inputs = replaced(inputs, mask=mask)
    ref_k, ref_v = inputs[3].clone(), inputs[4].clone()
    ref_k[:, 130:] = ref_v[:, 130:] = torch.nan
    found = run_kernel(OPERATOR, replaced(inputs, ref_k=ref_k, ref_v=ref_v), 1)
    assert torch.equal(found, run_kernel(OPERATOR, inputs, 1))


def test_strided_inputs(random, run_kernel):
    inputs = make_inputs(random, (2, 2, 17, 33, 2, 40), torch.float16)
    apart = tuple(torch.stack([t, t * torch.nan], dim=-1)[..., 0] for t in inputs)
    assert not any(t.is_contiguous() for t in apart[:7])
    assert torch.equal(run_kernel(OPERATOR, apart, 2), run_kernel(OPERATOR, inputs, 2))


def test_samples_do_not_reach_each_other(random, run_kernel):
    inputs = make_inputs(random, (2, 2, 17, 33, 1, 40), torch.float16)
    poisoned = [tensor.clone() for tensor in inputs]
    for index in (3, 4, 6):
        poisoned[index][0] = torch.nan
    found, wanted = run_kernel(OPERATOR, tuple(poisoned), 1), run_kernel(OPERATOR, inputs, 1)
    assert found[::2].isnan().all()
    assert torch.equal(found[1::2], wanted[1::2])


def test_large_scores_do_not_overflow(random, naive, run_kernel):
    inputs = make_inputs(random, (1, 1, 17, 33, 1, 64), torch.float16)
    inputs = replaced(inputs, q=inputs[0] * 40, ref_k=inputs[3] * 40, k=inputs[1] * 40)
    check(run_kernel(OPERATOR, inputs, 1), inputs, 1, naive)


def test_precisions_may_not_be_mixed(random, interpreter):
    inputs = make_inputs(random, (1, 1, 4, 4, 1, 16), torch.float16)
    with pytest.raises(TypeError, match=r"one dtype, not .*float16.*float32"):
        interpreter(OPERATOR, replaced(inputs, ref_k=inputs[3].float()), 1)
