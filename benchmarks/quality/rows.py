"""Vary one setting: scores of each value, and its pictures side by side: `python -m benchmarks.quality.rows BUNDLE`.

    strength   0.2 to 1.2, for contexts and for textures
    steps      4 to 50 of one scheduler
    scheduler  every scheduler, at 4 to 50 steps; those for distilled bases at their few, without guidance

Writes NAME_strength.json and NAME_strength.png, and so on; in the sheet, four subjects in a context and of a material.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

import numpy as np
from PIL import Image, ImageDraw

from benchmarks.environment import bundle_facts, environment, results_path, write_results
from benchmarks.quality.cases import CONTEXT, FULL, KEYS, TEXTURE, Setup
from benchmarks.quality.evaluation import Evaluated, evaluate
from benchmarks.quality.generation import Maker
from benchmarks.quality.judge import Judge
from benchmarks.quality.options import (
    FEW_STEPS,
    add_bundle_options,
    add_setup_options,
    load_runtime,
    names,
    selection_of,
    setup_of,
    shareable,
    usual_guidance,
)
from benchmarks.quality.scorers.scorer import Scorers
from benchmarks.quality.scores import SCORES
from benchmarks.quality.subjects import load_subjects, photo_of
from examples.mini_moma.icons import Icon
from moma_rt.errors import InputError, print_output, run_command
from moma_rt.files import atomic_write
from moma_rt.schedulers.tables import SCHEDULERS, schedule

PROGRAM = "benchmarks.quality.rows"
SWEEPS = ("strength", "steps", "scheduler")
_STRENGTHS = (0.2, 0.4, 0.6, 0.8, 1.0, 1.2)
_STEPS, _FEW_STEPS = (4, 6, 10, 20, 50), (4, 8)
_SHOWN = 4
# A picture's side in a sheet, and the room for texts.
_SIDE, _GAP, _LINE, _LABEL = 128, 4, 14, 120


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog=f"python -m {PROGRAM}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_bundle_options(p)
    add_setup_options(p)
    p.add_argument(
        "--vary", default="strength,steps", metavar="NAMES", help=f"of {', '.join(SWEEPS)} (default: strength,steps)"
    )
    p.add_argument("--subjects", type=int, default=12, metavar="N", help="the first N subjects (default: 12)")
    p.add_argument(
        "--contexts",
        default="beach,night,table,water",
        metavar="NAMES",
        help="contexts (default: beach,night,table,water)",
    )
    p.add_argument("--textures", default="gold,stone", metavar="NAMES", help="materials (default: gold,stone)")
    p.add_argument("--out", default="quality", metavar="NAME", help="first part of the files' names (default: quality)")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser().parse_args(given)
    return run_command(PROGRAM, lambda: _vary(options, given))


def _vary(options: argparse.Namespace, given: Sequence[str]) -> int:
    sweeps = names("--vary", "setting", options.vary, SWEEPS)
    if not sweeps:
        raise InputError(f"--vary {options.vary}: name one of {', '.join(SWEEPS)}")
    selection, usual = selection_of(options), setup_of(options)
    where = environment(shareable(PROGRAM, given, options.bundle))
    runtime, subjects, scorers = load_runtime(options), load_subjects(), Scorers()
    maker, judge = Maker(runtime, subjects, options.max_batch), Judge(scorers, subjects)
    for sweep in sweeps:
        columns = {
            label: evaluate(maker.make, judge, subjects, selection, setup, (label, FULL))
            for label, setup in setups(sweep, usual).items()
        }
        results = {
            "environment": where,
            "bundle": bundle_facts(runtime.bundle),
            "scorers": {"digest": scorers.digest},
            "settings": {**asdict(usual), "subjects": selection.count},
            "varied": sweep,
            "scores": {label: of.scores.summary() for label, of in columns.items()},
        }
        name = f"{options.out}_{sweep}"
        path = write_results(name, results)
        shown = results_path(name).with_suffix(".png")
        with atomic_write(shown) as temporary:
            sheet(columns, subjects).save(temporary)
        print_output(f"{path}\n{shown}\n{table(columns)}")
    return 0


def setups(sweep: str, usual: Setup) -> dict[str, Setup]:
    """Return the setups that vary one setting, by their labels."""
    if sweep == "strength":
        return {f"strength {value}": replace(usual, strength=value, texture_strength=value) for value in _STRENGTHS}
    if sweep == "steps":
        return {f"{steps} steps": replace(usual, steps=steps) for steps in _STEPS if _makes(usual.scheduler, steps)}
    return {
        f"{scheduler} {steps}": replace(
            usual, scheduler=scheduler, steps=steps, guidance_scale=usual_guidance(scheduler)
        )
        for scheduler in SCHEDULERS
        for steps in (_FEW_STEPS if scheduler in FEW_STEPS else _STEPS)
    }


def _makes(scheduler: str, steps: int) -> bool:
    try:
        schedule(scheduler, steps, 1.0)
    except InputError:
        return False
    return True


def sheet(columns: Mapping[str, Evaluated], subjects: Sequence[Icon]) -> Image.Image:
    """Draw the pictures of four subjects, a column for each setting: in one context each, and of one material."""
    first = next(iter(columns.values()))
    contexts, textures = ([key for key in first.scores.keys if key in KEYS[kind]] for kind in (CONTEXT, TEXTURE))
    rows = []
    for row in range(min(_SHOWN, len(first.pictures))):
        rows += [(row, keys[row % len(keys)]) for keys in (contexts, textures) if keys]
    step = _SIDE + _GAP
    image = Image.new("RGB", (_LABEL + (1 + len(columns)) * step, _LINE + len(rows) * step), "white")
    draw = ImageDraw.Draw(image)
    for column, label in enumerate(["photo", *columns]):
        draw.text((_LABEL + column * step, 0), label, fill="black")
    for index, (row, key) in enumerate(rows):
        top = _LINE + index * step
        draw.text((2, top + _SIDE // 2 - _LINE), f"{first.scores.subjects[row]}\n{key}", fill="black")
        place = first.scores.keys.index(key)
        shown = [photo_of(subjects, row).picture_hwc, *(of.pictures[row][place] for of in columns.values())]
        for column, picture in enumerate(shown):
            image.paste(Image.fromarray(np.asarray(picture)), (_LABEL + column * step, top))
    return image


def table(columns: Mapping[str, Evaluated]) -> str:
    """Return the means as a Markdown table, a row for each setting."""
    found = {label: of.scores.summary() for label, of in columns.items()}
    used = [name for name in SCORES if any(name in scores for scores in found.values())]
    lines = [f"| setting | {' | '.join(used)} |", "|---" * (len(used) + 1) + "|"]
    for label, of in found.items():
        numbers = [f"{of[name]['mean']:.3f}" for name in used]
        lines.append(f"| {label} | {' | '.join(numbers)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
