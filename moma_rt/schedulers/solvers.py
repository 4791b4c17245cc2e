"""The schedulers' solvers: pure functions from a number of steps to the coefficients of every step.

Notation of the docstrings: abar_t is the signal power, alpha = sqrt(abar) and sigma = sqrt(1 - abar) the amplitudes of
signal and noise in the latents x, and x0 = (x - sigma·eps) / alpha the picture that a predicted noise implies. A prime
marks values after the step. The network reads x itself and initial latents are standard normal, so every solver is
written for latents of about unit variance, whatever its paper uses.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

TRAINING_STEPS = 1000
# The grid on which LCM and TCD models are distilled: every 20th timestep, from 999 down to 19.
DISTILLED_STEPS = 50

_STEPS_OFFSET = 1
_KARRAS_RHO = 7.0
_LCM_SIGMA_DATA = 0.5
_LCM_TIMESTEP_SCALING = 10.0
_TCD_GAMMA = 0.3

Floats = npt.NDArray[np.float64]
Timesteps = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Solution:
    """Coefficients by step, float64 [steps] each (a number stands for all steps), most noise first.

    x' = latents·x + eps·eps + history·h + noise·z and h' = history_latents·x + history_eps·eps, where h is the history
    of the previous step and z is standard normal noise.
    """

    timesteps: Timesteps
    latents: Floats
    eps: Floats
    history: Floats | float = 0.0
    noise: Floats | float = 0.0
    history_latents: Floats | float = 0.0
    history_eps: Floats | float = 0.0


def ddim(steps: int, abar: Floats) -> Solution:
    """Deterministic DDIM: Song et al., "Denoising Diffusion Implicit Models", arXiv 2010.02502, eq. 12 with sigma = 0.

    The last step goes to abar_0, not to 1: the noise that remains at abar_0 is kept, as in the original MoMA.
    """
    return _ddim(_leading_timesteps(steps), abar)


def ddim_trailing(steps: int, abar: Floats) -> Solution:
    """DDIM that starts at the last, noisiest timestep: Lin et al., arXiv 2305.08891, "trailing" in table 2.

    The last step goes to abar_0 here too. diffusers' DDIM does the same with trailing spacing and otherwise Stable
    Diffusion 1.5's configuration (set_alpha_to_one is false, steps_offset has no effect), for which Hyper-SD's LoRAs
    are published.
    """
    return _ddim(_trailing_timesteps(steps), abar)


def euler(steps: int, abar: Floats) -> Solution:
    """Euler's method: Karras et al., arXiv 2206.00364, algorithm 1 without its second-order correction.

    The paper's sample is y = x / alpha, whose noise level is s = sigma / alpha, and a step is y' = y + (s' - s)·eps.
    Written for x this is DDIM's update, so the two differ only in their last step, which here goes to s = 0. With
    leading timesteps diffusers starts y from sqrt(s² + 1) times standard normal noise: x is standard normal.
    """
    timesteps = _leading_timesteps(steps)
    now = abar[timesteps]
    return Solution(timesteps, *_along_the_ode(now, np.append(now[1:], 1.0)))


def dpmpp_2m(steps: int, abar: Floats) -> Solution:
    """DPM-Solver++(2M): Lu et al., arXiv 2211.01095, algorithm 2, on diffusers' leading timesteps for it.

    These are DDIM's for one more step, without the last.
    """
    timesteps = np.arange(steps, 0, -1) * (TRAINING_STEPS // (steps + 1)) + _STEPS_OFFSET
    return _dpmpp_2m(timesteps, _noise_levels(abar)[timesteps])


def dpmpp_2m_karras(steps: int, abar: Floats) -> Solution:
    """DPM-Solver++(2M) at the noise levels of Karras et al., arXiv 2206.00364, eq. 5 with rho = 7.

    The network gets the timestep nearest to each level; near the end several levels share one.
    """
    every = _noise_levels(abar)
    most, least = every[-1] ** (1 / _KARRAS_RHO), every[0] ** (1 / _KARRAS_RHO)
    levels = (most + np.linspace(0.0, 1.0, steps) * (least - most)) ** _KARRAS_RHO
    timesteps = np.interp(np.log(levels), np.log(every), np.arange(TRAINING_STEPS)).round().astype(np.int64)
    return _dpmpp_2m(timesteps, levels)


def lcm(steps: int, abar: Floats) -> Solution:
    """Multistep sampling of latent consistency models: Luo et al., arXiv 2310.04378, algorithm 3.

    The consistency function c_skip·x + c_out·x0 predicts the picture, to which fresh noise of the next step's level is
    added; the last step adds none. For bases with a fused LCM LoRA, without guidance.
    """
    timesteps = _distilled_timesteps(steps)
    alpha, sigma = _amplitudes(abar[timesteps])
    next_alpha, next_sigma = _amplitudes(np.append(abar[timesteps[1:]], 1.0))
    scaled = timesteps * _LCM_TIMESTEP_SCALING
    c_skip = _LCM_SIGMA_DATA**2 / (scaled**2 + _LCM_SIGMA_DATA**2)
    c_out = scaled / np.sqrt(scaled**2 + _LCM_SIGMA_DATA**2)
    return Solution(
        timesteps,
        latents=next_alpha * (c_skip + c_out / alpha),
        eps=-next_alpha * c_out * sigma / alpha,
        noise=next_sigma,
    )


def tcd(steps: int, abar: Floats) -> Solution:
    """Strategic stochastic sampling of trajectory consistency models: Zheng et al., arXiv 2402.19159, gamma = 0.3.

    A step follows the ODE beyond its end t' to (1 - gamma)·t', then adds fresh noise up to the level of t'. The last
    step goes to t = 0 and adds none, so gamma does not matter there. For bases with a fused TCD LoRA, or with
    Hyper-SD's LoRA for one step, which works for any number of them; without guidance.
    """
    timesteps = _distilled_timesteps(steps)
    following = np.append(timesteps[1:], 0)
    beyond = np.floor((1.0 - _TCD_GAMMA) * following).astype(np.int64)
    latents, eps = _along_the_ode(abar[timesteps], abar[beyond])
    kept = abar[following] / abar[beyond]
    return Solution(timesteps, np.sqrt(kept) * latents, np.sqrt(kept) * eps, noise=np.sqrt(1.0 - kept))


def _ddim(timesteps: Timesteps, abar: Floats) -> Solution:
    """Solve with steps of 1000 // steps timesteps, as in diffusers.

    If `steps` does not divide 1000, a step does not end exactly at the next timestep.
    """
    previous = np.maximum(timesteps - TRAINING_STEPS // len(timesteps), 0)
    return Solution(timesteps, *_along_the_ode(abar[timesteps], abar[previous]))


def _along_the_ode(now: Floats, then: Floats) -> tuple[Floats, Floats]:
    """Coefficients of x and eps in alpha'·x0 + sigma'·eps, from signal power `now` to `then`."""
    return np.sqrt(then / now), np.sqrt(1.0 - then) - np.sqrt(then * (1.0 - now) / now)


def _dpmpp_2m(timesteps: Timesteps, levels: Floats) -> Solution:
    """The second-order multistep update; the history is x0 of the previous step.

    levels: sigma / alpha of each step, falling. The last step goes to level 0, where lambda = log(alpha / sigma) is
    infinite and exp(-h) = level' / level is 0: it is of first order, like the first step. So every number of steps ends
    with the lower order that diffusers uses below 15 steps.
    """
    following = np.append(levels[1:], 0.0)
    alpha, next_alpha = 1.0 / np.sqrt(levels**2 + 1.0), 1.0 / np.sqrt(following**2 + 1.0)
    half_inverse_r = np.zeros(len(levels))
    h = np.log(levels[:-1] / levels[1:])
    half_inverse_r[1:-1] = 0.5 * h[1:] / h[:-1]
    # sigma'/sigma · x + alpha'·(1 - exp(-h))·D, with D = x0 + (x0 - history) / 2r and x0 = x / alpha - level·eps
    shrink = following / levels
    data = next_alpha * (1.0 - shrink)
    current = data * (1.0 + half_inverse_r)
    return Solution(
        timesteps,
        latents=shrink * next_alpha / alpha + current / alpha,
        eps=-current * levels,
        history=data - current,
        history_latents=1.0 / alpha,
        history_eps=-levels,
    )


def _amplitudes(abar: Floats) -> tuple[Floats, Floats]:
    return np.sqrt(abar), np.sqrt(1.0 - abar)


def _noise_levels(abar: Floats) -> Floats:
    return np.sqrt((1.0 - abar) / abar)


def _leading_timesteps(steps: int) -> Timesteps:
    """Multiples of 1000 // steps, plus one, falling: int64 [steps] in 1..999."""
    return np.arange(steps, dtype=np.int64)[::-1] * (TRAINING_STEPS // steps) + _STEPS_OFFSET


def _trailing_timesteps(steps: int) -> Timesteps:
    """Multiples of 1000 / steps, rounded, minus one, falling: int64 [steps] in 0..999, the first one 999."""
    # Computed as in diffusers, so that ties round alike. For some step counts its range has one value too many, -1.
    multiples = np.arange(TRAINING_STEPS, 0, -TRAINING_STEPS / steps)[:steps]
    return multiples.round().astype(np.int64) - 1


def _distilled_timesteps(steps: int) -> Timesteps:
    """Evenly spread over the distilled grid, from its noisiest timestep: int64 [steps] in 19..999."""
    grid = np.arange(DISTILLED_STEPS, 0, -1) * (TRAINING_STEPS // DISTILLED_STEPS) - 1
    return grid[np.arange(steps) * DISTILLED_STEPS // steps]
