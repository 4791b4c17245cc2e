"""A stand-in for the GPU: operators run their definition on the CPU, and times are made up."""

import importlib.util
from collections.abc import Callable

import pytest
import torch

from benchmarks.kernels.attention_cases import Case, CrossCase, Level, SelfCase
from benchmarks.timer import Peaks, Timing

# A machine whose GPU is to be measured may lack it.
_OF_DIFFUSERS = ["test_original.py", "gpu/test_baselines.py", "gpu/test_denoiser.py"]
collect_ignore = [] if importlib.util.find_spec("diffusers") else _OF_DIFFUSERS

TINY = Level(4, 16, 3)


@pytest.fixture
def tiny_cases() -> list[Case]:
    """One of each kind, at a level with 16 tokens and 16 channels."""
    return [
        CrossCase(TINY, 2, "soft"),
        SelfCase(TINY, 2, "soft", "packed", 0.4),
        SelfCase(TINY, 8, "open", "masked", 0.4),
    ]


@pytest.fixture
def fake_timer() -> Callable[..., Timing]:
    """Runs a call once and says that it took a millisecond, a little less and a little more."""

    def measure(call: Callable[[], object]) -> Timing:
        call()
        return Timing((0.5, 1.0, 2.0), 0.0)

    return measure


@pytest.fixture
def peaks() -> Peaks:
    """A device of a teraflop and a gigabyte a second."""
    return Peaks(1e12, 1e9)


@pytest.fixture
def quick_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile traces, and generates no code: that takes seconds a shape."""
    compile = torch.compile

    def traced(function, mode, **options):
        assert mode == "max-autotune-no-cudagraphs"
        return compile(function, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", traced)
