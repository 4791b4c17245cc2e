"""What the steps of a lease have in common: their options, and results that are written after every case."""

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.environment import environment, repeatable, write_results
from benchmarks.gpu.runner import GRACE, SECONDS_VARIABLE
from moma_rt import backends
from moma_rt.errors import print_output


@dataclass(frozen=True)
class StepOptions:
    """How a step runs.

    Attributes:
        program: its module.
        given: its arguments.
        bundles: folders of bundles; of several the first that will do is meant.
        rehearse: on a CPU, eager calls in place of CUDA graphs, and as little of everything as shows that it runs.
        end: of the clock `time.monotonic`; no case is started later.
        part: of the step, where it has several.
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
        """Whether less than `needed` seconds are left."""
        return time.monotonic() + needed > self.end


def step_options(program: str, arguments: Sequence[str], parts: Sequence[str] = ()) -> StepOptions:
    """Parse the arguments that every step takes, and which of `parts` is meant, the first where none is named."""
    p = argparse.ArgumentParser(prog=f"python -m {program}")
    p.add_argument("--bundle", type=Path, action="append", default=[], metavar="DIR")
    p.add_argument("--backend", default="inductor", choices=backends.NAMES, help="of the runtime (default: inductor)")
    p.add_argument("--rehearse", action="store_true", help="run on a CPU, as little as shows that every line runs")
    if parts:
        p.add_argument("part", nargs="?", choices=parts, default=parts[0], help="(default: %(default)s)")
    seconds = float(os.environ.get(SECONDS_VARIABLE, "600"))
    p.add_argument("--seconds", type=float, default=seconds, help=f"that there are (default: ${SECONDS_VARIABLE})")
    options = p.parse_args(arguments)
    # What runs when time is up takes a moment to end, and so does the process.
    end = time.monotonic() + options.seconds - GRACE
    given = tuple(str(argument) for argument in arguments)
    part = options.part if parts else ""
    return StepOptions(program, given, tuple(options.bundle), options.backend, options.rehearse, end, part)


class StepResults:
    """Results of a step, in one JSON file that is complete after every call."""

    def __init__(self, name: str, options: StepOptions, **facts: Any) -> None:
        self._name = name
        where = environment(repeatable(options.program, options.given))
        self._data: dict[str, Any] = {"environment": where, "rehearsal": options.rehearse, "complete": False, **facts}
        self._write()

    def __getitem__(self, key: str) -> Any:
        return self._data[key]

    def put(self, **values: Any) -> None:
        """Replace some values."""
        self._data.update(values)
        self._write()

    def add(self, key: str, case: Any) -> None:
        """Append a case to a list."""
        self._data.setdefault(key, []).append(case)
        self._write()

    def finish(self, summary: str, **values: Any) -> None:
        """Say that nothing follows, and print the one line that sums it up."""
        self.put(**values, complete=True, summary=summary)
        print_output(" ".join(summary.splitlines()))

    def _write(self) -> Path:
        return write_results(self._name, self._data)
