"""What the soak benchmark asks for: a pool of different requests, and a long mixed draw from it. Pure data."""

import enum
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageOps

_ASSETS = Path(__file__).resolve().parents[2] / "assets"


class Kind(enum.Enum):
    """What becomes of a request that was drawn."""

    PICTURE = "picture"
    WATCHED = "watched"  # with a callback that lets every step pass
    CANCELLED = "cancelled"  # by its callback
    REFUSED = "refused"  # for a mistake in it
    ENROLLED = "enrolled"  # its subject, once more


@dataclass(frozen=True)
class Schedule:
    """What requests must have in common to be made together."""

    scheduler: str
    steps: int
    guidance_scale: float


# Few, so that requests meet others of their schedule; with and without guidance, history and noise at every step.
SCHEDULES = (Schedule("ddim", 6, 7.5), Schedule("dpmpp_2m", 4, 7.5), Schedule("lcm", 4, 1.0))
SUBJECTS = ("coffee cup", "mug", "red cup", "saucer")
_PROMPTS = (
    "A cup on a beach at sunset.",
    "On a wooden table, next to an open book.",
    "An oil painting, thick strokes.",
    "Snow on a mountain, early morning, long shadows over the valley, a photograph.",
)
_STRENGTHS = (0.4, 0.8, 1.0, 1.4)
# Requests of two pictures have seeds of their own: no picture belongs to two requests.
_SEEDS, _FIRST_SEED_OF_TWO = 16, 1000


@dataclass(frozen=True)
class PictureRequest:
    """One or two pictures. `embedding`, if any, is a seed of the numbers given in the language model's place."""

    schedule: Schedule
    subject: str = SUBJECTS[0]
    prompt: str = _PROMPTS[0]
    negative_prompt: str = ""
    strength: float = 1.0
    seed: int = 0
    num_images: int = 1
    embedding: int | None = None

    def options(self, embedding_width: int) -> dict[str, Any]:
        """What `Runtime.generate` is given beside the subject."""
        schedule, embedding = self.schedule, None
        if self.embedding is not None:
            embedding = np.random.default_rng(self.embedding).standard_normal(embedding_width, dtype=np.float32)
        return {
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "strength": self.strength,
            "scheduler": schedule.scheduler,
            "steps": schedule.steps,
            "guidance_scale": schedule.guidance_scale,
            "seed": self.seed,
            "num_images": self.num_images,
            "context_embedding": embedding,
        }

    def single(self) -> list["PictureRequest"]:
        """The same pictures, each asked for alone."""
        return [replace(self, seed=self.seed + index, num_images=1) for index in range(self.num_images)]


@dataclass(frozen=True)
class Drawn:
    """A request of the mixed run: which one of the pool, and what becomes of it."""

    kind: Kind
    chosen: int
    mistake: int = 0


# Each is a mistake of a kind of its own; the last one is found in the call's turn, beside others that are fine.
MISTAKES: Sequence[Mapping[str, Any]] = tuple(
    MappingProxyType(mistake)
    for mistake in (
        {"strength": 2.5},
        {"steps": 0},
        {"scheduler": "ddpm"},
        {"num_images": 65},
        {"guidance_scale": float("nan")},
        {"context_embedding": np.zeros(3, np.float32)},
        {"prompt": "x" * 20000, "context_embedding": None},
    )
)
# Out of a hundred requests.
_SHARES = MappingProxyType({Kind.WATCHED: 5, Kind.CANCELLED: 2, Kind.REFUSED: 2, Kind.ENROLLED: 1})


def pool(count: int, has_language_model: bool, seed: int) -> list[PictureRequest]:
    """`count` different requests.

    First, of every schedule, those that differ from its first one in a single thing, so that mixing up that thing alone
    would be seen; then whatever is drawn. With a language model some have an embedding in its place, else all do.
    """
    found = dict[PictureRequest, None]()
    for candidate in _candidates(np.random.default_rng(seed)):
        if not has_language_model and candidate.embedding is None:
            # One a prompt: it stands for a reading of the prompt.
            candidate = replace(candidate, embedding=_PROMPTS.index(candidate.prompt))
        found[candidate] = None
        if len(found) == count:
            break
    return list(found)


def _candidates(rng: np.random.Generator) -> Iterator[PictureRequest]:
    firsts = [PictureRequest(schedule) for schedule in SCHEDULES]
    for changed in (
        {},
        *({"subject": name} for name in SUBJECTS[1:]),
        *({"prompt": prompt} for prompt in _PROMPTS[1:]),
        {"seed": 1},
        {"seed": _FIRST_SEED_OF_TWO, "num_images": 2},
        {"embedding": len(_PROMPTS)},
    ):
        yield from (replace(first, **changed) for first in firsts)
    # Without guidance the one is not read, and random weights hardly show the other.
    for changed in ({"negative_prompt": "blurry"}, {"strength": 0.4}):
        yield from (replace(first, **changed) for first in firsts if first.schedule.guidance_scale != 1.0)
    while True:
        count = int(rng.integers(1, 3))
        first_seed = 0 if count == 1 else _FIRST_SEED_OF_TWO
        yield PictureRequest(
            SCHEDULES[rng.integers(len(SCHEDULES))],
            SUBJECTS[rng.integers(len(SUBJECTS))],
            _PROMPTS[rng.integers(len(_PROMPTS))],
            strength=_STRENGTHS[rng.integers(len(_STRENGTHS))],
            seed=first_seed + 2 * int(rng.integers(_SEEDS)),
            num_images=count,
        )


def draw_requests(count: int, pool_size: int, seed: int) -> list[Drawn]:
    """`count` requests in the order in which they are made; equal numbers draw the same ones."""
    rng = np.random.default_rng(seed)
    shares = {Kind.PICTURE: 100 - sum(_SHARES.values()), **_SHARES}
    by_share = [kind for kind, share in shares.items() for _ in range(share)]
    return [
        Drawn(by_share[rng.integers(100)], int(rng.integers(pool_size)), int(rng.integers(len(MISTAKES))))
        for _ in range(count)
    ]


def photo_and_mask(subject: str) -> tuple[Image.Image, Image.Image]:
    """What a subject of `SUBJECTS` is enrolled of: the first two leave about as many reference tokens, others more."""
    photo, mask = (Image.open(_ASSETS / name) for name in ("coffee.jpg", "coffee_mask.png"))
    mask = mask.convert("L")
    if subject == SUBJECTS[0]:
        return photo, mask
    photo = ImageOps.mirror(photo)
    if subject == SUBJECTS[1]:
        return photo, ImageOps.mirror(mask)
    width, height = photo.size
    left, top = {SUBJECTS[2]: (0, 0), SUBJECTS[3]: (5 * width // 8, 5 * height // 8)}[subject]
    drawn = Image.new("L", photo.size)
    ImageDraw.Draw(drawn).rectangle((left, top, width, height), fill=255)
    return photo, drawn
