import math
from pathlib import Path

import numpy as np
import pytest

from moma_rt.errors import InputError
from moma_rt.schedulers.tables import (
    ROW_LENGTH,
    SCHEDULERS,
    Column,
    alphas_cumprod,
    guidance_halves,
    reference_noising,
    schedule,
)


def _step(row: np.ndarray, x: np.ndarray, eps: np.ndarray) -> np.ndarray:
    return row[Column.LATENTS] * x + row[Column.EPS] * eps


class TestTable:
    def test_rows_are_256_bytes_of_float32(self):
        rows = schedule("ddim", 3, 7.5)
        assert rows.shape == (3, ROW_LENGTH)
        assert rows.dtype == np.float32
        assert rows.flags.c_contiguous
        assert rows[0].nbytes == 256

    def test_columns_stand_where_the_engine_reads_them(self):
        names = ["TIMESTEP", "LATENTS", "EPS", "HISTORY", "NOISE"]
        names += ["HISTORY_LATENTS", "HISTORY_EPS", "HISTORY_HISTORY", "GUIDANCE", "INJECTION"]
        assert [(c.name, c.value) for c in Column] == list(zip(names, range(10), strict=True))

    def test_ddim_uses_no_history_no_noise_and_no_padding(self):
        rows = schedule("ddim", 20, 7.5)
        used = [Column.TIMESTEP, Column.LATENTS, Column.EPS, Column.GUIDANCE, Column.INJECTION]
        assert not np.delete(rows, used, axis=1).any()

    def test_guidance_is_in_every_row(self):
        assert (schedule("ddim", 5, 3.25)[:, Column.GUIDANCE] == 3.25).all()

    @pytest.mark.parametrize(
        ("interval", "scales"),
        [
            ((201, 801), [3.25, 3.25, 3.25, 3.25, 1.0]),
            ((201.5, 800.5), [1.0, 3.25, 3.25, 1.0, 1.0]),
            ((0, 999), [3.25] * 5),
            ((2, 200), [1.0] * 5),
        ],
    )
    def test_guidance_is_in_the_rows_of_its_interval(self, interval, scales):
        rows, without = schedule("ddim", 5, 3.25, interval), schedule("ddim", 5, 1.0)
        assert rows[:, Column.GUIDANCE].tolist() == scales
        assert guidance_halves(rows).tolist() == [1 if scale == 1.0 else 2 for scale in scales]
        others = np.arange(ROW_LENGTH) != Column.GUIDANCE
        np.testing.assert_array_equal(rows[:, others], without[:, others])
        assert (guidance_halves(without) == 1).all()

    def test_tables_are_independent(self):
        schedule("ddim", 5, 7.5)[:] = 0
        assert schedule("ddim", 5, 7.5)[:, Column.LATENTS].all()

    # Measured on the original: number of steps -> first three timesteps, steps without injection (t >= 950).
    @pytest.mark.parametrize(
        ("steps", "first", "without_injection"),
        [
            (5, [801, 601, 401], 0),
            (10, [901, 801, 701], 0),
            (19, [937, 885, 833], 0),
            (20, [951, 901, 851], 1),
            (25, [961, 921, 881], 1),
            (30, [958, 925, 892], 1),
            (50, [981, 961, 941], 2),
            (100, [991, 981, 971], 5),
        ],
    )
    def test_timesteps_and_injection_window_are_the_originals(self, steps, first, without_injection):
        rows = schedule("ddim", steps, 7.5)
        assert rows[:3, Column.TIMESTEP].tolist() == first
        assert rows[-1, Column.TIMESTEP] == 1
        expected = [0.0] * without_injection + [1.0] * (steps - without_injection)
        assert rows[:, Column.INJECTION].tolist() == expected

    @pytest.mark.parametrize("name", ["ddim_trailing", "lcm", "tcd"])
    @pytest.mark.parametrize("steps", range(1, 13))
    def test_with_few_steps_all_but_the_first_inject(self, name, steps):
        rows = schedule(name, steps, 1.0)
        assert rows[0, Column.TIMESTEP] == 999
        assert rows[:, Column.INJECTION].tolist() == [0.0] + [1.0] * (steps - 1)

    def test_trailing_timesteps(self):
        found = [schedule("ddim_trailing", steps, 1.0)[:, Column.TIMESTEP].tolist() for steps in (1, 2, 3, 4)]
        assert found == [[999], [999, 499], [999, 666, 332], [999, 749, 499, 249]]


