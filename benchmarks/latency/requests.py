"""What the latency benchmark asks for."""

from pathlib import Path

import numpy as np

from benchmarks.latency.contenders import SUBJECT, Request

_ASSETS = Path(__file__).resolve().parent.parent / "assets"
# More than the runtime keeps the texts of.
_COLOURS = ("red", "blue", "green", "white", "black", "yellow", "brown", "grey", "pink")
_MATERIALS = ("glass", "paper", "metal", "wooden", "plastic", "stone", "clay", "tin", "bone")


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
