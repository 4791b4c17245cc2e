"""The PyTorch baselines compute what the operators compute."""

import pytest
import torch

from benchmarks.kernels.attention_baselines import allowed_errors, baselines, is_within, worst_errors
from benchmarks.kernels.attention_cases import SelfCase

NAN = float("nan")


def test_every_baseline_is_the_same_function(tiny_cases, quick_compiler):
    names = []
    for case in tiny_cases:
        inputs = case.inputs(torch.float32, "cpu")
        wanted = case.definition(inputs)
        for baseline in baselines(case):
            names.append(baseline.name)
            found = baseline.prepare(inputs)()
            assert [tensor.shape for tensor in found] == [tensor.shape for tensor in wanted]
            assert is_within(worst_errors(found, wanted), [1e-5] * len(wanted)), baseline.name
        assert is_within(worst_errors(case.moma(inputs), wanted), [0.0] * len(wanted))
    plain, flex = ["sdpa", "sdpa_compiled"], ["flex_compiled"]
    assert names == ["sdpa", "definition", "sdpa_compiled", "definition_compiled", *plain, *plain, *flex]


@pytest.mark.parametrize("gate", ["soft", "open"])
@pytest.mark.parametrize("share", [0.1, 0.4, 1.0])
def test_packed_and_masked_are_the_same_function(tiny_cases, share, gate):
    level = tiny_cases[0].level
    masked = SelfCase(level, 2, gate, "masked", share)
    inputs = masked.inputs(torch.float32, "cpu")
    kept = inputs[5][0] != 0
    packed = (*inputs[:3], *(t[:, kept] for t in inputs[3:6]), *inputs[6:])
    (found,) = baselines(SelfCase(level, 2, gate, "packed", share))[0].prepare(packed)()
    torch.testing.assert_close(found, masked.definition(inputs)[0], rtol=0, atol=1e-5)


def test_errors_are_allowed_up_to_twice_pytorchs(tiny_cases):
    for case in tiny_cases:
        inputs = case.inputs(torch.float16, "cpu")
        wanted = case.definition(tuple(tensor.float() for tensor in inputs))
        plain = worst_errors(baselines(case)[0].prepare(inputs)(), wanted)
        allowed = allowed_errors(case, inputs, wanted)
        assert len(allowed) == len(wanted)
        for limit, error, output in zip(allowed, plain, wanted, strict=True):
            assert limit == max(2 * error, 2**-10 * float(output.abs().max()))


def test_nan_is_not_within_anything():
    assert is_within([0.5, 1.0], [0.5, 2.0])
    assert not is_within([0.5, 2.1], [0.5, 2.0])
    assert not is_within([NAN], [1.0])
    assert worst_errors((torch.tensor([1.0, NAN]),), (torch.ones(2),)) != [0.0]
