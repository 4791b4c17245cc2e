"""The measured attention cases: sizes, masks, gates, and the counted operations and bytes."""

import math

import pytest
import torch

from benchmarks.kernels.attention_cases import (
    HEADS,
    SD15_LEVELS,
    CrossCase,
    Level,
    SelfCase,
    all_cases,
    blob,
    covered,
    in_summary,
)
from benchmarks.timer import Work
from kernels.ptx import SD15_LAYERS

LEVEL = Level(4, 16, 3)


def test_the_levels_are_those_of_sd15():
    assert sum(level.layers for level in SD15_LEVELS) == 16
    sizes = {(level.tokens, level.channels // HEADS) for level in SD15_LEVELS}
    assert sizes == {(layer.queries, layer.width) for layer in SD15_LAYERS}


def test_every_case_once_and_those_of_the_summary_first():
    cases = all_cases()
    # Rows, gates, levels: the cross-attention, and the self-attention in two forms with three masks.
    assert len(cases) == len(set(cases)) == 2 * 2 * 4 * (1 + 2 * 3)
    counted = [in_summary(case) for case in cases]
    assert counted == sorted(counted, reverse=True)
    # Gates, levels: the cross-attention, and the self-attention in two forms.
    assert sum(counted) == 2 * 4 * (1 + 2)


@pytest.mark.parametrize(("share", "count"), [(0.1, 2), (0.4, 7), (0.5, 8), (1.0, 16)])
def test_a_blob_covers_its_share_around_the_middle(share, count):
    inside = blob(4, share).reshape(4, 4)
    assert inside.sum() == covered(16, share) == count
    assert inside[1, 1]
    # No token outside is nearer to the middle than one inside.
    axis = torch.arange(4) - 1.5
    distance = axis[:, None] ** 2 + axis**2
    assert count == 16 or distance[inside].max() <= distance[~inside].min()


def test_shares_of_the_real_sizes_are_rounded_up():
    assert [covered(4096, share) for share in (0.1, 0.4, 1.0)] == [410, 1639, 4096]
    assert [covered(64, share) for share in (0.1, 0.4, 1.0)] == [7, 26, 64]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gates(dtype):
    soft, whole = (CrossCase(LEVEL, 8, gate).inputs(dtype, "cpu")[5] for gate in ("soft", "open"))
    assert soft.shape == whole.shape == (4, 16)
    assert soft.dtype == dtype
    assert torch.equal(soft != 0, blob(4, 0.5).expand(4, 16))
    assert (whole > 0).all()
    assert whole.max() <= 1
    assert whole.unique().numel() > 8
    assert CrossCase(LEVEL, 8, "soft").open_queries == 8
    assert CrossCase(LEVEL, 8, "open").open_queries == 16


def test_whole_blocks_of_queries_are_closed_at_the_largest_level():
    gate = SelfCase(SD15_LEVELS[0], 2, "soft", "packed", 0.1).inputs(torch.float16, "cpu")[6]
    blocks = gate.reshape(-1, 128).any(-1)
    assert not blocks.all()
    assert blocks.any()


@pytest.mark.parametrize("share", [0.1, 0.4, 1.0])
def test_packed_and_masked_hold_the_same_number_of_tokens(share):
    packed, masked = (
        SelfCase(LEVEL, 8, "soft", form, share).inputs(torch.float16, "cpu") for form in ("packed", "masked")
    )
    kept = covered(16, share)
    assert [tuple(tensor.shape) for tensor in packed] == [
        *[(8, 16, 16)] * 3,
        *[(4, kept, 16)] * 2,
        (4, kept),
        (4, 16),
        (1,),
    ]
    assert [tuple(tensor.shape) for tensor in masked[3:6]] == [(4, 16, 16), (4, 16, 16), (4, 16)]
    assert (packed[5] == 1).all()
    assert torch.equal(masked[5] != 0, blob(4, share).expand(4, 16))


def test_inputs_are_random_and_the_same_every_time(tiny_cases):
    for case in tiny_cases:
        first, second = (case.inputs(torch.float16, "cpu") for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert not torch.equal(first[1], first[2])
        assert all(tensor.isfinite().all() for tensor in first)


def test_work_of_the_self_attention():
    # Own: 4 · 2 rows · 16 · 16 · 16. Reference: 4 · 2 rows · 8 open queries · 7 tokens · 16.
    operations = 32768 + 7168
    # q, k, v, output; keys and values of 7 tokens; mask and gates; scale.
    assert SelfCase(LEVEL, 2, "soft", "packed", 0.4).work() == Work(operations, 2 * (2048 + 224 + 7 + 16 + 1))
    assert SelfCase(LEVEL, 2, "soft", "masked", 0.4).work() == Work(operations, 2 * (2048 + 224 + 16 + 16 + 1))
    assert SelfCase(LEVEL, 8, "open", "packed", 1.0).work() == Work(2 * 4 * 32768, 2 * (8192 + 2048 + 64 + 64 + 1))


def test_work_of_the_cross_attention():
    # Text: 4 · 2 · 16 · 77 · 16. Context: 4 · 2 · 8 open · 4 · 16. Saliency: 2 · 2 rows · 8 heads · 16 · 77.
    operations = 157696 + 4096 + 39424
    # q and output; text and context; gates and weights; saliency.
    assert CrossCase(LEVEL, 2, "soft").work() == Work(operations, 2 * (1024 + 4928 + 256 + 16 + 77 + 32))


def test_work_at_the_real_size():
    work = SelfCase(SD15_LEVELS[0], 2, "open", "packed", 1.0).work()
    assert work.operations == 85_899_345_920
    assert math.isclose(work.bytes, 2 * 5 * 2 * 4096 * 320, rel_tol=1e-3)
