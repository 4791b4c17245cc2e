"""`moma::ContextCrossAttention`: the definition against naive float64, and ONNX against the definition."""

import numpy as np
import onnx
import onnx.reference
import pytest
import torch
import torch.nn.functional as F

from kernels.context_cross_attention.operator import context_cross_attention

CONTEXT_TOKENS = 4


@pytest.fixture
def inputs(shape, random):
    rows, width = shape.groups * shape.batch, shape.channels
    q = random(rows, shape.queries, width)
    text_k, text_v = (random(rows, shape.tokens, width) for _ in range(2))
    context_tokens = CONTEXT_TOKENS if shape.groups == 2 else 1
    context_k, context_v = (random(rows, context_tokens, width) for _ in range(2))
    gate = random(shape.batch, shape.queries).sigmoid()
    gate[:, ::3] = 0.0
    weights = (random(shape.batch, shape.tokens) > 0.5).float()
    weights[:, -1] = 1.0
    return q, text_k, text_v, context_k, context_v, gate, weights


def expected(naive, inputs, heads):
    q, text_k, text_v, context_k, context_v, gate, weights = inputs
    outputs, saliencies = [], []
    for row in range(len(q)):
        sample = row % len(gate)
        text, probabilities = naive(q[row], text_k[row], text_v[row], heads)
        context, _ = naive(q[row], context_k[row], context_v[row], heads)
        outputs.append(text + np.asarray(gate[sample].double())[:, None] * context)
        saliencies.append((probabilities @ np.asarray(weights[sample].double())).mean(0))
    return np.stack(outputs), np.stack(saliencies)


def composition(q, text_k, text_v, context_k, context_v, gate, weights, heads):
    """What a user of PyTorch would write."""
    groups = len(q) // len(gate)
    q, text_k, text_v, context_k, context_v = (
        t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, text_k, text_v, context_k, context_v)
    )
    text = F.scaled_dot_product_attention(q, text_k, text_v).transpose(1, 2).flatten(2)
    context = F.scaled_dot_product_attention(q, context_k, context_v).transpose(1, 2).flatten(2)
    probabilities = (q @ text_k.mT * q.shape[-1] ** -0.5).softmax(-1)
    saliency = (probabilities * weights.to(q.dtype).repeat(groups, 1)[:, None, None]).sum(-1).mean(1)
    return text + gate.to(q.dtype).repeat(groups, 1)[..., None] * context, saliency


def error(found, wanted):
    return float(np.abs(np.asarray(found, np.float64) - wanted).max())


def within_twice(found, plain, wanted, floor):
    for f, p, w in zip(found, plain, wanted, strict=True):
        assert error(f, w) <= 2 * error(p, w) + floor


