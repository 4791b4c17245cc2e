"""The roofline time, the measured peaks, and the timer on a GPU."""

import pytest
import torch

from benchmarks.timer import GpuTimer, Peaks, Timing, Work, measured_peaks


def test_the_floor_is_the_larger_of_operations_and_bytes():
    peaks = Peaks(2e12, 1e12)
    assert peaks.floor_ms(Work(10**9, 10**6)) == pytest.approx(0.5)
    assert peaks.floor_ms(Work(10**6, 10**9)) == pytest.approx(1.0)
    assert peaks.described() == {"tflops": 2.0, "tb_per_s": 1.0}


def test_peaks_count_each_multiplication_and_addition_and_each_byte_twice(fake_timer):
    peaks = measured_peaks(fake_timer, torch.float32, "cpu", size=8, copied=4096)
    # The fake's median is a millisecond.
    assert peaks == Peaks(2 * 8**3 * 1e3, 2 * 4096 * 1e3)


def test_the_median_of_a_timing():
    assert Timing((3.0, 1.0, 2.0), 0.0).median == 2.0


@pytest.mark.gpu
def test_longer_work_takes_longer():
    timer = GpuTimer(samples=20)
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.float16)
    once, four_times = timer(lambda: a @ a), timer(lambda: [a @ a for _ in range(4)])
    assert len(once.milliseconds) == 20
    assert once.extra_mib >= 32
    assert 3 < four_times.median / once.median < 5
