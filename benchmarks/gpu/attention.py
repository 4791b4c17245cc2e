"""Step 5: time both attention operators at every level of SD1.5 against PyTorch: `python -m benchmarks.gpu.attention`.

Measures in this order, and writes the results after each case: the fused kernels and eager PyTorch in all cases; the
same at a head width of 64, to which 40 would be padded; a few launches that kernels/launch.py does not choose; and the
baselines in torch.compile.
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
# Candidates per entry in kernels/launch.py, and the seconds needed to compile and time them.
_LAUNCHES, _LAUNCH_SECONDS = 4, 30
_REHEARSED_LEVEL = Level(4, 16, 3)
_PADDED_WIDTH = 64


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the step; returns the exit code."""
    options = step_options(PROGRAM, sys.argv[1:] if arguments is None else arguments, description=__doc__)
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
            # Continue with the other cases.
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
    # Too slow for a rehearsal.
    for case, result in zip([] if options.rehearse else measured, results["cases"], strict=False):
        if options.is_over(5.0):
            break
        result["measured"] |= measure_compiled(case, bench)
        compiled += 1
        results.put(steps=summary(results["cases"]))
    wrong = len(results["wrong"])
    said = describe_step(summary(results["cases"]))
    results.finish(
        f"{len(measured)} of {len(cases)} cases right, {wrong} wrong, {compiled} compiled; {said}", is_right=not wrong
    )
    return 1 if wrong else 0


def chosen_cases(rehearse: bool) -> list[Case]:
    """Return all cases, those of a step's summary first; in a rehearsal one of each operator and form."""
    if not rehearse:
        return all_cases()
    level = _REHEARSED_LEVEL
    return [
        CrossCase(level, SUMMARY_ROWS, "soft"),
        *(SelfCase(level, SUMMARY_ROWS, "soft", form, SUMMARY_SHARE) for form in ("packed", "masked")),
    ]


def padded_cases(rehearse: bool) -> list[Case]:
    """Return cases of the largest level with a head width of 64 in place of 40."""
    largest = _REHEARSED_LEVEL if rehearse else SD15_LEVELS[0]
    level = Level(largest.grid, HEADS * (8 if rehearse else _PADDED_WIDTH), largest.layers)
    return [
        SelfCase(level, SUMMARY_ROWS, "soft", "packed", SUMMARY_SHARE),
        CrossCase(level, SUMMARY_ROWS, "soft"),
    ]


def describe_step(steps: Sequence[Mapping[str, Any]]) -> str:
    """Describe a step's attention with packed reference tokens and a soft gate."""
    step = next(row for row in steps if (row["form"], row["gate"]) == ("packed", "soft"))
    eager, own = step["eager_ms"], step["moma_ms"]
    return (
        f"{step['layers']} layers of a step {own} ms, eager {eager} ms ({step['over_eager']}x), "
        f"compiled {step['compiled_ms']} ms ({step['over_compiled']}x)"
    )


if __name__ == "__main__":
    sys.exit(main())
