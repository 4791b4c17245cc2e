"""Tuning the launches without a GPU: which are tried, and which is chosen."""

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

import triton

from benchmarks.kernels import tuning
from benchmarks.kernels.attention_cases import HEADS, SD15_LEVELS
from benchmarks.kernels.tuning import (
    Attempt,
    Compiled,
    Device,
    candidates,
    compile_all,
    compile_attempt,
    entries,
    tuned,
)
from benchmarks.timer import Timing
from kernels.launch import (
    PORTABLE_SHARED_BYTES,
    AttentionShape,
    LaunchConfig,
    cross_attention_launch,
    self_attention_launch,
    split_width,
)

CAPABILITIES = (80, 86, 89, 90, 100, 120)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_an_entry_is_one_choice_for_all_its_levels(capability):
    found = entries(capability)
    for is_cross in (False, True):
        levels = [level for entry in found if entry.is_cross == is_cross for level in entry.levels]
        assert levels == list(SD15_LEVELS)
    for entry in found:
        for level in entry.levels:
            shape = AttentionShape(level.tokens, level.channels // HEADS, 2)
            best = cross_attention_launch(shape) if entry.is_cross else self_attention_launch(shape, capability)
            portable = best if entry.is_cross else self_attention_launch(shape, capability, portable=True)
            assert entry.present(capability) == (best, portable)
        assert not entry.is_portable or best == portable


def test_entries_are_named_after_the_tables_that_choose(monkeypatch):
    from kernels import launch

    for capability in CAPABILITIES:
        for entry in entries(capability):
            table, _, key = entry.name.rstrip("]").partition("[")
            choice = getattr(launch, table)
            choice = choice[int(key)] if key else choice
            assert entry.present(capability)[0] == (choice if entry.is_portable else choice[0])


@pytest.mark.parametrize("shared_limit", [101376, 232448])
def test_candidates(shared_limit):
    for entry in entries(90):
        found = list(candidates(entry, shared_limit))
        assert 20 < len(found) == len(set(found)) < 100
        for config in found:
            columns = max(sum(split_width(level.channels // HEADS)) for level in entry.levels)
            assert config.block_queries * columns / (32 * config.num_warps) <= 100
            assert (config.num_stages - 1) * config.block_tokens * columns * 4 <= shared_limit


def test_compiling_a_launch_returns_its_shared_memory(tiny_cases, monkeypatch):
    def launched(case, inputs, config):
        triton.knobs.compilation.listener(metadata={"shared": 1024 * config.num_stages}, cache_hit=False)

    monkeypatch.setattr(tuning, "launched", launched)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(type(tiny_cases[0]), "inputs", lambda self, dtype, device: ())
    attempt = Attempt(tiny_cases[0], LaunchConfig(16, 16, 4, 3), torch.float16)
    before = triton.knobs.compilation.listener
    assert compile_attempt(attempt) == Compiled(3072)
    assert triton.knobs.compilation.listener is before


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the launch succeeds")
def test_a_launch_that_fails_is_an_outcome(tiny_cases):
    attempts = [Attempt(case, LaunchConfig(16, 16, 4, 1), torch.float16) for case in tiny_cases[:2]]
    first, second = compile_all(attempts)
    assert first.shared_bytes == second.shared_bytes == 0
    assert "CUDA" in first.refused
    assert "\n" not in first.refused


FAST, PORTABLE, WRONG, REFUSED = (LaunchConfig(64, tokens, 4, 2) for tokens in (16, 32, 64, 128))


@pytest.fixture
def fake_launches(tiny_cases, monkeypatch):
    """Four launches of two entries: fast, portable, wrong, refused; the present one takes 3 ms. Returns the timer."""
    level = tiny_cases[0].level
    seconds = {FAST: 1.0, PORTABLE: 2.0, WRONG: 0.5}
    last = []

    def compiled(attempts):
        shared = {FAST: PORTABLE_SHARED_BYTES + 1}
        return [
            Compiled(0, "out of resource") if a.config == REFUSED else Compiled(shared.get(a.config, 1024))
            for a in attempts
        ]

    def launched(case, inputs, config):
        assert config != REFUSED
        last.append(config)
        return tuple(tensor * (2 if config == WRONG else 1) for tensor in case.definition(inputs))

    def timer(call):
        call()
        return Timing((seconds.get(last[-1], 3.0),), 0.0)

    monkeypatch.setattr(tuning, "candidates", lambda entry, shared: iter([FAST, PORTABLE, WRONG, REFUSED]))
    monkeypatch.setattr(tuning, "compile_all", compiled)
    monkeypatch.setattr(tuning, "launched", launched)
    small = dataclasses.replace(level, layers=1)
    own, cross = (
        dataclasses.replace(entry, levels=(level, small) if entry.is_cross else (level,))
        for entry in (entries(90)[0], entries(90)[-1])
    )
    monkeypatch.setattr(tuning, "entries", lambda capability: (own, cross))
    return timer


def test_the_fastest_right_launch_is_chosen(fake_launches, capsys):
    own, cross = tuned(fake_launches, torch.float16, Device("cpu", 90, 232448))
    best, portable = own["choices"]
    # Three layers: at a millisecond each, at two, and at the present three.
    assert (best["launch"], best["step_ms"], best["present_ms"], best["gain"]) == ((64, 16, 4, 2), 3.0, 9.0, 3.0)
    assert (portable["launch"], portable["step_ms"], portable["gain"]) == ((64, 32, 4, 2), 6.0, 1.5)
    (choice,) = cross["choices"]
    # Three layers of one level and one of another.
    assert (choice["launch"], choice["step_ms"], choice["present_ms"]) == ((64, 32, 4, 2), 8.0, 12.0)
    outcomes = {tuple(one["launch"]): one for one in own["tried"]}
    assert outcomes[64, 128, 4, 2]["refused"] == "out of resource"
    assert outcomes[64, 64, 4, 2]["refused"].startswith("off by [")
    assert outcomes[64, 16, 4, 2]["shared_bytes"] == PORTABLE_SHARED_BYTES + 1
    tuning.print_tuning([own, cross])
    assert capsys.readouterr().out.splitlines() == [
        "_SELF_WGMMA[48]: (LaunchConfig(64, 16, 4, 2), LaunchConfig(64, 32, 4, 2))  # 3.00x and 1.50x as fast as now",
        "_CROSS[160]: LaunchConfig(64, 32, 4, 2)  # 1.50x as fast as now",
    ]


def test_this_device(monkeypatch):
    class Properties:
        major, minor, shared_memory_per_block_optin = 8, 9, 101376

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: Properties)
    assert tuning.this_device() == Device("cuda", 89, 101376)
