"""Requests and answers of the latency benchmark."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moma_rt.bundle.specs import Precision

RUNTIME = "moma-rt"
# The baselines that generate MoMA's picture.
ORIGINALS = ("eager", "compiled")
# The name of the subject of assets/coffee.jpg.
SUBJECT = "coffee cup"
_ASSETS = Path(__file__).resolve().parents[2] / "assets"
# Their combinations are more than the runtime's prompt cache holds.
_COLOURS = ("red", "blue", "green", "white", "black", "yellow", "brown", "grey", "pink")
_MATERIALS = ("glass", "paper", "metal", "wooden", "plastic", "stone", "clay", "tin", "bone")


@dataclass(frozen=True)
class Request:
    """A picture to generate. Equal `name` and `subject_seed` mean the same subject, which may already be enrolled.

    is_watched: generate with a callback after each step, for which the runtime enqueues the steps one by one.
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
        backend: the runtime's backend.
        subject: file of the subject of all requests; None if the runtime enrolls subjects.
        subject_name: the subject's name in the prompts of warm requests.
        threads: CPU threads of runtime and baselines; None leaves the choice to the libraries.
        embedding: float32 [1024] in place of the language model's embedding; None to run the language model.
        weights: the options of `export.compare` that say what the bundle was built from.
        baseline_precision: precision of the baselines; None for the bundle's.
        channels_last: whether the baselines' convolutions use the channels-last memory format.
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
        """The guidance scale: 1.0 (no guidance) for lcm, whose weights include it."""
        return 1.0 if self.scheduler == "lcm" else 7.5

    @property
    def is_guided(self) -> bool:
        return self.guidance_scale != 1.0

    @property
    def has_language_model(self) -> bool:
        return self.embedding is None


@dataclass(frozen=True, eq=False)
class Answer:
    """Total seconds and seconds by stage of a request, its picture uint8 [H,W,3], and foreground mask float32 [H,W].

    replay_seconds: host time to launch the captured graph of all steps; None if nothing was replayed.
    """

    seconds: float
    stages: Mapping[str, float]
    image: np.ndarray
    foreground_mask: np.ndarray | None
    replay_seconds: float | None = None


def requests(turn: int, subject_name: str = SUBJECT) -> dict[str, Request]:
    """Return a request of each kind, to be made in this order. Texts and seeds differ between turns.

    Args:
        subject_name: the subject's name in the warm requests.
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
    """Return a random context embedding, float32 [width], the same on every call."""
    return np.random.default_rng(0).standard_normal(width, dtype=np.float32)
