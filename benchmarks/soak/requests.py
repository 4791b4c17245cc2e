"""Requests of the soak test: a pool of distinct requests, and a random sequence drawn from it."""

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
    """The kind of a drawn request: how it is made, and how it should end."""

    PICTURE = "picture"
    WATCHED = "watched"  # with a callback that never cancels
    CANCELLED = "cancelled"  # with a callback that cancels
    REFUSED = "refused"  # with an invalid argument
    ENROLLED = "enrolled"  # enrolls its subject again


@dataclass(frozen=True)
class Schedule:
    """What requests must share to be batched."""

    scheduler: str
    steps: int
    guidance_scale: float


# Few, so that requests can be batched; with and without guidance, multistep history, and noise in every step.
SCHEDULES = (Schedule("ddim", 6, 7.5), Schedule("dpmpp_2m", 4, 7.5), Schedule("lcm", 4, 1.0))
SUBJECTS = ("coffee cup", "mug", "red cup", "saucer")
_PROMPTS = (
    "A cup on a beach at sunset.",
    "On a wooden table, next to an open book.",
    "An oil painting, thick strokes.",
    "Snow on a mountain, early morning, long shadows over the valley, a photograph.",
)
_STRENGTHS = (0.4, 0.8, 1.0, 1.4)
# Requests for two pictures use separate seeds, so that no picture belongs to two requests.
_SEEDS, _FIRST_SEED_OF_TWO = 16, 1000


@dataclass(frozen=True)
class PictureRequest:
    """A request for one or two pictures. `embedding` is the seed of a random context embedding, or None."""

    schedule: Schedule
    subject: str = SUBJECTS[0]
    prompt: str = _PROMPTS[0]
    negative_prompt: str = ""
    strength: float = 1.0
    seed: int = 0
    num_images: int = 1
    embedding: int | None = None

    def options(self, embedding_width: int) -> dict[str, Any]:
        """Return the arguments of `Runtime.generate` other than the subject."""
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
        """Return one request for each of the pictures."""
        return [replace(self, seed=self.seed + index, num_images=1) for index in range(self.num_images)]


@dataclass(frozen=True)
class DrawnRequest:
    """A request of the run: its index in the pool, its kind, and its index in `MISTAKES` if it is to be refused."""

    kind: Kind
    chosen: int
    mistake: int = 0


# One of each kind of mistake; the last is only detected when its batch runs, together with valid requests.
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
# Percentages of requests.
_SHARES = MappingProxyType({Kind.WATCHED: 5, Kind.CANCELLED: 2, Kind.REFUSED: 2, Kind.ENROLLED: 1})


def pool(count: int, has_language_model: bool, seed: int) -> list[PictureRequest]:
    """Return `count` distinct requests.

    The first ones of each schedule differ in a single argument, so that mixing up just that argument would be noticed;
    the others are random. Without a language model all have an embedding, else some.
    """
    found = dict[PictureRequest, None]()
    for candidate in _candidates(np.random.default_rng(seed)):
        if not has_language_model and candidate.embedding is None:
            # One for each prompt, since it replaces the language model's embedding of the prompt.
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
    # Without guidance the negative prompt is unused, and random weights hardly react to the strength.
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


def draw_requests(count: int, pool_size: int, seed: int) -> list[DrawnRequest]:
    """Draw `count` requests, in the order in which they are made; the same arguments give the same requests."""
    rng = np.random.default_rng(seed)
    shares = {Kind.PICTURE: 100 - sum(_SHARES.values()), **_SHARES}
    by_share = [kind for kind, share in shares.items() for _ in range(share)]
    return [
        DrawnRequest(by_share[rng.integers(100)], int(rng.integers(pool_size)), int(rng.integers(len(MISTAKES))))
        for _ in range(count)
    ]


def photo_and_mask(subject: str) -> tuple[Image.Image, Image.Image]:
    """Return the photo and mask of one of `SUBJECTS`: the first two give about equally many reference tokens."""
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
