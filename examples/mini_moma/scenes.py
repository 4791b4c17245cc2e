"""Pictures of a subject with their masks: photos of it, and the pictures that a prompt asks for."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

from examples.mini_moma.backgrounds import CONTEXTS, SIDE, STUDIO, background, gradient, smooth_noise

Picture = npt.NDArray[np.uint8]
Generator = np.random.Generator
Draw = Callable[[str, Generator], Picture]

TEXTURES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "gold": ("made of gold", "in gold", "golden"),
        "wood": ("made of wood", "carved from wood", "wooden"),
        "ice": ("made of ice", "in ice", "frozen"),
        "stone": ("made of stone", "carved from stone", "as a statue"),
    }
)
CONTEXT_STRENGTH, TEXTURE_STRENGTH = 1.0, 0.4

_ADJECTIVES = frozenset({"golden", "wooden", "frozen"})
# Color by brightness, from the darkest.
_MATERIALS: Mapping[str, tuple[tuple[int, int, int], ...]] = MappingProxyType(
    {
        "gold": ((60, 30, 0), (170, 110, 10), (245, 195, 60), (255, 248, 190)),
        "wood": ((55, 28, 10), (105, 62, 28), (165, 108, 55), (225, 175, 115)),
        "ice": ((40, 90, 150), (105, 165, 210), (165, 220, 245), (250, 254, 255)),
        "stone": ((45, 45, 48), (100, 99, 97), (150, 148, 144), (215, 213, 208)),
    }
)
# The light of a place, a factor for each channel.
_LIGHT: Mapping[str, tuple[float, float, float]] = MappingProxyType(
    {
        "night": (0.55, 0.60, 0.90),
        "space": (0.85, 0.85, 1.0),
        "water": (0.72, 0.92, 1.0),
        "sunset": (1.0, 0.84, 0.74),
        "snow": (0.97, 1.0, 1.03),
        "desert": (1.03, 1.0, 0.93),
    }
)
_FLOATS = frozenset({"water", "space"})
_OPAQUE = 127


@dataclass(frozen=True, eq=False)
class Scene:
    """A picture, uint8 [128, 128, RGB], and where its subject is, bool [128, 128]."""

    picture_hwc: Picture
    mask_hw: npt.NDArray[np.bool_]


def with_article(name: str) -> str:
    """Return "a teapot" or "an owl"."""
    return f"{'an' if name[:1].lower() in 'aeiou' and not name.startswith(('uni', 'one')) else 'a'} {name}"


def context_prompt(name: str, phrase: str) -> str:
    """Return a prompt such as "A teapot on a beach."."""
    subject = with_article(name)
    return f"{subject[0].upper()}{subject[1:]} {phrase}."


def texture_prompt(name: str, phrase: str) -> str:
    """Return a prompt such as "A teapot made of gold." or "A golden teapot."."""
    return context_prompt(f"{phrase} {name}", "")[:-2] + "." if phrase in _ADJECTIVES else context_prompt(name, phrase)


def photo(rgba: Picture, rng: Generator, context: str | None = None, draw: Draw = background) -> Scene:
    """Show a subject [160, 160, RGBA] large, on a plain ground or in a place, in neutral light."""
    size, x, y = rng.uniform(0.78, 0.94), 0.5 + rng.uniform(-0.03, 0.03), 0.5 + rng.uniform(-0.03, 0.03)
    subject = _placed(rgba, size, (x, y), rng.uniform(-5, 5))
    return _over(draw(context or STUDIO, rng), subject, (1.0, 1.0, 1.0))


def target(rgba: Picture, context: str, rng: Generator, draw: Draw = background) -> Scene:
    """Show a subject [160, 160, RGBA] in a place (a key of `CONTEXTS`, or `STUDIO`), standing or floating in it."""
    ground = draw(context, rng).astype(float)
    rows, columns = np.nonzero(rgba[..., 3] > 40)
    height = rgba.shape[0]
    foot = (rows.max() + 1) / height - 0.5
    size, x = rng.uniform(0.62, 0.70), 0.5 + rng.uniform(-0.03, 0.03)
    if context in _FLOATS:
        y = 0.5 + rng.uniform(-0.03, 0.03)
    else:
        y = rng.uniform(0.85, 0.89) - foot * size
        half = np.ptp(columns) / height * size * SIDE * 0.48
        ground *= 1 - 0.8 * _shadow(x * SIDE, (y + foot * size) * SIDE, half)
    return _over(ground, _placed(rgba, size, (x, y), rng.uniform(-4, 4)), _LIGHT.get(context, (1.0, 1.0, 1.0)))


def textured(rgba: Picture, texture: str, rng: Generator) -> Picture:
    """Make a subject [160, 160, RGBA] of another material, a key of `TEXTURES`; its brightness pattern is kept."""
    brightness = rgba[..., :3].astype(float) @ (0.30, 0.59, 0.11) / 255
    low, high = np.percentile(brightness[rgba[..., 3] > 0], (3, 97))
    brightness = (0.12 + 0.76 * (brightness - low) / max(high - low, 0.15)).clip(0, 1)
    height, width = brightness.shape
    if texture == "gold":
        brightness = 0.5 + 0.5 * np.sin((brightness - 0.5) * np.pi)
    elif texture == "wood":
        bent = np.arange(height)[:, None] + 4 * smooth_noise(rng, height, width, 40)
        rings = np.sin(bent * 0.45 + smooth_noise(rng, height, width, 60) * 2)
        brightness = brightness * 0.7 + 0.15 + 0.10 * rings
    elif texture == "ice":
        brightness = brightness * 0.75 + 0.22 + 0.07 * np.abs(smooth_noise(rng, height, width, 20))
    else:
        brightness = brightness * 0.8 + 0.1 + 0.06 * smooth_noise(rng, height, width, 10)
    stops = [(index / 3, color) for index, color in enumerate(_MATERIALS[texture])]
    rgb = gradient(stops, 256)[(brightness.clip(0, 1) * 255).astype(int)]
    return np.concatenate([rgb.astype(np.uint8), rgba[..., 3:]], axis=-1)


def recolored(rgba: Picture, rng: Generator) -> Picture:
    """Rotate all colors of a subject [160, 160, RGBA] by a random angle."""
    rotation = hue_rotation(rng.uniform(0, 2 * np.pi))
    rgb = (rgba[..., :3].astype(float) @ rotation.T).clip(0, 255).astype(np.uint8)
    return np.concatenate([rgb, rgba[..., 3:]], axis=-1)


def hue_rotation(angle: float) -> npt.NDArray[np.float64]:
    """Return the matrix [3, 3] that rotates an RGB color about the gray axis by an angle in radians."""
    cosine, sine = np.cos(angle), np.sin(angle)
    same, next_, last = (cosine + (1 - cosine) / 3, (1 - cosine) / 3 - sine / 3**0.5, (1 - cosine) / 3 + sine / 3**0.5)
    return np.array([[same, next_, last], [last, same, next_], [next_, last, same]])


def varied(rgba: Picture, rng: Generator) -> Picture:
    """Recolor 40 % of the subjects [160, 160, RGBA] and mirror half of them, so that names do not tell colors."""
    if rng.random() < 0.4:
        rgba = recolored(rgba, rng)
    return np.ascontiguousarray(rgba[:, ::-1]) if rng.random() < 0.5 else rgba


def random_context(rng: Generator) -> tuple[str, str]:
    """Draw a place and one of its phrases."""
    context = tuple(CONTEXTS)[rng.integers(len(CONTEXTS))]
    return context, CONTEXTS[context][rng.integers(len(CONTEXTS[context]))]


def random_texture(rng: Generator) -> tuple[str, str]:
    """Draw a material and one of its phrases."""
    texture = tuple(TEXTURES)[rng.integers(len(TEXTURES))]
    return texture, TEXTURES[texture][rng.integers(len(TEXTURES[texture]))]


def _placed(rgba: Picture, size: float, center: tuple[float, float], degrees: float) -> npt.NDArray[np.float64]:
    """Put a subject on an empty canvas [128, 128, RGBA]; size and center are shares of the side."""
    side = max(8, round(size * SIDE))
    image = Image.fromarray(rgba).resize((side, side), Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (SIDE, SIDE))
    left, top = (round(at * SIDE - side / 2) for at in center)
    canvas.paste(image.rotate(degrees, Image.Resampling.BICUBIC), (left, top))
    return np.asarray(canvas).astype(float)


def _over(
    ground: npt.NDArray[np.generic], subject: npt.NDArray[np.float64], light: tuple[float, float, float]
) -> Scene:
    alpha = subject[..., 3:] / 255
    picture = ground.astype(float) * (1 - alpha) + subject[..., :3] * light * alpha
    return Scene(picture.clip(0, 255).astype(np.uint8), subject[..., 3] > _OPAQUE)


def _shadow(x: float, y: float, half_width: float) -> npt.NDArray[np.float64]:
    """A soft ellipse on the ground, 0..1 [128, 128, 1]."""
    image = Image.new("L", (SIDE, SIDE))
    ImageDraw.Draw(image).ellipse((x - half_width, y - 4, x + half_width, y + 5), fill=130)
    return np.asarray(image.filter(ImageFilter.GaussianBlur(2.5)))[..., None] / 255
