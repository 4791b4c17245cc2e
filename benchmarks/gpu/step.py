"""Shared by all steps: command-line options, and results that are written after every case."""

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.environment import environment, shareable_command, write_results
from benchmarks.gpu.runner import GRACE, SECONDS_VARIABLE
from moma_rt import backends
from moma_rt.errors import print_output


@dataclass(frozen=True)
class StepOptions:
    """How a step runs.

    Attributes:
        program: the step's module.
        given: its command-line arguments.
        bundles: folders of bundles; the first usable one counts.
        rehearse: run on a CPU, with eager calls in place of CUDA graphs, and only a minimum of cases.
        end: time of `time.monotonic` after which no case starts.
        part: the part of the step to run, if it has several.
    """

    program: str
    given: tuple[str, ...]
    bundles: tuple[Path, ...]
    backend: str
    rehearse: bool
    end: float
    part: str = ""

    @property
    def device(self) -> str:
        return "cpu" if self.rehearse else "cuda"

    def is_over(self, needed: float = 0.0) -> bool:
        """Return whether less than `needed` seconds are left."""
        return time.monotonic() + needed > self.end


def step_options(
    program: str, arguments: Sequence[str], parts: Sequence[str] = (), *, description: str | None = None
) -> StepOptions:
    """Parse the arguments that every step takes, and the part to run, by default the first of `parts`."""
    p = argparse.ArgumentParser(
        prog=f"python -m {program}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--bundle",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="bundle to measure; may be repeated, then the first usable one counts",
    )
    p.add_argument(
        "--backend", default="inductor", choices=backends.NAMES, help="backend of the runtime (default: inductor)"
    )
    p.add_argument("--rehearse", action="store_true", help="run a minimal version on a CPU, to test the step")
    if parts:
        p.add_argument(
            "part", nargs="?", choices=parts, default=parts[0], help="part of the step to run (default: %(default)s)"
        )
    seconds = float(os.environ.get(SECONDS_VARIABLE, "600"))
    p.add_argument("--seconds", type=float, default=seconds, help=f"time limit (default: ${SECONDS_VARIABLE}, or 600)")
    options = p.parse_args(arguments)
    # Leaves time for the running case and the process to end.
    end = time.monotonic() + options.seconds - GRACE
    given = tuple(str(argument) for argument in arguments)
    part = options.part if parts else ""
    return StepOptions(program, given, tuple(options.bundle), options.backend, options.rehearse, end, part)


class StepResults:
    """The results of a step, in a JSON file that is rewritten by every call."""

    def __init__(self, name: str, options: StepOptions, **facts: Any) -> None:
        self._name = name
        where = environment(shareable_command(options.program, options.given))
        self._data: dict[str, Any] = {"environment": where, "rehearsal": options.rehearse, "complete": False, **facts}
        self._write()

    def __getitem__(self, key: str) -> Any:
        return self._data[key]

    def put(self, **values: Any) -> None:
        """Set some values."""
        self._data.update(values)
        self._write()

    def add(self, key: str, case: Any) -> None:
        """Append a case to a list."""
        self._data.setdefault(key, []).append(case)
        self._write()

    def finish(self, summary: str, **values: Any) -> None:
        """Mark the results as complete, and print the summary in one line."""
        self.put(**values, complete=True, summary=summary)
        print_output(" ".join(summary.splitlines()))

    def _write(self) -> Path:
        return write_results(self._name, self._data)
