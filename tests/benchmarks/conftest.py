"""Fixtures that replace the GPU: operators run their definition on the CPU, and times are invented."""

import importlib.util
from collections.abc import Callable

import pytest
import torch

from benchmarks.kernels.attention_cases import Case, CrossCase, Level, SelfCase
from benchmarks.timer import Peaks, Timing

# A machine whose GPU is measured may lack diffusers.
_OF_DIFFUSERS = ["latency/test_original.py", "gpu/test_baselines.py", "gpu/test_denoiser.py"]
collect_ignore = [] if importlib.util.find_spec("diffusers") else _OF_DIFFUSERS

TINY = Level(4, 16, 3)


@pytest.fixture
def tiny_cases() -> list[Case]:
    """One case of each kind, at a level with 16 tokens and 16 channels."""
    return [
        CrossCase(TINY, 2, "soft"),
        SelfCase(TINY, 2, "soft", "packed", 0.4),
        SelfCase(TINY, 8, "open", "masked", 0.4),
    ]


@pytest.fixture
def fake_timer() -> Callable[..., Timing]:
    """A timer that runs a call once and reports samples of 0.5, 1 and 2 ms."""

    def measure(call: Callable[[], object]) -> Timing:
        call()
        return Timing((0.5, 1.0, 2.0), 0.0)

    return measure


@pytest.fixture
def peaks() -> Peaks:
    """Peaks of 1 TFLOP/s and 1 GB/s."""
    return Peaks(1e12, 1e9)


@pytest.fixture
def quick_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make torch.compile only trace: generating code takes seconds for each shape."""
    compile = torch.compile

    def traced(function, mode, **options):
        assert mode == "max-autotune-no-cudagraphs"
        return compile(function, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", traced)
