"""Schedulers as tables: one row of 64 float32 (256 bytes) a step, with everything the denoiser needs of it.

A step of any scheduler here is linear in the latents, the predicted noise, a history tensor and fresh noise:

    x'       = a·x  + b·eps  + c·history  + s·noise
    history' = hx·x + he·eps + hh·history

The denoiser is given the row and never knows which scheduler made it. `Column` names the entries of a row.
"""

import enum
import math
import operator
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from moma_rt.errors import InputError
from moma_rt.messages import shown

TRAINING_STEPS = 1000
# The leading grid starts at offset 1: with 1000 steps its first timestep would be 1000, one past the last.
MAX_STEPS = TRAINING_STEPS - 1
ROW_LENGTH = 64

_BETA_START = 0.00085
_BETA_END = 0.012
_STEPS_OFFSET = 1
_FLOAT32_MAX = float(np.finfo(np.float32).max)
# MoMA injects no reference while t >= 950: the layout of the new picture is not yet settled there.
_INJECTION_BELOW = 950


class Column(enum.IntEnum):
    """Where a value stands in a row of the schedule; the remaining columns are zero."""

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


def schedule(name: str, steps: int, guidance_scale: float) -> npt.NDArray[np.float32]:
    """The table of a whole generation, first step (most noise) first.

    Args:
        name: one of `SCHEDULERS`.
        steps: number of denoising steps, 1 to `MAX_STEPS`.
        guidance_scale: finite weight of classifier-free guidance; 1 is none.

    Returns:
        float32 [steps, 64], C-contiguous; columns as `Column` names them.

    Raises:
        InputError: an unknown scheduler, or a number outside its range.
    """
    if not isinstance(name, str) or name not in _TABLES:
        raise InputError(f"unknown scheduler {shown(name)}; available: {', '.join(SCHEDULERS)}")
    count = _checked_steps(steps)
    if not abs(guidance_scale) <= _FLOAT32_MAX:
        raise InputError(f"guidance scale must be a finite number in float32, not {shown(guidance_scale)}")
    rows = np.zeros((count, ROW_LENGTH), np.float64)
    _TABLES[name](rows)
    rows[:, Column.GUIDANCE] = guidance_scale
    rows[:, Column.INJECTION] = rows[:, Column.TIMESTEP] < _INJECTION_BELOW
    return rows.astype(np.float32)


def _checked_steps(steps: int) -> int:
    try:
        count = operator.index(steps)
    except TypeError:
        raise InputError(f"steps must be a whole number, 1 to {MAX_STEPS}, not {shown(steps)}") from None
    if not 1 <= count <= MAX_STEPS:
        raise InputError(f"steps must be 1 to {MAX_STEPS}, not {shown(count)}")
    return count


def _leading_timesteps(steps: int) -> npt.NDArray[np.int64]:
    """Multiples of 1000 // steps, plus one, falling: int64 [steps] in 1..999."""
    return np.arange(steps, dtype=np.int64)[::-1] * (TRAINING_STEPS // steps) + _STEPS_OFFSET


def _ddim(rows: npt.NDArray[np.float64]) -> None:
    """Deterministic DDIM: Song et al., "Denoising Diffusion Implicit Models", eq. 12 with sigma = 0.

    The last step goes to abar_0, not to 1: what is left of the noise there stays, as in the original.
    """
    steps = len(rows)
    timesteps = _leading_timesteps(steps)
    previous = np.maximum(timesteps - TRAINING_STEPS // steps, 0)
    signal = alphas_cumprod()
    now, then = signal[timesteps], signal[previous]
    rows[:, Column.TIMESTEP] = timesteps
    rows[:, Column.LATENTS] = np.sqrt(then / now)
    rows[:, Column.EPS] = np.sqrt(1.0 - then) - np.sqrt(then * (1.0 - now) / now)


_TABLES: Mapping[str, Callable[[npt.NDArray[np.float64]], None]] = MappingProxyType({"ddim": _ddim})
SCHEDULERS: tuple[str, ...] = tuple(_TABLES)