class TestNoiseSchedule:
    def test_signal_power_is_the_originals(self):
        signal = alphas_cumprod()
        assert signal.dtype == np.float64
        assert signal.shape == (1000,)
        assert signal[0] == 0.9991499781608582
        assert signal[999] == 0.00466009508818388
        assert (np.diff(signal) < 0).all()

    def test_signal_power_is_that_of_diffusers_to_the_last_bit(self):
        diffusers = pytest.importorskip("diffusers")
        scheduler = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        np.testing.assert_array_equal(alphas_cumprod(), scheduler.alphas_cumprod.numpy().astype(np.float64))

    def test_reference_noising(self):
        signal, noise = reference_noising()
        assert signal == pytest.approx(math.sqrt(0.9991499781608582), rel=1e-12)
        assert signal**2 + noise**2 == pytest.approx(1.0, abs=1e-12)
        assert noise == pytest.approx(math.sqrt(0.00085), rel=1e-4)


@pytest.mark.parametrize("case", ["context", "texture"])
class TestAgainstTheOriginal:
    def test_timesteps_and_injection(self, goldens: Path, case):
        with np.load(goldens / case / "trace.npz") as trace:
            rows = schedule("ddim", len(trace["timesteps"]), 7.5)
            assert rows[:, Column.TIMESTEP].tolist() == trace["timesteps"].tolist()
            assert rows[:, Column.INJECTION].astype(bool).tolist() == trace["self_enabled"].tolist()

    def test_each_recorded_step(self, goldens: Path, case):
        with np.load(goldens / case / "trace.npz") as trace:
            rows = schedule("ddim", len(trace["timesteps"]), 7.5)
            for index, step in enumerate(trace["steps"]):
                row = rows[step]
                unconditional, conditional = trace["noise_pred_uncond_cond"][index]
                eps = unconditional + row[Column.GUIDANCE] * (conditional - unconditional)
                latents = _step(row, trace["latents_before"][index, 0], eps)
                expected = trace["latents_after"][index, 0]
                assert np.abs(latents - expected).max() <= 1e-5 * np.abs(expected).max()


class TestWrongInput:
    @pytest.mark.parametrize("steps", [0, -1, 1000, 10**30])
    def test_steps_out_of_range(self, steps):
        with pytest.raises(InputError, match=f"with ddim, steps must be 1 to 999, not {steps}"):
            schedule("ddim", steps, 7.5)

    @pytest.mark.parametrize("steps", [2.0, "20", None])
    def test_steps_that_are_no_whole_number(self, steps):
        with pytest.raises(InputError, match="whole number"):
            schedule("ddim", steps, 7.5)

    def test_numpy_integers_are_whole_numbers(self):
        assert len(schedule("ddim", np.int64(7), 7.5)) == 7

    def test_unknown_scheduler_lists_the_known_ones(self):
        with pytest.raises(InputError) as caught:
            schedule("DDIM", 20, 7.5)
        available = "ddim, ddim_trailing, dpmpp_2m, dpmpp_2m_karras, euler, lcm, tcd"
        assert str(caught.value) == f"unknown scheduler 'DDIM'; available: {available}"
        assert ", ".join(SCHEDULERS) == available

    @pytest.mark.parametrize("guidance", [math.nan, math.inf, -math.inf, 1e39, -1e39, 10**400])
    def test_guidance_that_is_not_finite_in_float32(self, guidance):
        with pytest.raises(InputError, match="guidance scale must be a finite number in float32, not") as caught:
            schedule("ddim", 20, guidance)
        assert len(str(caught.value)) < 200

    @pytest.mark.parametrize("name", [None, 7, ["ddim"], {}, b"ddim"])
    def test_a_scheduler_that_is_no_name(self, name):
        with pytest.raises(InputError, match="unknown scheduler .*; available: ddim"):
            schedule(name, 20, 7.5)

    def test_steps_of_more_digits_than_python_writes(self):
        with pytest.raises(InputError, match="steps must be 1 to 999, not <int>"):
            schedule("ddim", 10**5000, 7.5)
