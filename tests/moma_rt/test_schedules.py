import math
from pathlib import Path

import numpy as np
import pytest

from moma_rt.errors import InputError
from moma_rt.schedules import (
    MAX_STEPS,
    ROW_LENGTH,
    SCHEDULERS,
    Column,
    alphas_cumprod,
    reference_noising,
    schedule,
)

ALL_STEPS = [1, 4, 10, 19, 20, 50, 100, 500, 999]


def _ddim_scheduler(steps: int):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    scheduler.set_timesteps(steps)
    return scheduler


def _denoise(matrix: np.ndarray, x: np.ndarray, timestep: float) -> np.ndarray:
    """A linear denoiser: predicts noise of about unit size that depends on the timestep."""
    return matrix @ x * (0.5 + timestep / 1000)


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

    def test_tables_are_independent(self):
        schedule("ddim", 5, 7.5)[:] = 0
        assert schedule("ddim", 5, 7.5)[:, Column.LATENTS].all()

    @pytest.mark.parametrize("steps", ALL_STEPS)
    def test_every_number_is_finite(self, steps):
        assert np.isfinite(schedule("ddim", steps, 7.5)).all()

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


class TestNoiseSchedule:
    def test_signal_power_is_the_originals(self):
        signal = alphas_cumprod()
        assert signal.dtype == np.float64
        assert signal.shape == (1000,)
        assert signal[0] == 0.9991499781608582
        assert signal[999] == 0.00466009508818388
        assert (np.diff(signal) < 0).all()

    def test_signal_power_is_that_of_diffusers_to_the_last_bit(self):
        np.testing.assert_array_equal(alphas_cumprod(), _ddim_scheduler(1).alphas_cumprod.numpy().astype(np.float64))

    def test_reference_noising(self):
        signal, noise = reference_noising()
        assert signal == pytest.approx(math.sqrt(0.9991499781608582), rel=1e-12)
        assert signal**2 + noise**2 == pytest.approx(1.0, abs=1e-12)
        assert noise == pytest.approx(math.sqrt(0.00085), rel=1e-4)


class TestAgainstDiffusers:
    @pytest.mark.parametrize("steps", ALL_STEPS)
    def test_timesteps(self, steps):
        expected = _ddim_scheduler(steps).timesteps.tolist()
        assert schedule("ddim", steps, 7.5)[:, Column.TIMESTEP].tolist() == expected

    @pytest.mark.parametrize("steps", [1, 4, 10, 19, 20, 50, 100])
    def test_trajectory_under_a_linear_denoiser(self, steps):
        torch = pytest.importorskip("torch")
        generator = np.random.default_rng(steps)
        matrix, _ = np.linalg.qr(generator.standard_normal((64, 64)))
        matrix = matrix.astype(np.float32)
        ours = generator.standard_normal(64).astype(np.float32)
        theirs = ours.copy()
        scheduler = _ddim_scheduler(steps)
        for row in schedule("ddim", steps, 7.5):
            timestep = int(row[Column.TIMESTEP])
            ours = _step(row, ours, _denoise(matrix, ours, timestep))
            eps = torch.from_numpy(_denoise(matrix, theirs, timestep))
            theirs = scheduler.step(eps, timestep, torch.from_numpy(theirs)).prev_sample.numpy()
            assert np.abs(ours - theirs).max() <= 1e-5 * max(1.0, np.abs(theirs).max())


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
    @pytest.mark.parametrize("steps", [0, -1, MAX_STEPS + 1, 10**30])
    def test_steps_out_of_range(self, steps):
        with pytest.raises(InputError, match=f"steps must be 1 to 999, not {steps}"):
            schedule("ddim", steps, 7.5)

    @pytest.mark.parametrize("steps", [2.0, "20", None])
    def test_steps_that_are_no_whole_number(self, steps):
        with pytest.raises(InputError, match="whole number"):
            schedule("ddim", steps, 7.5)

    def test_numpy_integers_are_whole_numbers(self):
        assert len(schedule("ddim", np.int64(7), 7.5)) == 7

    def test_unknown_scheduler_lists_the_known_ones(self):
        with pytest.raises(InputError, match="unknown scheduler 'DDIM'; available: ddim"):
            schedule("DDIM", 20, 7.5)
        assert "ddim" in SCHEDULERS

    @pytest.mark.parametrize("guidance", [math.nan, math.inf, -math.inf, 1e39, -1e39, 10**400])
    def test_guidance_that_is_no_number(self, guidance):
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
