"""Every scheduler's table against diffusers' scheduler, and against a denoiser that knows the truth."""

import numpy as np
import pytest

from moma_rt.errors import InputError
from moma_rt.schedulers.tables import SCHEDULERS, Column, alphas_cumprod, schedule

SIZE = 64
MAX_STEPS = {"ddim": 999, "ddim_trailing": 1000, "dpmpp_2m": 998, "dpmpp_2m_karras": 999, "euler": 999}
MAX_STEPS |= {"lcm": 50, "tcd": 50}
STEPS = [1, 2, 3, 4, 5, 8, 10, 14, 15, 19, 20, 25, 50, 100]
CASES = [(name, steps) for name in SCHEDULERS for steps in STEPS if steps <= MAX_STEPS[name]]
STOCHASTIC = ("lcm", "tcd")
# With these steps, one level is halfway between two timesteps; diffusers' float32 logarithm rounds it the other way.
KARRAS_TIES = (444, 768, 854, 887)
# What Stable Diffusion 1.5's scheduler file says, whichever scheduler is made from it.
CONFIG = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "prediction_type": "epsilon",
}
MULTISTEP = {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint", "lower_order_final": True}
DDIM = {"clip_sample": False, "set_alpha_to_one": False}
DIFFUSERS = {
    "ddim": ("DDIMScheduler", DDIM),
    "ddim_trailing": ("DDIMScheduler", {**DDIM, "timestep_spacing": "trailing"}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {**MULTISTEP, "final_sigmas_type": "zero"}),
    "dpmpp_2m_karras": (
        "DPMSolverMultistepScheduler",
        {**MULTISTEP, "final_sigmas_type": "zero", "use_karras_sigmas": True},
    ),
    "euler": ("EulerDiscreteScheduler", {"final_sigmas_type": "zero"}),
    "lcm": ("LCMScheduler", {"original_inference_steps": 50}),
    "tcd": ("TCDScheduler", {"original_inference_steps": 50}),
}
every_scheduler = pytest.mark.parametrize("name", SCHEDULERS)
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def reference(name: str, steps: int):
    """diffusers' scheduler, its timesteps set."""
    diffusers = pytest.importorskip("diffusers")
    kind, options = DIFFUSERS[name]
    scheduler = getattr(diffusers, kind)(**{**CONFIG, **options})
    scheduler.set_timesteps(steps)
    return scheduler


class Denoiser:
    """A fixed network of one hidden layer: noise of about unit size, not linear in x, different at every timestep."""

    def __init__(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        self._inner, self._outer = random.standard_normal((2, SIZE, SIZE)) / np.sqrt(SIZE)
        self._phase = random.uniform(0.0, 2 * np.pi, SIZE)

    def __call__(self, x: np.ndarray, timestep: float) -> np.ndarray:
        hidden = np.tanh(self._inner @ x + np.sin(self._phase + timestep / 100))
        return 0.7 * x + self._outer @ hidden


def trajectory(rows: np.ndarray, x: np.ndarray, noise: np.ndarray, denoise) -> np.ndarray:
    """Latents after each step, [steps, SIZE]: what the denoiser's graph does with a table."""
    found, history = [], np.zeros_like(x)
    for row, z in zip(rows.astype(np.float64), noise, strict=True):
        eps = denoise(x, row[Column.TIMESTEP])
        x, history = (
            row[Column.LATENTS] * x + row[Column.EPS] * eps + row[Column.HISTORY] * history + row[Column.NOISE] * z,
            row[Column.HISTORY_LATENTS] * x + row[Column.HISTORY_EPS] * eps + row[Column.HISTORY_HISTORY] * history,
        )
        found.append(x)
    return np.stack(found)


def diffusers_trajectory(scheduler, x: np.ndarray, denoise, monkeypatch, noise: np.ndarray) -> np.ndarray:
    """Latents after each step as the network would see them next, [steps, SIZE]: as diffusers' pipelines make them."""
    import torch

    drawn = iter(torch.from_numpy(noise))
    monkeypatch.setattr(f"{type(scheduler).__module__}.randn_tensor", lambda *_, **__: next(drawn))
    found, sample = [], torch.from_numpy(x) * scheduler.init_noise_sigma
    for index, timestep in enumerate(scheduler.timesteps):
        seen = scheduler.scale_model_input(sample, timestep)
        eps = torch.from_numpy(denoise(seen.double().numpy(), float(timestep)))
        sample = scheduler.step(eps, timestep, sample, return_dict=False)[0]
        # Euler's sample has the noise level s: the network sees it over sqrt(s² + 1), after the last step over 1.
        level = float(scheduler.sigmas[index + 1]) if "Euler" in type(scheduler).__name__ else 0.0
        found.append(sample.double().numpy() / np.sqrt(level**2 + 1.0))
    return np.stack(found)


class TestAgainstDiffusers:
    @pytest.mark.parametrize(("name", "steps"), CASES)
    def test_trajectory_under_a_fixed_network(self, monkeypatch, name, steps):
        random = np.random.default_rng(steps)
        denoise, x, noise = Denoiser(steps), random.standard_normal(SIZE), random.standard_normal((steps, SIZE))
        expected = diffusers_trajectory(reference(name, steps), x, denoise, monkeypatch, noise)
        found = trajectory(schedule(name, steps, 7.5), x, noise, denoise)
        assert np.isfinite(expected).all()
        scale = np.abs(expected).max(axis=1, keepdims=True).clip(1.0)
        assert np.abs((found - expected) / scale).max() <= 1e-5

    @every_scheduler
    def test_timesteps_of_every_number_of_steps(self, name):
        for steps in range(1, MAX_STEPS[name] + 1):
            found = schedule(name, steps, 7.5)[:, Column.TIMESTEP]
            theirs = reference(name, steps).timesteps.numpy()
            # For some numbers of steps, rounding makes diffusers' trailing timesteps end at -1.
            differences = found - theirs[theirs >= 0]
            ties = name == "dpmpp_2m_karras" and steps in KARRAS_TIES
            assert np.abs(differences).sum() == (1 if ties else 0), steps

    def test_eulers_initial_latents_are_standard_normal(self):
        """diffusers scales noise by init_noise_sigma and divides what the network sees: the two cancel out."""
        torch = pytest.importorskip("torch")
        for steps in STEPS:
            scheduler = reference("euler", steps)
            noise = torch.ones(1) * scheduler.init_noise_sigma
            assert float(scheduler.scale_model_input(noise, scheduler.timesteps[0])) == pytest.approx(1.0, rel=1e-6)


class TestTruth:
    @every_scheduler
    @pytest.mark.parametrize("steps", [1, 2, 5, 14, 15, 50])
    def test_a_denoiser_that_knows_the_picture_ends_at_it(self, name, steps):
        """Whatever noise was added on the way: each prediction is right, so the last one decides."""
        random = np.random.default_rng(steps)
        picture, x = random.standard_normal((2, SIZE))
        rows, predicted = schedule(name, steps, 7.5), []
        levels = _levels(rows)

        def denoise(x, _):
            level = levels[len(predicted)]
            predicted.append((x * np.sqrt(level**2 + 1.0) - picture) / level)
            return predicted[-1]

        end = trajectory(rows, x, random.standard_normal((steps, SIZE)), denoise)[-1]
        abar_0 = alphas_cumprod()[0] if name in ("ddim", "ddim_trailing", "tcd") else 1.0
        left = np.sqrt(abar_0) * picture + np.sqrt(1.0 - abar_0) * predicted[-1]
        np.testing.assert_allclose(end, left, atol=2e-5)

    @every_scheduler
    def test_every_row_of_every_table(self, name):
        for steps in range(1, MAX_STEPS[name] + 1):
            rows = schedule(name, steps, 7.5)
            assert rows.shape == (steps, 64)
            assert np.isfinite(rows).all()
            assert not rows[:, len(Column) :].any()
            assert not rows[0, Column.HISTORY].any()
            assert (np.diff(rows[:, Column.TIMESTEP]) <= 0).all()
            assert rows[:, Column.TIMESTEP].min() >= 0
            assert rows[:, Column.TIMESTEP].max() <= 999
            np.testing.assert_array_equal(rows[:, Column.INJECTION], rows[:, Column.TIMESTEP] < 950)
            assert rows[-1, Column.NOISE] == 0
            assert (rows[:-1, Column.NOISE] > 0).all() if name in STOCHASTIC else not rows[:, Column.NOISE].any()

    def test_history_is_used_between_the_ends(self):
        for name in ("dpmpp_2m", "dpmpp_2m_karras"):
            for steps in (3, 14, 15, 50):
                history = schedule(name, steps, 7.5)[:, Column.HISTORY]
                assert (history[1:-1] < 0).all()
                assert history[-1] == 0

    def test_euler_is_ddim_except_for_the_last_step(self):
        ours, ddims = schedule("euler", 20, 7.5), schedule("ddim", 20, 7.5)
        np.testing.assert_array_equal(ours[:-1], ddims[:-1])
        assert not np.array_equal(ours[-1], ddims[-1])


@every_scheduler
def test_steps_out_of_range(name):
    most = MAX_STEPS[name]
    for steps in (0, most + 1):
        with pytest.raises(InputError, match=f"^with {name}, steps must be 1 to {most}, not {steps}$"):
            schedule(name, steps, 7.5)
    with pytest.raises(InputError, match=f"^with {name}, steps must be a whole number, 1 to {most}, not 2.5$"):
        schedule(name, 2.5, 7.5)


def _levels(rows: np.ndarray) -> np.ndarray:
    """sigma / alpha of each step: that of its timestep, or of the row itself if the row has an x0 term."""
    abar = alphas_cumprod()[rows[:, Column.TIMESTEP].astype(int)]
    of_timesteps = np.sqrt((1.0 - abar) / abar)
    return np.where(rows[:, Column.HISTORY_EPS] != 0, -rows[:, Column.HISTORY_EPS].astype(np.float64), of_timesteps)
