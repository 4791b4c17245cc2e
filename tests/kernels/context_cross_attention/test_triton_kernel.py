"""The kernel of `moma::ContextCrossAttention`: no further from float64 than twice what PyTorch is in its precision."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kernels.launch import LaunchConfig

OPERATOR = "context_cross_attention"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Groups, samples, queries, text tokens, context tokens, heads, head width.
SIZES = [
    (1, 1, 1, 1, 1, 1, 2),
    (2, 3, 63, 7, 4, 2, 4),
    (1, 2, 33, 77, 4, 3, 40),
    (2, 1, 64, 77, 4, 1, 80),
    (2, 2, 17, 33, 5, 2, 160),
    (2, 1, 33, 111, 16, 1, 64),
    (1, 1, 31, 63, 17, 2, 128),
]


def make_inputs(random, sizes, dtype):
    groups, batch, queries, text_tokens, context_tokens, heads, width = sizes
    rows, channels = groups * batch, heads * width
    q = random(rows, queries, channels).to(dtype)
    text = [random(rows, text_tokens, channels).to(dtype) for _ in range(2)]
    context = [random(rows, context_tokens, channels).to(dtype) for _ in range(2)]
    gate = random(batch, queries).sigmoid().to(dtype)
    gate[:, ::3] = 0.0
    weights = (random(batch, text_tokens) > 0.5).to(dtype)
    weights[:, -1] = 1.0
    return (q, *text, *context, gate, weights)


def replaced(inputs, **changes):
    names = ("q", "text_k", "text_v", "context_k", "context_v", "gate", "weights")
    return tuple(changes.get(name, tensor) for name, tensor in zip(names, inputs, strict=True))


def expected(naive, inputs, heads):
    """In float64."""
    q, text_k, text_v, context_k, context_v, gate, weights = inputs
    outputs, saliencies = [], []
    for row in range(len(q)):
        sample = row % len(gate)
        text, probabilities = naive(q[row], text_k[row], text_v[row], heads)
        context, _ = naive(q[row], context_k[row], context_v[row], heads)
        outputs.append(text + np.asarray(gate[sample].double())[:, None] * context)
        saliencies.append((probabilities @ np.asarray(weights[sample].double())).mean(0))
    return np.stack(outputs), np.stack(saliencies)


def composition(inputs, heads):
    """What a user of PyTorch would write, in the inputs' precision."""
    q, text_k, text_v, context_k, context_v, gate, weights = inputs
    groups = len(q) // len(gate)
    q, text_k, text_v, context_k, context_v = (
        t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, text_k, text_v, context_k, context_v)
    )
    text = F.scaled_dot_product_attention(q, text_k, text_v).transpose(1, 2).flatten(2)
    context = F.scaled_dot_product_attention(q, context_k, context_v).transpose(1, 2).flatten(2)
    probabilities = (q @ text_k.mT * q.shape[-1] ** -0.5).softmax(-1)
    saliency = (probabilities * weights.repeat(groups, 1)[:, None, None]).sum(-1).mean(1)
    return text + gate.repeat(groups, 1)[..., None] * context, saliency


def check(found, inputs, heads, naive):
    """Each output at most twice PyTorch's error away, or the rounding of the largest value."""
    q = inputs[0]
    assert [t.shape for t in found] == [q.shape, q.shape[:2]]
    assert {t.dtype for t in found} == {q.dtype}
    for output, plain, wanted in zip(found, composition(inputs, heads), expected(naive, inputs, heads), strict=True):
        error = np.abs(np.asarray(output.double()) - wanted)
        allowed = max(
            2 * np.abs(np.asarray(plain.double()) - wanted).max(), torch.finfo(q.dtype).eps * np.abs(wanted).max()
        )
        worst = np.unravel_index(error.argmax(), error.shape)
        assert not np.isnan(error).any(), "memory that was not written, or NaN that was computed"
        assert error.max() <= allowed, f"off by {error.max():.3g} at {worst}; {allowed:.3g} is allowed"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_equals_the_definition(sizes, dtype, random, naive, run_kernel):
    inputs, heads = make_inputs(random, sizes, dtype), sizes[5]
    check(run_kernel(OPERATOR, inputs, heads), inputs, heads, naive)