def test_definition(shape, inputs, naive):
    wanted = expected(naive, inputs, shape.heads)
    found = context_cross_attention(*inputs, shape.heads)
    assert {t.dtype for t in found} == {torch.float32}
    within_twice(found, composition(*inputs, shape.heads), wanted, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_definition_in_half_precision(shape, inputs, naive, dtype):
    rounded = tuple(t.to(dtype) for t in inputs[:5]) + inputs[5:]
    wanted = expected(naive, rounded, shape.heads)
    found = context_cross_attention(*rounded, shape.heads)
    assert {t.dtype for t in found} == {dtype}
    plain = [t.float() for t in composition(*rounded, shape.heads)]
    within_twice([t.float() for t in found], plain, wanted, torch.finfo(dtype).eps)


def test_strided_inputs(shape, inputs):
    apart = tuple(torch.stack([t, t * float("nan")], dim=-1)[..., 0] for t in inputs)
    found = context_cross_attention(*apart, shape.heads)
    torch.testing.assert_close(found, context_cross_attention(*inputs, shape.heads))


def test_a_closed_gate_is_plain_attention(shape, inputs, naive):
    q, text_k, text_v, *rest, gate, weights = inputs
    found, _ = context_cross_attention(q, text_k, text_v, *rest, gate * 0, weights, shape.heads)
    plain = np.stack([naive(q[row], text_k[row], text_v[row], shape.heads)[0] for row in range(len(q))])
    assert error(found, plain) <= 1e-5


def test_all_weights_make_a_saliency_of_one(shape, inputs):
    *rest, weights = inputs
    _, saliency = context_cross_attention(*rest, torch.ones_like(weights), shape.heads)
    torch.testing.assert_close(saliency, torch.ones_like(saliency))


def test_no_weights_make_a_saliency_of_zero(shape, inputs, run_onnx):
    *rest, weights = inputs
    case = (*rest, weights * 0)
    assert not context_cross_attention(*case, shape.heads)[1].any()
    assert not run_onnx(context_cross_attention, case, shape.heads)[0][1].any()


def test_samples_do_not_reach_each_other(shape, inputs, run_onnx):
    *rest, gate, weights = inputs
    gate, weights = gate.clone(), weights.clone()
    gate[0] = weights[0] = torch.nan
    poisoned = (*rest, gate, weights)
    first = np.arange(len(rest[0])) % shape.batch == 0
    for found, wanted in (
        [context_cross_attention(*case, shape.heads) for case in (poisoned, inputs)],
        [run_onnx(context_cross_attention, case, shape.heads)[0] for case in (poisoned, inputs)],
    ):
        for f, w in zip(map(np.asarray, found), map(np.asarray, wanted), strict=True):
            assert np.isnan(f[first]).all()
            assert np.array_equal(f[~first], w[~first])


def test_the_context_branch_leaves_the_saliency_alone(shape, inputs, run_onnx):
    q, text_k, text_v, context_k, context_v, gate, weights = inputs
    other = (q, text_k, -text_v, context_k + 1, context_v * 3, gate * 0.5, weights)
    assert torch.equal(
        context_cross_attention(*other, shape.heads)[1], context_cross_attention(*inputs, shape.heads)[1]
    )
    found, wanted = (run_onnx(context_cross_attention, case, shape.heads)[0][1] for case in (other, inputs))
    assert np.array_equal(found, wanted)


@pytest.mark.parametrize(("rows", "samples"), [(3, 2), (1, 2)])
def test_refuses_rows_that_are_no_whole_groups(random, rows, samples):
    q = random(rows, 5, 8)
    with pytest.raises(ValueError, match=f"{rows} rows, which is no multiple of {samples}"):
        context_cross_attention(q, q, q, q, q, torch.ones(samples, 5), torch.ones(samples, 5), 2)


def test_the_specification_agrees(shape, inputs, naive, sized):
    model = sized(context_cross_attention, inputs, shape.heads)
    feed = {i.name: t.numpy() for i, t in zip(model.graph.input, inputs, strict=True)}
    found = onnx.reference.ReferenceEvaluator(model).run(None, feed)
    wanted = expected(naive, inputs, shape.heads)
    within_twice(found, context_cross_attention(*inputs, shape.heads), wanted, 1e-6)


def test_onnx(shape, inputs, naive, run_onnx):
    wanted = expected(naive, inputs, shape.heads)
    found, _ = run_onnx(context_cross_attention, inputs, shape.heads)
    within_twice(found, context_cross_attention(*inputs, shape.heads), wanted, 1e-6)


def test_onnx_in_fp16(random, naive, run_onnx):
    q, text_k, text_v = random(2, 63, 320), random(2, 77, 320), random(2, 77, 320)
    context_k, context_v = random(2, CONTEXT_TOKENS, 320), random(2, CONTEXT_TOKENS, 320)
    gate, weights = random(1, 63).sigmoid(), torch.zeros(1, 77)
    weights[:, [4, 7]] = 1.0
    case = tuple(t.half() for t in (q, text_k, text_v, context_k, context_v, gate, weights))
    wanted = expected(naive, case, 8)
    found, _ = run_onnx(context_cross_attention, case, 8)
    assert {array.dtype for array in found} == {np.dtype(np.float16)}
    within_twice(found, [t.float() for t in context_cross_attention(*case, 8)], wanted, 2**-10)


def test_torch_operator_contract(shape, inputs):
    torch.library.opcheck(
        torch.ops.moma.context_cross_attention.default,
        (*inputs, shape.heads),
    )
