"""Schedulers as tables: one row of 64 float32 (256 bytes) per step, with everything that the denoiser needs.

A step of any scheduler here is linear in the latents, the predicted noise, a history tensor and fresh noise:

    x'       = a·x  + b·eps  + c·history  + s·noise
    history' = hx·x + he·eps + hh·history

The denoiser is given the row and never knows which scheduler made it. `Column` names the entries of a row;
`moma_rt.schedulers.solvers` derives the coefficients of each scheduler.
"""

import enum
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from moma_rt.errors import InputError
from moma_rt.messages import short_repr
from moma_rt.schedulers.solvers import (
    DISTILLED_STEPS,
    TRAINING_STEPS,
    Floats,
    Solution,
    ddim,
    ddim_trailing,
    dpmpp_2m,
    dpmpp_2m_karras,
    euler,
    lcm,
    tcd,
)

ROW_LENGTH = 64
# An interval that contains every timestep of every scheduler.
ALL_TIMESTEPS = (0, TRAINING_STEPS - 1)

_BETA_START = 0.00085
_BETA_END = 0.012
_FLOAT32_MAX = float(np.finfo(np.float32).max)
# MoMA injects no reference while t >= 950: the layout of the new picture is not yet settled there.
INJECTION_BELOW = 950


class Column(enum.IntEnum):
    """The column of each value in a row of the table; the remaining columns are zero."""

    TIMESTEP = 0
    LATENTS = 1
    EPS = 2
    HISTORY = 3
    NOISE = 4
    HISTORY_LATENTS = 5
    HISTORY_EPS = 6
    HISTORY_HISTORY = 7
    GUIDANCE = 8
    INJECTION = 9


def alphas_cumprod() -> npt.NDArray[np.float64]:
    """Cumulative signal power abar_t of Stable Diffusion's scaled-linear noise schedule.

    Returns:
        float64 [1000] in (0, 1), falling. The values are those that PyTorch computes in float32, bit for bit.
    """
    # float64 until each rounding, because torch.linspace fuses multiply and add, counts down from the end in its
    # second half, and torch.cumprod accumulates float32 in double. At small t, 1 - abar magnifies a last bit by 1000.
    start, end = np.float32(_BETA_START**0.5), np.float32(_BETA_END**0.5)
    step = np.float64((end - start) / np.float32(TRAINING_STEPS - 1))
    index = np.arange(TRAINING_STEPS, dtype=np.float64)
    rising = np.float64(start) + step * index
    falling = np.float64(end) - step * (TRAINING_STEPS - 1 - index)
    roots = np.where(index < TRAINING_STEPS // 2, rising, falling).astype(np.float32)
    alphas = (np.float32(1.0) - roots * roots).astype(np.float32)
    return np.cumprod(alphas, dtype=np.float64).astype(np.float32).astype(np.float64)


def reference_noising() -> tuple[float, float]:
    """Factors of the reference latents and of their noise at t = 0: (sqrt(abar_0), sqrt(1 - abar_0))."""
    first = float(alphas_cumprod()[0])
    return math.sqrt(first), math.sqrt(1.0 - first)


@dataclass(frozen=True)
class _Scheduler:
    solve: Callable[[int, Floats], Solution]
    max_steps: int


_SCHEDULERS: Mapping[str, _Scheduler] = MappingProxyType(
    {
        # Leading grids have offset 1: with one step more, the first timestep would be 1000, one past the last.
        "ddim": _Scheduler(ddim, TRAINING_STEPS - 1),
        "ddim_trailing": _Scheduler(ddim_trailing, TRAINING_STEPS),
        "dpmpp_2m": _Scheduler(dpmpp_2m, TRAINING_STEPS - 2),
        "dpmpp_2m_karras": _Scheduler(dpmpp_2m_karras, TRAINING_STEPS - 1),
        "euler": _Scheduler(euler, TRAINING_STEPS - 1),
        "lcm": _Scheduler(lcm, DISTILLED_STEPS),
        "tcd": _Scheduler(tcd, DISTILLED_STEPS),
    }
)
SCHEDULERS: tuple[str, ...] = tuple(_SCHEDULERS)


def schedule(
    name: str, steps: int, guidance_scale: float, guidance_interval: tuple[float, float] = ALL_TIMESTEPS
) -> npt.NDArray[np.float32]:
    """The table of a whole generation, first step (most noise) first.

    "ddim" is the original MoMA's. "lcm", "tcd" and "ddim_trailing" make pictures in few steps, but only with bases
    distilled for it: fuse an LCM, TCD or Hyper-SD LoRA (`python -m export.build --lora`), and use guidance scale 1
    unless CFG is in its name, because such LoRAs have guidance built in. All three start at t = 999, and MoMA injects
    the subject's reference below t = 950 only: with 2 to 12 steps all but the first inject it; a single step does not.

    Args:
        name: one of `SCHEDULERS`.
        steps: number of denoising steps, from 1; to 50 with "lcm" and "tcd", 998 with "dpmpp_2m", 1000 with
            "ddim_trailing", else 999.
        guidance_scale: finite weight of classifier-free guidance; 1 disables it.
        guidance_interval: lowest and highest timestep that is guided; at all others the scale is 1. Kynkäänniemi et
            al., "Applying Guidance in a Limited Interval", arXiv 2404.07724.

    Returns:
        float32 [steps, 64], C-contiguous; columns as `Column` names them.

    Raises:
        InputError: an unknown scheduler, or a number outside its range.
    """
    if not isinstance(name, str) or name not in _SCHEDULERS:
        raise InputError(f"unknown scheduler {short_repr(name)}; available: {', '.join(SCHEDULERS)}")
    if not abs(guidance_scale) <= _FLOAT32_MAX:
        raise InputError(f"guidance scale must be a finite number in float32, not {short_repr(guidance_scale)}")
    scheduler, (low, high) = _SCHEDULERS[name], guidance_interval
    solution = scheduler.solve(_checked_steps(name, steps, scheduler.max_steps), alphas_cumprod())
    timesteps = solution.timesteps
    rows = np.zeros((len(timesteps), ROW_LENGTH), np.float64)
    rows[:, Column.TIMESTEP] = timesteps
    rows[:, Column.LATENTS] = solution.latents
    rows[:, Column.EPS] = solution.eps
    rows[:, Column.HISTORY] = solution.history
    rows[:, Column.NOISE] = solution.noise
    rows[:, Column.HISTORY_LATENTS] = solution.history_latents
    rows[:, Column.HISTORY_EPS] = solution.history_eps
    rows[:, Column.GUIDANCE] = np.where((low <= timesteps) & (timesteps <= high), guidance_scale, 1.0)
    rows[:, Column.INJECTION] = timesteps < INJECTION_BELOW
    return rows.astype(np.float32)


def guidance_halves(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """Number of guidance halves that each step of a table computes: int64 [steps], 1 where the scale is 1, else 2."""
    return np.where(rows[:, Column.GUIDANCE] == 1.0, 1, 2)


def _checked_steps(name: str, steps: int, most: int) -> int:
    try:
        count = operator.index(steps)
    except TypeError:
        raise InputError(f"with {name}, steps must be a whole number, 1 to {most}, not {short_repr(steps)}") from None
    if not 1 <= count <= most:
        raise InputError(f"with {name}, steps must be 1 to {most}, not {short_repr(count)}")
    return count
