"""Procedural places, each with the phrases that prompts call it by.

Details are large: the VAE keeps an eighth of the resolution, and the picture has 128 pixels a side.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

SIDE = 128
# Drawn at twice the size and averaged, for smooth edges.
_DRAWN = 2 * SIDE

Color = tuple[int, int, int]
Canvas = npt.NDArray[np.float64]
Generator = np.random.Generator

CONTEXTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "beach": ("on a beach", "on the beach", "at the seaside"),
        "snow": ("in the snow", "in a snowy landscape", "in winter"),
        "forest": ("in a forest", "in the woods", "among trees"),
        "night": ("at night", "under the stars", "in the night"),
        "table": ("on a wooden table", "on a table", "on a wooden desk"),
        "water": ("under water", "underwater", "in the deep sea"),
        "desert": ("in the desert", "in a desert", "on a sand dune"),
        "grass": ("on grass", "in a meadow", "on a green field"),
        "city": ("in a city", "in the city", "on a street"),
        "sunset": ("at sunset", "at dusk", "in front of a sunset"),
        "space": ("in space", "in outer space", "among the planets"),
        "brick": ("in front of a brick wall", "against a brick wall", "by a brick wall"),
    }
)
STUDIO = "studio"


def background(context: str, rng: Generator) -> npt.NDArray[np.uint8]:
    """Draw a place, uint8 [128, 128, 3]: a key of `CONTEXTS`, or `STUDIO` for a plain ground."""
    canvas = _PLACES[context](rng)
    if rng.random() < 0.5:
        canvas = canvas[:, ::-1]
    image = Image.fromarray(canvas.clip(0, 255).astype(np.uint8))
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX))


def gradient(stops: Sequence[tuple[float, Sequence[float]]], count: int) -> Canvas:
    """Interpolate colors linearly between stops (position in 0..1, color): [count, 3]."""
    positions = [position for position, _ in stops]
    colors = np.array([color for _, color in stops], dtype=float)
    at = np.linspace(0, 1, count)
    return np.stack([np.interp(at, positions, colors[:, channel]) for channel in range(3)], axis=-1)


def smooth_noise(rng: Generator, height: int, width: int, cell: int) -> npt.NDArray[np.float32]:
    """Smooth noise [height, width] with a standard deviation of about 1 and blobs of `cell` pixels."""
    coarse = rng.standard_normal((max(2, height // cell + 2), max(2, width // cell + 2))).astype(np.float32)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def _near(rng: Generator, color: Sequence[float], spread: float = 10) -> Color:
    red, green, blue = (int(np.clip(value + rng.uniform(-spread, spread), 0, 255)) for value in color)
    return red, green, blue


def _sky(rng: Generator, top: Color, bottom: Color, spread: float = 8) -> Image.Image:
    column = gradient([(0, _near(rng, top, spread)), (1, _near(rng, bottom, spread))], _DRAWN)
    return Image.fromarray(np.repeat(column[:, None], _DRAWN, 1).astype(np.uint8))


def _horizon(rng: Generator) -> int:
    return int(_DRAWN * rng.uniform(0.50, 0.60))


def _disc(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, color: Color) -> None:
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)


def _hill(draw: ImageDraw.ImageDraw, height: float, wave: tuple[float, float, float], color: Color) -> None:
    """Fill everything below a wavy line; `wave` is its amplitude, frequency and phase."""
    amplitude, frequency, phase = wave
    line = [(x, height + amplitude * math.sin(x / _DRAWN * frequency + phase)) for x in range(0, _DRAWN + 8, 8)]
    draw.polygon([*line, (_DRAWN, _DRAWN), (0, _DRAWN)], fill=color)


def _clouds(draw: ImageDraw.ImageDraw, rng: Generator, lowest: float) -> None:
    for _ in range(rng.integers(1, 4)):
        x, y = rng.integers(0, _DRAWN), rng.integers(12, int(lowest))
        for puff in range(4):
            radius = rng.integers(12, 24)
            left = x + puff * 15
            draw.ellipse((left - radius, y - radius * 0.6, left + radius, y + radius * 0.6), fill=(251, 253, 255))


def _stars(draw: ImageDraw.ImageDraw, rng: Generator, count: int, lowest: int) -> None:
    for _ in range(count):
        _disc(draw, rng.integers(0, _DRAWN), rng.integers(0, lowest), rng.uniform(1.4, 2.8), (245, 245, 225))


def _beach(rng: Generator) -> Canvas:
    horizon = _horizon(rng)
    image = _sky(rng, (90, 170, 240), (200, 232, 250))
    draw = ImageDraw.Draw(image)
    _clouds(draw, rng, horizon * 0.6)
    shore = horizon + _DRAWN * 0.14
    draw.rectangle((0, horizon, _DRAWN, shore + 8), fill=_near(rng, (30, 130, 190)))
    for _ in range(7):
        x, y = rng.integers(0, _DRAWN), rng.integers(horizon + 4, int(shore) - 4)
        draw.line((x, y, x + rng.integers(24, 60), y), fill=(120, 195, 225), width=4)
    phase = rng.uniform(0, 6)
    _hill(draw, shore - 4, (5, 6, phase), (250, 252, 255))
    _hill(draw, shore + 3, (5, 6, phase), _near(rng, (236, 206, 150)))
    return np.asarray(image).astype(float)


def _snow(rng: Generator) -> Canvas:
    horizon = _horizon(rng)
    image = _sky(rng, (165, 190, 225), (232, 240, 250))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(3, 6)):
        x, width, height = rng.integers(0, _DRAWN), rng.integers(50, 90), rng.integers(60, 100)
        foot = horizon + 6
        draw.polygon([(x - width, foot), (x, foot - height), (x + width, foot)], fill=_near(rng, (150, 172, 205), 12))
    for _ in range(rng.integers(3, 7)):
        x, height = rng.integers(0, _DRAWN), rng.integers(44, 76)
        foot, top = horizon + 8, horizon + 8 - height
        tree = [(x - height * 0.3, foot), (x, top), (x + height * 0.3, foot)]
        cap = [(x - height * 0.14, foot - height * 0.55), (x, top), (x + height * 0.14, foot - height * 0.55)]
        draw.polygon(tree, fill=_near(rng, (70, 105, 110)))
        draw.polygon(cap, fill=(245, 250, 255))
    _hill(draw, horizon, (7, 5, rng.uniform(0, 6)), _near(rng, (243, 247, 253), 4))
    for _ in range(26):
        _disc(draw, rng.integers(0, _DRAWN), rng.integers(0, _DRAWN), rng.uniform(2.2, 4), (255, 255, 255))
    return np.asarray(image).astype(float)


def _forest(rng: Generator) -> Canvas:
    image = _sky(rng, (175, 215, 175), (95, 150, 95))
    draw = ImageDraw.Draw(image)
    ground = int(_DRAWN * 0.70)
    layers = (((95, 150, 100), (100, 95, 75)), ((45, 105, 60), (85, 60, 40)), ((25, 80, 45), (70, 45, 30)))
    for depth, (leaves, trunk) in enumerate(layers):
        for _ in range(6 - depth):
            x, height, foot = rng.integers(0, _DRAWN), rng.integers(110, 190), ground + depth * 6
            draw.rectangle((x - 6, foot - height * 0.4, x + 6, foot), fill=_near(rng, trunk))
            color = _near(rng, leaves)
            for tier in range(3):
                width, base = height * (0.30 - 0.06 * tier), foot - height * (0.2 + 0.22 * tier)
                draw.polygon([(x - width, base), (x, base - height * 0.36), (x + width, base)], fill=color)
    draw.rectangle((0, ground + 8, _DRAWN, _DRAWN), fill=_near(rng, (90, 115, 55)))
    canvas = np.asarray(image).astype(float)
    rows = _DRAWN - ground - 8
    canvas[ground + 8 :] += 8 * smooth_noise(rng, rows, _DRAWN, 24)[..., None]
    return canvas


def _night(rng: Generator) -> Canvas:
    image = _sky(rng, (8, 12, 45), (40, 50, 110), 5)
    draw = ImageDraw.Draw(image)
    _stars(draw, rng, 34, int(_DRAWN * 0.7))
    x = rng.choice([rng.integers(28, 70), rng.integers(_DRAWN - 70, _DRAWN - 28)])
    y, radius = rng.integers(30, 60), rng.integers(18, 26)
    behind = image.getpixel((0, int(y)))
    assert isinstance(behind, tuple)
    _disc(draw, x, y, radius, (250, 245, 205))
    _disc(draw, x + radius * 0.55, y - radius * 0.2, radius * 0.85, behind[:3])
    _hill(draw, _DRAWN * 0.72, (10, 7, rng.uniform(0, 6)), _near(rng, (15, 28, 40), 5))
    return np.asarray(image).astype(float)


def _table(rng: Generator) -> Canvas:
    horizon = _horizon(rng)
    wall = np.array(_near(rng, (225, 205, 180), 25), dtype=float)
    canvas = np.repeat(gradient([(0, wall), (1, wall * 0.88)], _DRAWN)[:, None], _DRAWN, 1)
    rows = _DRAWN - horizon
    grain = np.asarray(
        Image.fromarray(rng.standard_normal((rows // 4, 5)).astype(np.float32)).resize(
            (_DRAWN, rows), Image.Resampling.BICUBIC
        )
    )
    wood = np.array(_near(rng, (150, 95, 50), 18), dtype=float) * (1 + 0.10 * grain[..., None])
    depth = np.arange(rows)
    wood[(depth**1.25) % (rows / rng.integers(3, 6) * 1.6) < 4] *= 0.62
    wood[:5] *= 1.25
    canvas[horizon:] = wood
    return canvas


def _water(rng: Generator) -> Canvas:
    canvas = np.asarray(_sky(rng, (60, 190, 215), (5, 50, 110))).astype(float)
    y, x = np.mgrid[0:_DRAWN, 0:_DRAWN] / _DRAWN
    slope = rng.uniform(-0.5, 0.5)
    for _ in range(4):
        center, width = rng.uniform(0, 1), rng.uniform(0.04, 0.09)
        canvas += (38 * np.exp(-(((x - center - slope * y) / width) ** 2)) * (1 - y))[..., None]
    image = Image.fromarray(canvas.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(8, 15)):
        left, top, radius = rng.integers(0, _DRAWN), rng.integers(0, _DRAWN), rng.uniform(5, 9)
        box = (left - radius, top - radius, left + radius, top + radius)
        draw.ellipse(box, outline=(190, 235, 250), width=3)
    floor = int(_DRAWN * 0.88)
    _hill(draw, floor, (5, 9, rng.uniform(0, 6)), _near(rng, (120, 140, 120)))
    for _ in range(5):
        left, height, color = rng.integers(0, _DRAWN), rng.integers(30, 75), _near(rng, (30, 130, 80), 20)
        stem = [(left + 5 * math.sin(up / 6), _DRAWN - up - 10) for up in range(0, height, 4)]
        draw.line(stem, fill=color, width=8)
    return np.asarray(image).astype(float)


def _desert(rng: Generator) -> Canvas:
    horizon = _horizon(rng)
    image = _sky(rng, (110, 175, 230), (250, 222, 170))
    draw = ImageDraw.Draw(image)
    _disc(draw, rng.integers(25, _DRAWN - 25), rng.integers(28, 60), rng.integers(16, 24), (255, 246, 200))
    for layer, color in enumerate(((225, 165, 95), (212, 145, 75), (196, 125, 60))):
        wave = (14, rng.uniform(3, 6), rng.uniform(0, 6))
        _hill(draw, horizon - 18 + layer * 24, wave, _near(rng, color, 8))
    for _ in range(rng.integers(1, 4)):
        x, foot, color = rng.integers(0, _DRAWN), horizon + rng.integers(0, 15), _near(rng, (60, 125, 70))
        draw.line((x, foot, x, foot - 44), fill=color, width=11)
        draw.line((x - 15, foot - 32, x - 15, foot - 19, x, foot - 19), fill=color, width=8)
        draw.line((x + 15, foot - 36, x + 15, foot - 23, x, foot - 23), fill=color, width=8)
    return np.asarray(image).astype(float)


def _grass(rng: Generator) -> Canvas:
    horizon = _horizon(rng)
    image = _sky(rng, (110, 190, 245), (215, 238, 250))
    draw = ImageDraw.Draw(image)
    _clouds(draw, rng, horizon * 0.6)
    _hill(draw, horizon - 14, (10, 5, rng.uniform(0, 6)), _near(rng, (120, 185, 85)))
    draw.rectangle((0, horizon + 8, _DRAWN, _DRAWN), fill=_near(rng, (85, 165, 60)))
    for _ in range(70):
        x, y, height = rng.integers(0, _DRAWN), rng.integers(horizon + 14, _DRAWN + 10), rng.integers(10, 20)
        draw.line((x, y, x + rng.integers(-5, 6), y - height), fill=_near(rng, (60, 145, 45), 25), width=4)
    flowers = ((255, 230, 80), (250, 250, 250), (240, 110, 140))
    for _ in range(rng.integers(5, 12)):
        x, y = rng.integers(0, _DRAWN), rng.integers(horizon + 18, _DRAWN)
        _disc(draw, x, y, 4.5, flowers[rng.integers(3)])
    return np.asarray(image).astype(float)


def _city(rng: Generator) -> Canvas:
    image = _sky(rng, (150, 185, 215), (225, 225, 220))
    draw = ImageDraw.Draw(image)
    street = int(_DRAWN * 0.74)
    glass = ((245, 225, 140), (200, 220, 240), (75, 85, 105))
    x = -int(rng.integers(0, 20))
    while x < _DRAWN:
        columns, rows = int(rng.integers(2, 4)), int(rng.integers(4, 7))
        width, height, shade = columns * 20 + 8, rows * 26 + 12, int(rng.integers(0, 40))
        color = (110 + shade + int(rng.integers(-10, 25)), 110 + shade, 120 + shade + int(rng.integers(-10, 25)))
        draw.rectangle((x, street - height, x + width, street), fill=color)
        for row in range(rows):
            for column in range(columns):
                left, top = x + 8 + column * 20, street - height + 12 + row * 26
                draw.rectangle((left, top, left + 11, top + 14), fill=glass[rng.integers(3)])
        x += width + int(rng.integers(0, 5))
    draw.rectangle((0, street, _DRAWN, _DRAWN), fill=_near(rng, (85, 87, 92)))
    draw.rectangle((0, street, _DRAWN, street + 9), fill=_near(rng, (175, 175, 175)))
    lane = int(_DRAWN * 0.92)
    for dash in range(-1, 6):
        draw.rectangle((dash * 56 + 10, lane, dash * 56 + 40, lane + 6), fill=(235, 220, 120))
    return np.asarray(image).astype(float)


def _sunset(rng: Generator) -> Canvas:
    horizon = int(_DRAWN * 0.66)
    colors = ((0, (85, 50, 115)), (0.5, (230, 95, 95)), (1, (255, 190, 95)))
    sky = gradient([(position, _near(rng, color)) for position, color in colors], horizon)
    sea = gradient([(0, _near(rng, (200, 100, 85))), (1, _near(rng, (60, 35, 75)))], _DRAWN - horizon)
    column = np.concatenate([sky, sea])
    image = Image.fromarray(np.repeat(column[:, None], _DRAWN, 1).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    x, radius = rng.integers(40, _DRAWN - 40), rng.integers(30, 44)
    draw.pieslice((x - radius, horizon - radius, x + radius, horizon + radius), 180, 360, fill=(255, 238, 150))
    for _ in range(10):
        y, width, center = rng.integers(horizon + 4, _DRAWN - 6), rng.integers(12, 34), x + rng.integers(-30, 30)
        draw.line((center - width, y, center + width, y), fill=(255, 205, 130), width=4)
    return np.asarray(image).astype(float)


def _space(rng: Generator) -> Canvas:
    canvas = np.asarray(_sky(rng, (6, 4, 16), (18, 10, 36), 4)).astype(float)
    for color, cell in (((40, 12, 56), 70), ((6, 21, 42), 50)):
        cloud = np.maximum(smooth_noise(rng, _DRAWN, _DRAWN, cell), 0)
        canvas += cloud[..., None] * np.array(_near(rng, color, 9))
    image = Image.fromarray(canvas.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    _stars(draw, rng, 40, _DRAWN)
    x = rng.choice([rng.integers(10, 60), rng.integers(_DRAWN - 60, _DRAWN - 10)])
    y, radius = rng.integers(20, 70), rng.integers(24, 38)
    _disc(draw, x, y, radius, _near(rng, (205, 130, 80), 45))
    ring = (x - radius * 1.7, y - radius * 0.5, x + radius * 1.7, y + radius * 0.5)
    draw.arc(ring, -15, 195, fill=(230, 210, 170), width=5)
    return np.asarray(image).astype(float)


def _brick(rng: Generator) -> Canvas:
    image = Image.new("RGB", (_DRAWN, _DRAWN), _near(rng, (205, 195, 185)))
    draw = ImageDraw.Draw(image)
    color, floor = _near(rng, (165, 80, 60), 15), int(_DRAWN * 0.84)
    height, width = 26, 56
    offset = int(rng.integers(0, width))
    for row in range(floor // height + 1):
        for column in range(-1, _DRAWN // width + 2):
            left, top = column * width + row % 2 * width // 2 - offset, row * height
            draw.rectangle((left, top, left + width - 5, top + height - 5), fill=_near(rng, color, 14))
    draw.rectangle((0, floor, _DRAWN, _DRAWN), fill=_near(rng, (150, 145, 140)))
    return np.asarray(image).astype(float)


def _studio(rng: Generator) -> Canvas:
    color = rng.uniform(150, 245, 3) if rng.random() < 0.5 else np.repeat(rng.uniform(190, 252), 3)
    return np.repeat(gradient([(0, color), (0.7, color * 0.96), (1, color * 0.84)], _DRAWN)[:, None], _DRAWN, 1)


_PLACES: Mapping[str, Callable[[Generator], Canvas]] = MappingProxyType(
    {
        "beach": _beach,
        "snow": _snow,
        "forest": _forest,
        "night": _night,
        "table": _table,
        "water": _water,
        "desert": _desert,
        "grass": _grass,
        "city": _city,
        "sunset": _sunset,
        "space": _space,
        "brick": _brick,
        STUDIO: _studio,
    }
)
