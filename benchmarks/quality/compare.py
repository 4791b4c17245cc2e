"""Compare two evaluations, paired by subject: `python -m benchmarks.quality.compare A.json B.json`.

Compares the pictures that both have: of two precisions, schedulers, numbers of steps, or presets. An interval that
holds no zero is a difference.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.scores import SCORES, Scores, paired_difference
from moma_rt.errors import InputError, print_output, run_command

PROGRAM = "benchmarks.quality.compare"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog=f"python -m {PROGRAM}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("first", type=Path, metavar="A.json", help="written by python -m benchmarks.quality")
    p.add_argument("second", type=Path, metavar="B.json", help="likewise")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = parser().parse_args(arguments)
    return run_command(PROGRAM, lambda: _compare(options.first, options.second))


def _compare(first: Path, second: Path) -> int:
    one, other = _read(first), _read(second)
    if one["scorers"]["digest"] != other["scorers"]["digest"]:
        raise InputError(
            f"{first} was judged by scorers {one['scorers']['digest']}, {second} by {other['scorers']['digest']}: "
            "evaluate both with the same"
        )
    print_output(table(*(Scores.from_json(results["pictures"]["full"]) for results in (one, other))))
    return 0


def _read(path: Path) -> Mapping[str, Any]:
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        # Read here, so that a file of another kind is refused before anything is printed.
        Scores.from_json(content["pictures"]["full"])
        content["scorers"]["digest"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path} is no result of python -m benchmarks.quality") from None
    found: Mapping[str, Any] = content
    return found


def table(one: Scores, other: Scores) -> str:
    """Return the differences as a Markdown table.

    Raises:
        InputError: they share no picture.
    """
    lines = []
    for name in SCORES:
        difference = paired_difference(one, other, name)
        if difference is None:
            continue
        low, high = difference["interval"]
        lines.append(f"| {name} | {difference['mean']:+.3f} | {low:+.3f} to {high:+.3f} |")
    if not lines:
        raise InputError("the two evaluations share no picture")
    return "\n".join(["| score | B minus A | 95 % |", "|---|---|---|", *lines])


if __name__ == "__main__":
    sys.exit(main())
