"""`moma::InjectedSelfAttention`: the definition against naive float64, and ONNX against the definition."""

import numpy as np
import onnx
import onnx.reference
import pytest
import torch
import torch.nn.functional as F

from kernels.injected_self_attention.operator import injected_self_attention

HALF_PRECISIONS = [torch.float16, torch.bfloat16]


@pytest.fixture
def inputs(shape, random):
    rows, width = shape.groups * shape.batch, shape.channels
    q, k, v = (random(rows, shape.queries, width) for _ in range(3))
    ref_k, ref_v = (random(shape.batch, shape.tokens, width) for _ in range(2))
    mask = (random(shape.batch, shape.tokens) > 0).float()
    mask[:, 0] = 1.0
    gate = random(shape.batch, shape.queries).sigmoid()
    gate[:, ::3] = 0.0
    return q, k, v, ref_k, ref_v, mask, gate, torch.tensor([0.7])


def expected(naive, inputs, heads):
    q, k, v, ref_k, ref_v, mask, gate, scale = inputs
    out = []
    for row in range(len(q)):
        sample = row % len(ref_k)
        own, _ = naive(q[row], k[row], v[row], heads)
        injected, _ = naive(q[row], ref_k[sample], ref_v[sample], heads, np.asarray(mask[sample] != 0))
        out.append(own + float(scale) * np.asarray(gate[sample].double())[:, None] * injected)
    return np.stack(out)


def composition(q, k, v, ref_k, ref_v, mask, gate, scale, heads):
    """What a user of PyTorch would write."""
    groups = len(q) // len(ref_k)

    def attend(q, k, v, keep=None):
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keep).transpose(1, 2).flatten(2)

    keep = (mask != 0).repeat(groups, 1)[:, None, None]
    injected = attend(q, ref_k.repeat(groups, 1, 1), ref_v.repeat(groups, 1, 1), keep)
    return attend(q, k, v) + (gate * scale).to(q.dtype).repeat(groups, 1)[..., None] * injected


def error(found, wanted):
    return float(np.abs(np.asarray(found, np.float64) - wanted).max())


def test_definition(shape, inputs, naive):
    wanted = expected(naive, inputs, shape.heads)
    found = injected_self_attention(*inputs, shape.heads)
    assert found.dtype == torch.float32
    assert error(found, wanted) <= 2 * error(composition(*inputs, shape.heads), wanted) + 1e-6


@pytest.mark.parametrize("dtype", HALF_PRECISIONS, ids=str)
def test_definition_in_half_precision(shape, inputs, naive, dtype):
    rounded = tuple(t.to(dtype) for t in inputs[:5]) + inputs[5:]
    wanted = expected(naive, rounded, shape.heads)
    found = injected_self_attention(*rounded, shape.heads)
    assert found.dtype == dtype
    allowed = 2 * error(composition(*rounded, shape.heads).float(), wanted) + torch.finfo(dtype).eps
    assert error(found.float(), wanted) <= allowed


def test_strided_inputs(shape, inputs):
    apart = tuple(torch.stack([t, t * float("nan")], dim=-1)[..., 0] for t in inputs)
    assert not apart[0].is_contiguous() or apart[0].numel() == 1
    torch.testing.assert_close(
        injected_self_attention(*apart, shape.heads), injected_self_attention(*inputs, shape.heads)
    )


@pytest.mark.parametrize("which", ["gate", "scale"])
def test_no_injection_is_plain_attention(shape, inputs, naive, which):
    q, k, v, ref_k, ref_v, mask, gate, scale = inputs
    gate, scale = (gate * 0, scale) if which == "gate" else (gate, scale * 0)
    found = injected_self_attention(q, k, v, ref_k, ref_v, mask, gate, scale, shape.heads)
    plain = np.stack([naive(q[row], k[row], v[row], shape.heads)[0] for row in range(len(q))])
    assert error(found, plain) <= 1e-5


def test_tokens_outside_the_mask_take_no_part(shape, inputs):
    q, k, v, ref_k, ref_v, mask, gate, scale = inputs
    outside = (mask == 0)[..., None]
    other_k, other_v = torch.where(outside, 3.0, ref_k), torch.where(outside, -5.0, ref_v)
    found = injected_self_attention(q, k, v, other_k, other_v, mask, gate, scale, shape.heads)
    assert torch.equal(found, injected_self_attention(*inputs, shape.heads))


def without_tokens(inputs):
    """Inputs as enrollment stores them for a grid without a token inside the mask: zero keys, and a full mask."""
    q, k, v, ref_k, ref_v, mask, gate, scale = inputs
    return q, k, v, torch.zeros_like(ref_k), ref_v, torch.ones_like(mask), gate, scale


def test_zero_keys_are_the_uniform_average(shape, inputs, naive):
    q, k, v, _, ref_v, _, gate, scale = inputs
    found = injected_self_attention(*without_tokens(inputs), shape.heads)
    for row in range(len(q)):
        sample = row % len(ref_v)
        own, _ = naive(q[row], k[row], v[row], shape.heads)
        average = np.asarray(ref_v[sample].double()).mean(0)
        wanted = own + float(scale) * np.asarray(gate[sample].double())[:, None] * average
        assert error(found[row], wanted) <= 1e-5


