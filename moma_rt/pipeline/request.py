"""Checked parameters of a generation, and its result."""

import functools
import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from moma_rt.errors import InputError
from moma_rt.inputs.noise import MAX_SEED, check_seed
from moma_rt.lazy import lazy_property
from moma_rt.memory.limits import MAX_IMAGES
from moma_rt.messages import short_repr
from moma_rt.pipeline.sampling import FloatArray
from moma_rt.schedulers.tables import ALL_TIMESTEPS, guidance_halves, schedule

MAX_STRENGTH = 2.0
MAX_GUIDANCE_SCALE = 100.0
# No picture needs values above these, and they make large latents.
_USUAL_STRENGTH, _USUAL_GUIDANCE_SCALE, _USUAL_LATENT = 1.5, 30.0, 10.0


@dataclass(frozen=True, eq=False)
class Result:
    """The pictures of one call.

    Attributes:
        images: RGB pictures.
        foreground_masks: one per picture, float32 [H,W] in 0..1: where the denoiser saw the subject at the last step.
        seeds: one per picture.
        seconds: wall-clock seconds of each stage; a stage whose result was cached is absent. A replayed CUDA graph of
            all steps and the decoding counts as ``"denoiser"``. Calls that shared a batch all report its full time.
    """

    images: list[Image.Image]
    foreground_masks: list[FloatArray]
    seeds: list[int]
    seconds: dict[str, float]


@dataclass(frozen=True)
class Settings:
    """Checked parameters of one request; ranges as in `Runtime.generate`."""

    strength: float
    steps: int
    guidance_scale: float
    guidance_interval: tuple[float, float]
    scheduler: str
    seed: int
    num_images: int

    def __post_init__(self) -> None:
        _check_number("strength", self.strength, 0.0, MAX_STRENGTH)
        _check_number("guidance_scale", self.guidance_scale, 0.0, MAX_GUIDANCE_SCALE)
        _check_interval("guidance_interval", self.guidance_interval, *ALL_TIMESTEPS)
        if isinstance(self.num_images, bool) or not isinstance(self.num_images, int | np.integer):
            raise InputError(
                f"num_images is {short_repr(self.num_images)}: it must be a whole number from 1 to {MAX_IMAGES}"
            )
        if not 1 <= self.num_images <= MAX_IMAGES:
            raise InputError(f"num_images is {short_repr(self.num_images)}: it must be from 1 to {MAX_IMAGES}")
        if check_seed(self.seed) + self.num_images - 1 > MAX_SEED:
            raise InputError(f"seed is {self.seed}: {self.num_images} images need seeds up to {MAX_SEED} at most")
        self.rows  # noqa: B018 - raises before networks are loaded

    @lazy_property
    def rows(self) -> FloatArray:
        """The schedule, float32 [steps,64]."""
        return schedule(self.scheduler, self.steps, self.guidance_scale, self.guidance_interval)

    @property
    def halves(self) -> tuple[int, ...]:
        """Numbers of guidance halves that occur among the steps, ascending: 2 for guided steps, 1 for others."""
        return tuple(np.unique(guidance_halves(self.rows)).tolist())

    @property
    def guided(self) -> bool:
        """True if any step computes the unconditional half."""
        return 2 in self.halves

    @property
    def seeds(self) -> list[int]:
        return [int(self.seed) + i for i in range(self.num_images)]


def check_on_step(on_step: object) -> None:
    """Check that a step callback does its work when it is called.

    Raises:
        InputError: it cannot be called, or calling it only makes a coroutine or generator, which nobody would run.
    """
    if on_step is None:
        return
    if not callable(on_step):
        raise InputError(f"on_step must be a function of a StepInfo, not {short_repr(on_step)}")
    # Not inspect.unwrap: a wrapper may be what runs an async function.
    function: Any = on_step
    while isinstance(function, functools.partial):
        function = function.func
    for called in (function, type(function).__call__):
        if inspect.iscoroutinefunction(called) or inspect.isasyncgenfunction(called):
            raise InputError(f"on_step must not be async: {short_repr(on_step)} would never run; give a plain function")
        if inspect.isgeneratorfunction(called):
            raise InputError(
                f"on_step must not be a generator: {short_repr(on_step)} would never run; use no yield in it"
            )


def explain_overflow(settings: Settings, latents: FloatArray) -> str:
    """Name the parameters that explain latents of NaN or infinity, and what to do; empty if none is unusual.

    Args:
        latents: the initial noise, float32 [N,4,h,w].
    """
    largest = float(np.abs(latents).max())
    found = [
        f"{name} ({value:g})"
        for name, value, usual in (
            ("guidance_scale", settings.guidance_scale, _USUAL_GUIDANCE_SCALE),
            ("strength", settings.strength, _USUAL_STRENGTH),
            ("the values in latents", largest, _USUAL_LATENT),
        )
        if value > usual
    ]
    return f"lower {' and '.join(found)}" if found else ""


def check_array(name: str, array: object, shape: tuple[int, ...]) -> FloatArray:
    """Convert to a finite float32 array of `shape`.

    Raises:
        InputError: not an array of real numbers, another shape, or NaN or infinity in float32.
    """
    try:
        given = np.asarray(array)
    except Exception:  # arrays of other libraries may raise anything when they convert themselves
        raise InputError(f"{name} is not an array of real numbers but {type(array).__name__}") from None
    if given.dtype.kind not in "biuf":
        found = f"of {given.dtype}" if isinstance(array, np.ndarray) else type(array).__name__
        raise InputError(f"{name} is not an array of real numbers but {found}")
    with np.errstate(over="ignore"):
        result = given.astype(np.float32, copy=False)
    if result.shape != shape:
        raise InputError(f"{name} has shape {list(result.shape)}: it must be {list(shape)}")
    if not np.isfinite(result).all():
        raise InputError(f"{name} contains NaN or infinity: every number must be finite")
    return result


def _check_number(name: str, value: object, low: float, high: float) -> None:
    # NaN fails the comparison, and Python compares integers of any size exactly.
    numbers = int | float | np.integer | np.floating
    if not isinstance(value, bool) and isinstance(value, numbers) and low <= value <= high:
        return
    raise InputError(f"{name} is {short_repr(value)}: it must be between {low:g} and {high:g}")


def _check_interval(name: str, value: object, low: float, high: float) -> None:
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise InputError(f"{name} is {short_repr(value)}: it must be two numbers, the lowest and the highest timestep")
    for number in value:
        _check_number(name, number, low, high)
    if value[0] > value[1]:
        raise InputError(f"{name} is {short_repr(value)}: its first number must not be above its second")
