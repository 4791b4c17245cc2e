"""Step 5: both attention operators at every level of SD1.5 against PyTorch: `python -m benchmarks.gpu.attention`.

In this order, each case written when it was measured: the fused kernels and eager PyTorch at all cases; the same at a
head width of 64, which is what 40 would be if it were padded; a few launches that kernels/launch.py does not choose;
and last what torch.compile makes of the baselines.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from benchmarks.gpu.step import StepOptions, StepResults, step_options
from benchmarks.kernels.attention_cases import (
    HEADS,
    SD15_LEVELS,
    SUMMARY_ROWS,
    SUMMARY_SHARE,
    Case,
    CrossCase,
    Level,
    SelfCase,
    all_cases,
)
from benchmarks.kernels.command import Bench, line, measure, measure_compiled, summary
from benchmarks.timer import GpuTimer, HostTimer, Timer, measured_peaks
from moma_rt.errors import run_command

PROGRAM = "benchmarks.gpu.attention"
_SAMPLES = 30
# Candidates of a choice in kernels/launch.py, and the seconds that compiling and measuring them may take.
_LAUNCHES, _LAUNCH_SECONDS = 4, 30
_REHEARSED_LEVEL = Level(4, 16, 3)
_PADDED_WIDTH = 64


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the step; returns the exit code."""
    options = step_options(PROGRAM, sys.argv[1:] if arguments is None else arguments)
    return run_command(PROGRAM, lambda: _measure(options))


def _measure(options: StepOptions) -> int:
    dtype = torch.float16
    results = StepResults("attention", options, dtype="float16", cases=[], wrong=[], padded=[], tuning=[])
    timer: Timer = HostTimer(1) if options.rehearse else GpuTimer(_SAMPLES)
    sizes = {"size": 64, "copied": 2**16} if options.rehearse else {}
    bench = Bench(dtype, options.device, timer, measured_peaks(timer, dtype, options.device, **sizes))
    results.put(peaks=bench.peaks.described())
    cases = chosen_cases(options.rehearse)
    measured = []
    for case in cases:
        if options.is_over():
            break
        try:
            found = measure(case, bench)
        except SystemExit as wrong:
            # The others are worth knowing.
            results.add("wrong", str(wrong))
            continue
        measured.append(case)
        results.add("cases", found)
        print(line(found), flush=True)
    results.put(steps=summary(results["cases"]))
    for case in padded_cases(options.rehearse):
        if options.is_over():
            break
        results.add("padded", measure(case, bench))
    if not options.rehearse and not options.is_over(_LAUNCH_SECONDS):
        # Imported here because it needs Triton, which is not everywhere.
        from benchmarks.kernels.tuning import this_device, tuned

        tuned(timer, dtype, this_device(), _LAUNCHES, lambda found: results.put(tuning=found))
    compiled = 0
    # A rehearsal has seconds, and a compiler takes more for a case.
    for case, result in zip([] if options.rehearse else measured, results["cases"], strict=False):
        if options.is_over(5.0):
            break
        result["measured"] |= measure_compiled(case, bench)
        compiled += 1
        results.put(steps=summary(results["cases"]))
    wrong = len(results["wrong"])
    said = step_said(summary(results["cases"]))
    results.finish(
        f"{len(measured)} of {len(cases)} cases right, {wrong} wrong, {compiled} compiled; {said}", is_right=not wrong
    )
    return 1 if wrong else 0


def chosen_cases(rehearse: bool) -> list[Case]:
    """Every case, those of a whole step first; in a rehearsal one of each operator and form."""
    if not rehearse:
        return all_cases()
    level = _REHEARSED_LEVEL
    return [
        CrossCase(level, SUMMARY_ROWS, "soft"),
        *(SelfCase(level, SUMMARY_ROWS, "soft", form, SUMMARY_SHARE) for form in ("packed", "masked")),
    ]


def padded_cases(rehearse: bool) -> list[Case]:
    """The largest level with heads of 64 columns in place of 40."""
    largest = _REHEARSED_LEVEL if rehearse else SD15_LEVELS[0]
    level = Level(largest.grid, HEADS * (8 if rehearse else _PADDED_WIDTH), largest.layers)
    return [
        SelfCase(level, SUMMARY_ROWS, "soft", "packed", SUMMARY_SHARE),
        CrossCase(level, SUMMARY_ROWS, "soft"),
    ]


def step_said(steps: Sequence[Mapping[str, Any]]) -> str:
    """A step's attention with packed reference tokens and a soft gate."""
    step = next(row for row in steps if (row["form"], row["gate"]) == ("packed", "soft"))
    eager, own = step["eager_ms"], step["moma_ms"]
    return (
        f"{step['layers']} layers of a step {own} ms, eager {eager} ms ({step['over_eager']}x), "
        f"compiled {step['compiled_ms']} ms ({step['over_compiled']}x)"
    )


if __name__ == "__main__":
    sys.exit(main())
