"""The 50 subjects of the evaluation, which no training has seen: `python -m benchmarks.quality.subjects` writes them.

They lie beside this module as one sheet of icons and a list of their names, so that the evaluation downloads nothing.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from examples.mini_moma.icons import ICON_SIDE, Icon, heldout_names, load_icons
from examples.mini_moma.scenes import CONTEXTS, Scene, photo
from moma_rt.errors import InputError, print_output, run_command
from moma_rt.files import atomic_write_all

PROGRAM = "benchmarks.quality.subjects"
COUNT = 50
STYLES = ("fluent", "noto")
_COLUMNS = 10
_FOLDER = Path(__file__).parent
_SHEET, _NAMES = _FOLDER / "subjects.png", _FOLDER / "subjects.json"
_CHOICE_SEED, _PHOTO_SEED = 14, 1000


def load_subjects() -> tuple[Icon, ...]:
    """Return the subjects, always in the same order: neighbours differ in name and style."""
    listed = json.loads(_NAMES.read_text(encoding="utf-8"))
    with Image.open(_SHEET) as image:
        sheet = np.asarray(image.convert("RGBA"))
    rows = sheet.reshape(-1, ICON_SIDE, _COLUMNS, ICON_SIDE, 4).swapaxes(1, 2).reshape(-1, ICON_SIDE, ICON_SIDE, 4)
    return tuple(
        Icon(entry["name"], entry["style"], rgba) for entry, rgba in zip(listed, rows[: len(listed)], strict=True)
    )


def photo_of(subjects: Sequence[Icon], index: int) -> Scene:
    """Return the photo that subject `index` is enrolled from, always the same: of every other one in a place."""
    rng = np.random.default_rng(_PHOTO_SEED + index)
    place = None if index % 2 == 0 else tuple(CONTEXTS)[rng.integers(len(CONTEXTS))]
    return photo(subjects[index].rgba_hwc, rng, place)


def choose(icons: Sequence[Icon], names: frozenset[str]) -> list[Icon]:
    """Draw `COUNT` of the held-out names, always the same, and of each one style, by turns.

    Raises:
        InputError: there are fewer held-out names than that.
    """
    by_key = {(icon.name, icon.style): icon for icon in icons}
    known = sorted({icon.name for icon in icons} & names)
    if len(known) < COUNT:
        raise InputError(f"the icons have {len(known)} of the held-out names; {COUNT} are needed")
    chosen = []
    for turn, index in enumerate(np.random.default_rng(_CHOICE_SEED).permutation(len(known))[:COUNT]):
        styles = STYLES if turn % 2 == 0 else STYLES[::-1]
        chosen.append(next(by_key[known[index], style] for style in styles if (known[index], style) in by_key))
    return chosen


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog=f"python -m {PROGRAM}", description="Write the held-out subjects' sheet of icons.")
    p.add_argument(
        "--data",
        type=Path,
        default=Path("build/mini"),
        metavar="DIR",
        help="folder that `python -m examples.mini_moma data` wrote (default: build/mini)",
    )
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = parser().parse_args(arguments)
    return run_command(PROGRAM, lambda: _write(options.data))


def _write(data: Path) -> int:
    chosen = choose(load_icons(data), heldout_names())
    rows = -(-len(chosen) // _COLUMNS)
    sheet = Image.new("RGBA", (_COLUMNS * ICON_SIDE, rows * ICON_SIDE))
    for index, icon in enumerate(chosen):
        # Invisible pixels keep no color, which would only take space.
        visible = np.where(icon.rgba_hwc[..., 3:] > 0, icon.rgba_hwc, 0).astype(np.uint8)
        sheet.paste(Image.fromarray(visible), ((index % _COLUMNS) * ICON_SIDE, (index // _COLUMNS) * ICON_SIDE))
    names = json.dumps([{"name": icon.name, "style": icon.style} for icon in chosen], indent=0)
    with atomic_write_all([_SHEET, _NAMES]) as (sheet_path, names_path):
        sheet.save(sheet_path, optimize=True)
        names_path.write_text(names + "\n", encoding="utf-8")
    print_output(f"{_SHEET}: {len(chosen)} subjects, {_SHEET.stat().st_size / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