@pytest.mark.parametrize("blocks", [(16, 16), (32, 64), (64, 32), (128, 128)], ids=str)
def test_every_block_size(blocks, random, naive, interpreter):
    inputs = make_inputs(random, (2, 1, 63, 77, 4, 2, 40), torch.float16)
    check(interpreter(OPERATOR, inputs, 2, LaunchConfig(*blocks, 4, 2)), inputs, 2, naive)


def test_a_closed_gate_is_not_read(random, naive, run_kernel):
    inputs = make_inputs(random, (2, 1, 40, 77, 4, 1, 40), torch.float16)
    closed = replaced(inputs, gate=torch.zeros_like(inputs[5]))
    unreadable = replaced(closed, context_k=inputs[3] * torch.nan, context_v=inputs[4] * torch.nan)
    found = run_kernel(OPERATOR, unreadable, 1)
    check(found, closed, 1, naive)


def test_a_closed_gate_skips_only_its_own_block(random, run_kernel):
    inputs = make_inputs(random, (1, 1, 150, 7, 4, 1, 16), torch.float16)
    gate = inputs[5].clone()
    gate[:, :64] = 0.0
    found, saliency = run_kernel(OPERATOR, replaced(inputs, gate=gate, context_v=inputs[4] * torch.nan), 1)
    assert not found[:, :64].isnan().any()
    assert found[:, 149].isnan().all()
    assert not saliency.isnan().any()


def test_all_weights_make_a_saliency_of_one(random, run_kernel):
    inputs = make_inputs(random, (2, 1, 33, 77, 4, 2, 40), torch.float16)
    _, saliency = run_kernel(OPERATOR, replaced(inputs, weights=torch.ones_like(inputs[6])), 2)
    torch.testing.assert_close(saliency, torch.ones_like(saliency), rtol=0, atol=2**-10)


def test_no_weights_make_a_saliency_of_zero(random, run_kernel):
    inputs = make_inputs(random, (2, 1, 33, 77, 4, 2, 40), torch.float16)
    _, saliency = run_kernel(OPERATOR, replaced(inputs, weights=torch.zeros_like(inputs[6])), 2)
    assert not saliency.any()


def test_strided_inputs(random, run_kernel):
    inputs = make_inputs(random, (2, 2, 17, 33, 4, 2, 40), torch.float16)
    apart = tuple(torch.stack([t, t * torch.nan], dim=-1)[..., 0] for t in inputs)
    assert not any(t.is_contiguous() for t in apart)
    for found, wanted in zip(run_kernel(OPERATOR, apart, 2), run_kernel(OPERATOR, inputs, 2), strict=True):
        assert torch.equal(found, wanted)


def test_samples_do_not_reach_each_other(random, run_kernel):
    inputs = make_inputs(random, (2, 2, 17, 33, 4, 1, 40), torch.float16)
    gate, weights = inputs[5].clone(), inputs[6].clone()
    gate[0] = weights[0] = torch.nan
    poisoned = run_kernel(OPERATOR, replaced(inputs, gate=gate, weights=weights), 1)
    for found, wanted in zip(poisoned, run_kernel(OPERATOR, inputs, 1), strict=True):
        assert found[::2].isnan().all()
        assert torch.equal(found[1::2], wanted[1::2])


def test_precisions_may_not_be_mixed(random, interpreter):
    inputs = make_inputs(random, (1, 1, 4, 4, 4, 1, 16), torch.float16)
    with pytest.raises(TypeError, match=r"one dtype, not .*float16.*float32"):
        interpreter(OPERATOR, replaced(inputs, text_v=inputs[2].float()), 1)
