"""Draws stacked horizontal bars as SVG, readable on light and dark pages; equal numbers give equal bytes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import floor, log10

_WIDTH, _LABELS, _BAR, _GAP, _MARGIN, _LEGEND_COLUMNS, _LEGEND_LINE = 860, 350, 22, 10, 12, 5, 20
_TICKS = 5
_ROUND_STEPS = (1.0, 2.0, 5.0, 10.0)


@dataclass(frozen=True)
class Bar:
    """A bar: its label, and the lengths of its parts by name, each at least 0."""

    label: str
    parts: Mapping[str, float]

    @property
    def length(self) -> float:
        return sum(self.parts.values())


def stacked_bars(bars: Sequence[Bar], unit: str, colours: Mapping[str, str]) -> str:
    """Return an SVG document. Parts that are 0 in every bar are left out of the legend.

    Args:
        colours: the colour of each part, in their order from left to right.

    Raises:
        ValueError: there are no bars, all are empty, or a part has no colour.
    """
    if unknown := {name for bar in bars for name in bar.parts} - colours.keys():
        raise ValueError(f"parts without a colour: {', '.join(sorted(unknown))}")
    colours = {name: colour for name, colour in colours.items() if any(bar.parts.get(name) for bar in bars)}
    if not colours:
        raise ValueError(f"{len(bars)} bars without length: at least one part must be longer than 0")
    longest = max(bar.length for bar in bars)
    scale = (_WIDTH - _LABELS - 6 * _MARGIN) / longest
    bottom = _MARGIN + len(bars) * (_BAR + _GAP)
    legend_rows = -(-len(colours) // _LEGEND_COLUMNS)
    height = bottom + 30 + legend_rows * _LEGEND_LINE + _MARGIN
    shapes = [
        *(
            line
            for index, bar in enumerate(bars)
            for line in _bar(bar, _MARGIN + index * (_BAR + _GAP), scale, colours)
        ),
        *_axis(longest, bottom, scale, unit),
        *_legend(colours, bottom + 40),
    ]
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" '
            f'height="{height}" font-family="sans-serif" font-size="13">',
            f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
            *shapes,
            "</svg>\n",
        )
    )


def _bar(bar: Bar, top: float, scale: float, colours: Mapping[str, str]) -> list[str]:
    middle = top + _BAR * 0.7
    lines, left = [_text(bar.label, _LABELS - _MARGIN, middle, "end")], float(_LABELS)
    for name, colour in colours.items():
        if (length := bar.parts.get(name, 0.0)) > 0:
            title = f"<title>{escape(name)}: {length:.3g}</title>"
            place = f'x="{left:.1f}" y="{top}" width="{length * scale:.1f}" height="{_BAR}"'
            lines.append(f'<rect {place} fill="{colour}">{title}</rect>')
            left += length * scale
    return [*lines, _text(f"{bar.length:.3g}", left + 5, middle, "start")]


def _axis(longest: float, bottom: float, scale: float, unit: str) -> list[str]:
    step = tick_step(longest)
    lines = [f'<path d="M{_LABELS} {_MARGIN}V{bottom}H{_WIDTH - _MARGIN}" fill="none" stroke="#333333"/>']
    for index in range(floor(longest / step) + 1):
        lines.append(_text(f"{index * step:g}", _LABELS + index * step * scale, bottom + 16, "middle"))
    return [*lines, _text(unit, _LABELS - _MARGIN, bottom + 16, "end")]


def tick_step(longest: float) -> float:
    """Return the distance between an axis's ticks: 1, 2 or 5 times a power of ten, for about five ticks."""
    power = 10.0 ** floor(log10(longest / _TICKS))
    return next(step * power for step in _ROUND_STEPS if step * power >= longest / _TICKS * 0.999)


def _legend(colours: Mapping[str, str], top: float) -> list[str]:
    lines, width = [], (_WIDTH - 2 * _MARGIN) / _LEGEND_COLUMNS
    for index, (name, colour) in enumerate(colours.items()):
        left, y = _MARGIN + index % _LEGEND_COLUMNS * width, top + index // _LEGEND_COLUMNS * _LEGEND_LINE
        lines.append(f'<rect x="{left:.1f}" y="{y}" width="12" height="12" fill="{colour}"/>')
        lines.append(_text(name, left + 17, y + 11, "start"))
    return lines


def _text(text: str, x: float, y: float, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="#222222">{escape(text)}</text>'
