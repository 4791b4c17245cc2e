"""Differences between pictures, and the host's time for replays of CUDA graphs."""

import numpy as np
import pytest

from benchmarks.latency.agreement import agreement, replays
from benchmarks.latency.requests import RUNTIME, Answer
from benchmarks.picture_difference import difference, psnr


def grey(value: int, size: int = 4) -> np.ndarray:
    return np.full((size, size, 3), value, np.uint8)


def answer(value: int, replay_seconds: float | None = None) -> Answer:
    return Answer(1.0, {}, grey(value), np.zeros((4, 4), np.float32), replay_seconds)


def test_difference():
    assert difference(grey(3), grey(250)) == difference(grey(250), grey(3)) == 247
    one = grey(7)
    one[1, 2, 0] = 9
    assert difference(one, grey(7)) == 2
    assert difference(grey(7), grey(7, size=5)) == 255


def test_psnr():
    assert psnr(grey(100), grey(100)) == 100.0
    assert psnr(grey(100), grey(101)) == pytest.approx(48.13, abs=0.01)
    assert psnr(grey(100), grey(0)) == pytest.approx(8.13, abs=0.01)


def test_agreement_is_that_of_the_worst_pair():
    eager = [answer(100), answer(110)]
    eager[0].foreground_mask[0, 0] = 0.8
    ours = [answer(100), answer(100)]
    found = agreement({RUNTIME: ours, "eager": eager, "plain": [answer(0), answer(0)]})
    assert found == {"psnr_db": 28.1, "foreground_difference": 0.05}
    compiled = [answer(100), answer(200)]
    assert agreement({RUNTIME: ours, "eager": eager, "compiled": compiled})["psnr_db"] == 8.1
    assert agreement({RUNTIME: ours, "compiled": ours})["psnr_db"] == 100.0
    assert agreement({RUNTIME: ours, "plain": eager}) is None


def test_replay_times_are_given_per_step():
    warm = [answer(100, 100e-6), answer(50, 300e-6)]
    found = replays({"cold": [answer(7, 200e-6)], "warm": warm, "warm_watched": [answer(101), answer(47)]}, 50)
    assert found == {
        "requests": 3,
        "host_us_per_step": {"p20": 2.8, "p50": 4.0, "p80": 5.2},
        "largest_difference": 3,
    }
    assert replays({"warm": warm}, 50)["largest_difference"] is None
    assert replays({"warm": [answer(1)], "warm_watched": [answer(1)]}, 50) is None
