"""What the latency benchmark asks of each contender, and what they answer."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moma_rt.bundle.specs import Precision

RUNTIME = "moma-rt"
# Those that make MoMA's picture come first.
ORIGINALS = ("eager", "compiled")
# What the subject of assets/coffee.jpg is called.
SUBJECT = "coffee cup"
_ASSETS = Path(__file__).resolve().parents[2] / "assets"
# More than the runtime keeps the texts of.
_COLOURS = ("red", "blue", "green", "white", "black", "yellow", "brown", "grey", "pink")
_MATERIALS = ("glass", "paper", "metal", "wooden", "plastic", "stone", "clay", "tin", "bone")


@dataclass(frozen=True)
class Request:
    """A picture to be made. Equal names and `subject_seed` mean one subject, which a runtime may have enrolled.

    is_watched: with a callback after each step, for which a runtime enqueues the steps one by one.
    """

    photo: Path
    mask: Path
    name: str
    prompt: str
    subject_seed: int
    seed: int
    is_watched: bool = False


@dataclass(frozen=True, eq=False)
class Settings:
    """What all requests share.

    Attributes:
        backend: of the runtime.
        subject: file of the subject that all requests are of; None where the runtime enrolls them.
        subject_name: what the warm requests' prompts call their subject.
        threads: of the CPU, on both sides; None leaves the choice to the libraries.
        embedding: float32 [1024] in place of the language model's; None where the language model runs.
        weights: the options that say what the bundle was made of, as `export.compare` has them.
        baseline_precision: of the baselines; None: the bundle's.
        channels_last: whether the baselines' convolutions have their channels last in memory.
    """

    bundle: Path
    backend: str
    steps: int
    scheduler: str
    embedding: np.ndarray | None
    weights: argparse.Namespace
    subject: Path | None = None
    subject_name: str = SUBJECT
    threads: int | None = None
    baseline_precision: Precision | None = None
    channels_last: bool = False
    strength: float = 1.0

    @property
    def guidance_scale(self) -> float:
        """1.0, which is none, where it is built into the weights that the scheduler is for."""
        return 1.0 if self.scheduler == "lcm" else 7.5

    @property
    def is_guided(self) -> bool:
        return self.guidance_scale != 1.0

    @property
    def has_language_model(self) -> bool:
        return self.embedding is None


@dataclass(frozen=True, eq=False)
class Answer:
    """How long a request took in all and by stage, and its picture: uint8 [H,W,3], foreground mask float32 [H,W].

    replay_seconds: how long the host took to hand all its steps to the device, where that replayed a recording.
    """

    seconds: float
    stages: Mapping[str, float]
    image: np.ndarray
    foreground_mask: np.ndarray | None
    replay_seconds: float | None = None


def requests(turn: int, subject_name: str = SUBJECT) -> dict[str, Request]:
    """A request of each kind, in an order in which it is what it is named. Other turns have other texts and seeds.

    subject_name: of the warm ones.
    """
    photo, mask = _ASSETS / "coffee.jpg", _ASSETS / "coffee_mask.png"
    colour, material = _COLOURS[turn % len(_COLOURS)], _MATERIALS[turn // len(_COLOURS) % len(_MATERIALS)]
    name, prompt = f"{colour} {material} cup", f"A {subject_name} on a beach, picture number {turn}."
    return {
        "cold": Request(photo, mask, name, f"A {name} on a beach, picture number {turn}.", 1 + turn, 3 * turn),
        "warm": Request(photo, mask, subject_name, prompt, 0, 3 * turn + 1),
        "warm_cached_prompt": Request(photo, mask, subject_name, prompt, 0, 3 * turn + 2),
        "warm_watched": Request(photo, mask, subject_name, prompt, 0, 3 * turn + 1, is_watched=True),
    }


def random_embedding(width: int) -> np.ndarray:
    """Stands for the language model's reading of photo and prompt: float32 [width], the same on every call."""
    return np.random.default_rng(0).standard_normal(width, dtype=np.float32)
