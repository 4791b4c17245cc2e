"""Read hardware counters of the three slowest kernels with Nsight Compute: `python -m benchmarks.gpu.counters
--bundle DIR [measure|steps]`.

The kernels' names come from profile.json, which the step "profile" writes. Nsight Compute runs the part `steps`: two
guided denoiser steps.
"""

import csv
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.environment import results_path
from benchmarks.gpu.generation import Generation, first_usable
from benchmarks.gpu.kernel_profile import HALVES
from benchmarks.gpu.step import StepOptions, StepResults, step_options
from moma_rt.errors import InputError, MomaError, print_output, run_command
from moma_rt.messages import one_line
from moma_rt.schedulers.tables import schedule

PROGRAM = "benchmarks.gpu.counters"
PARTS = ("measure", "steps")
_KERNELS = 3
_SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "LaunchStats")
_SUMMARY_METRIC = "Compute (SM) Throughput"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the step; returns the exit code."""
    options = step_options(PROGRAM, sys.argv[1:] if arguments is None else arguments, PARTS, description=__doc__)
    return run_command(PROGRAM, lambda: _measure(options) if options.part == "measure" else _steps(options))


def _measure(options: StepOptions) -> int:
    names = slowest(json.loads(_profile()))
    results = StepResults("counters", options, kernels=[])
    command = [sys.executable, "-m", PROGRAM, "steps", *options.given]
    if options.rehearse:
        # The command that Nsight Compute would run.
        _output(command)
    for name in [] if options.rehearse else names:
        if options.is_over(20.0):
            break
        results.add("kernels", {"name": name, "metrics": metrics(_output([*profiler(name), *command]))})
    found = results["kernels"]
    said = ", ".join(f"{one['name'][:40]} {one['metrics'].get(_SUMMARY_METRIC, '?')}" for one in found)
    results.finish(f"{len(found)} of {len(names)} kernels, {_SUMMARY_METRIC}: {said or 'none measured'}")
    return 0


def _steps(options: StepOptions) -> int:
    generation = Generation(*first_usable(options))
    buffers = generation.buffers(HALVES, schedule("ddim", 50, 7.5))
    for index in range(2):
        buffers.step(index, HALVES)
    generation.backend.synchronize()
    print_output("2 steps")
    return 0


def _profile() -> str:
    path = results_path("profile")
    if not path.is_file():
        raise InputError(f"{path} does not exist: run the step profile first")
    return path.read_text(encoding="utf-8")


def slowest(profile: Mapping[str, Any]) -> list[str]:
    """Return the names of the slowest kernels of a step."""
    return [kernel["name"] for kernel in profile["slowest"][:_KERNELS]]


def profiler(name: str) -> list[str]:
    """Return the Nsight Compute command that profiles the second launch of one kernel and prints CSV.

    Raises:
        InputError: Nsight Compute is not installed.
    """
    command = shutil.which("ncu")
    if command is None:
        raise InputError("ncu is not on the PATH; it is part of the CUDA toolkit")
    escaped = re.sub(r"([.^$*+?()\[\]{}|\\])", r"\\\1", name)
    which = ["--kernel-name-base", "demangled", "--kernel-name", f"regex:^{escaped}$"]
    sections = [word for section in _SECTIONS for word in ("--section", section)]
    return [command, "--csv", "--page", "details", *which, "--launch-skip", "1", "--launch-count", "1", *sections]


def _output(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = next((line for line in done.stdout.splitlines() if "==ERROR==" in line), done.stderr or done.stdout)
        raise MomaError(f"{command[0]} ended with {done.returncode}: {one_line(said)[-300:]}")
    return done.stdout


def metrics(text: str) -> dict[str, str]:
    """Parse Nsight Compute's CSV, after other output, into "value unit" by metric name."""
    lines = text.splitlines()
    start = next((index for index, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    rows = csv.DictReader(io.StringIO("\n".join(lines[start:])))
    found = {}
    for row in rows:
        if row.get("Metric Name"):
            found[row["Metric Name"]] = f"{row['Metric Value']} {row['Metric Unit']}".strip()
    return found


if __name__ == "__main__":
    sys.exit(main())