def test_only_whether_a_mask_value_is_zero_matters(shape, inputs, run_onnx):
    q, k, v, ref_k, ref_v, mask, gate, scale = inputs
    values = torch.tensor([-2.0, 0.25, 1e-6, 100.0]).repeat(mask.numel())[: mask.numel()].reshape(mask.shape)
    weighted = (q, k, v, ref_k, ref_v, mask * values, gate, scale)
    assert torch.equal(injected_self_attention(*weighted, shape.heads), injected_self_attention(*inputs, shape.heads))
    (found,), _ = run_onnx(injected_self_attention, weighted, shape.heads)
    (wanted,), _ = run_onnx(injected_self_attention, inputs, shape.heads)
    assert np.array_equal(found, wanted)


def test_onnx_tokens_outside_the_mask_take_no_part(shape, inputs, run_onnx):
    q, k, v, ref_k, ref_v, mask, gate, scale = inputs
    outside = (mask == 0)[..., None]
    other = (q, k, v, torch.where(outside, 30.0, ref_k), torch.where(outside, -500.0, ref_v), mask, gate, scale)
    (found,), _ = run_onnx(injected_self_attention, other, shape.heads)
    (wanted,), _ = run_onnx(injected_self_attention, inputs, shape.heads)
    assert np.array_equal(found, wanted)


def test_one_token_inside_gives_its_value(shape, inputs, run_onnx):
    q, k, v, ref_k, ref_v, mask, gate, scale = inputs
    last = torch.zeros_like(mask)
    last[:, -1] = 1.0
    case = (q, k, v, ref_k, ref_v, last, gate, scale)
    weight = (gate * scale).repeat(shape.groups, 1)[..., None]
    wanted = weight * ref_v[:, -1:].repeat(shape.groups, 1, 1)
    nothing = (q, k, v, ref_k, ref_v, last, gate, scale * 0)
    injected = injected_self_attention(*case, shape.heads) - injected_self_attention(*nothing, shape.heads)
    torch.testing.assert_close(injected, wanted, rtol=0, atol=1e-5)
    ((found,), _), ((own,), _) = (run_onnx(injected_self_attention, c, shape.heads) for c in (case, nothing))
    torch.testing.assert_close(torch.from_numpy(found - own), wanted, rtol=0, atol=1e-5)


def test_samples_do_not_reach_each_other(shape, inputs, run_onnx):
    q, k, v, ref_k, ref_v, mask, gate, scale = inputs
    other_k, other_v, other_gate = (t.clone() for t in (ref_k, ref_v, gate))
    for tensor in (other_k, other_v, other_gate):
        tensor[0] = torch.nan
    poisoned = (q, k, v, other_k, other_v, mask, other_gate, scale)
    first = np.arange(len(q)) % shape.batch == 0
    for found, wanted in (
        [np.asarray(injected_self_attention(*case, shape.heads)) for case in (poisoned, inputs)],
        [run_onnx(injected_self_attention, case, shape.heads)[0][0] for case in (poisoned, inputs)],
    ):
        assert np.isnan(found[first]).all()
        assert np.array_equal(found[~first], wanted[~first])


@pytest.mark.parametrize(("rows", "samples"), [(3, 2), (1, 2)])
def test_refuses_rows_that_are_no_whole_groups(random, rows, samples):
    q, ref = random(rows, 5, 8), random(samples, 6, 8)
    with pytest.raises(ValueError, match=f"{rows} rows, which is no multiple of {samples}"):
        injected_self_attention(q, q, q, ref, ref, torch.ones(samples, 6), torch.ones(samples, 5), torch.ones(1), 2)


def test_the_specification_agrees(shape, inputs, naive, sized):
    model = sized(injected_self_attention, inputs, shape.heads)
    feed = {i.name: t.numpy() for i, t in zip(model.graph.input, inputs, strict=True)}
    found = onnx.reference.ReferenceEvaluator(model).run(None, feed)
    wanted = expected(naive, inputs, shape.heads)
    assert error(found[0], wanted) <= 2 * error(injected_self_attention(*inputs, shape.heads), wanted) + 1e-6


def test_onnx(shape, inputs, naive, run_onnx):
    for case in (inputs, without_tokens(inputs)):
        wanted = expected(naive, case, shape.heads)
        (found,), _ = run_onnx(injected_self_attention, case, shape.heads)
        assert error(found, wanted) <= 2 * error(injected_self_attention(*case, shape.heads), wanted) + 1e-6


def test_onnx_in_fp16(random, naive, run_onnx):
    q, k, v = (random(2, 63, 320).half() for _ in range(3))
    ref_k, ref_v = random(1, 111, 320).half(), random(1, 111, 320).half()
    mask = (random(1, 111) > 0).half()
    case = (q, k, v, ref_k, ref_v, mask, random(1, 63).sigmoid().half(), torch.tensor([0.5]).half())
    wanted = expected(naive, case, 8)
    (found,), _ = run_onnx(injected_self_attention, case, 8)
    assert found.dtype == np.float16
    assert error(found, wanted) <= 2 * error(injected_self_attention(*case, 8).float(), wanted) + 2**-10


def test_torch_operator_contract(shape, inputs):
    torch.library.opcheck(
        torch.ops.moma.injected_self_attention.default,
        (*inputs, shape.heads),
    )
