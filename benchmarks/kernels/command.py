"""Time both fused kernels on a CUDA GPU, at every attention layer of Stable Diffusion 1.5, against PyTorch.

    python -m benchmarks.kernels [--out NAME] [--dtype float16|bfloat16] [--quick] [--minutes N] [--tune]

Every result is checked before it is timed; a wrong one ends the run. Rewrites benchmarks/results/NAME.json after every
case; compiled baselines come after all others of all cases. attention_baselines.py defines the baselines,
attention_cases.py the cases and their work.
"""

import argparse
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from benchmarks.environment import environment, percentiles, write_results
from benchmarks.kernels.attention_baselines import Baseline, Outputs, allowed_errors, baselines, is_within, worst_errors
from benchmarks.kernels.attention_cases import (
    FORMS,
    GATES,
    SUMMARY_ROWS,
    SUMMARY_SHARE,
    Case,
    SelfCase,
    all_cases,
    in_summary,
)
from benchmarks.timer import GpuTimer, Peaks, Timer, gpu_name, measured_peaks

DEVICE = "cuda"
SAMPLES = 60
DTYPES: Mapping[str, torch.dtype] = MappingProxyType({"float16": torch.float16, "bfloat16": torch.bfloat16})
EAGER = ("sdpa", "definition")
COMPILED = ("sdpa_compiled", "definition_compiled")
# The target speedups of a step's attention over PyTorch, eager and compiled.
TARGETS = (2.0, 1.3)


@dataclass(frozen=True)
class Bench:
    """How cases are measured."""

    dtype: torch.dtype
    device: str
    timer: Timer
    peaks: Peaks


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code, 2 without a GPU."""
    options = parser().parse_args(arguments)
    device_name = gpu_name()
    if device_name is None:
        print("benchmarks.kernels: error: needs a CUDA GPU, and PyTorch and Triton for it", file=sys.stderr)
        return 2
    started = time.monotonic()
    name = options.out or default_name(device_name, options)
    timer, dtype = GpuTimer(SAMPLES), DTYPES[options.dtype]
    results: dict[str, Any] = {"environment": environment(command_line(options)), "dtype": options.dtype}
    if options.tune:
        # Imported here because it needs Triton, which is not everywhere.
        from benchmarks.kernels.tuning import print_tuning, this_device, tuned

        def keep_tuning(found: list[dict[str, Any]]) -> None:
            write_results(name, {**results, "tuning": found})

        results["tuning"] = tuned(timer, dtype, this_device(), keep=keep_tuning)
        path = write_results(name, results)
        print_tuning(results["tuning"])
        print(path)
        return 0
    bench = Bench(dtype, DEVICE, timer, measured_peaks(timer, dtype, DEVICE))
    results["peaks"] = bench.peaks.described()
    print(f"peaks: {results['peaks']}")
    cases = [case for case in all_cases() if in_summary(case) or not options.quick]
    deadline = float("inf") if options.minutes is None else started + 60 * options.minutes

    def keep(found: list[dict[str, Any]]) -> None:
        write_results(name, {**results, "cases": found})

    results["cases"] = measured(cases, bench, deadline, keep)
    results["cases_left_out"] = len(cases) - len(results["cases"])
    results["summary"] = summary(results["cases"])
    path = write_results(name, results)
    print_summary(results["summary"])
    print(path)
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__.splitlines()[0])
    p.add_argument(
        "--out", type=_name, metavar="NAME", help="write benchmarks/results/NAME.json (default: named after the GPU)"
    )
    p.add_argument("--dtype", choices=DTYPES, default="float16", help="dtype of the tensors (default: %(default)s)")
    p.add_argument("--quick", action="store_true", help="measure only the cases that a step's summary needs")
    p.add_argument(
        "--minutes", type=float, metavar="N", help="start no case after N minutes; those of the summary come first"
    )
    p.add_argument(
        "--tune",
        action="store_true",
        help="measure launch configurations other than those of kernels/launch.py instead",
    )
    return p


def default_name(device: str, options: argparse.Namespace) -> str:
    """Return the default name of the results, such as kernels_nvidia_h200_bfloat16_tuning."""
    parts = ["kernels", *re.findall("[a-z0-9]+", device.lower())]
    return "_".join([*parts, *[options.dtype] * (options.dtype != "float16"), *["tuning"] * options.tune])


def command_line(options: argparse.Namespace) -> str:
    """Return the command line that repeats this run."""
    flags = [f"--{name}" for name in ("quick", "tune") if getattr(options, name)]
    values = [f"--{name} {value}" for name in ("out", "minutes") if (value := getattr(options, name)) is not None]
    return " ".join(["python -m benchmarks.kernels", f"--dtype {options.dtype}", *values, *flags])


def measured(
    cases: Sequence[Case], bench: Bench, deadline: float, keep: Callable[[list[dict[str, Any]]], None] = lambda _: None
) -> list[dict[str, Any]]:
    """Measure and print each case, until `time.monotonic()` passes `deadline`.

    The compiled baselines, which may take minutes, come after all others.

    Args:
        keep: called with the results so far whenever some were added.
    """
    found: list[dict[str, Any]] = []
    print(f"{'case':<52}{'floor':>8}" + "".join(f"{name:>21}" for name in ("moma", *EAGER, *COMPILED, "flex_compiled")))
    for case in cases:
        if time.monotonic() > deadline:
            break
        found.append(measure(case, bench))
        print(line(found[-1]), flush=True)
        keep(found)
    for case, result in zip(cases, found, strict=False):
        if time.monotonic() > deadline:
            break
        result["measured"] |= measure_compiled(case, bench)
        print(line(result), flush=True)
        keep(found)
    return found


def measure(case: Case, bench: Bench) -> dict[str, Any]:
    """Measure this project's operator and every eager baseline of a case.

    Raises:
        SystemExit: the operator's error is more than twice that of PyTorch in the same precision.
    """
    inputs = case.inputs(bench.dtype, bench.device)
    wanted = case.definition(tuple(tensor.float() for tensor in inputs))
    errors, allowed = worst_errors(case.moma(inputs), wanted), allowed_errors(case, inputs, wanted)
    if not is_within(errors, allowed):
        raise SystemExit(f"benchmarks.kernels: error: {described(case)}: off by {errors}; {allowed} is allowed")
    contenders = [Baseline("moma", case.moma), *(one for one in baselines(case) if not one.is_compiled)]
    return {
        **described(case),
        "operations": case.work().operations,
        "bytes": case.work().bytes,
        "floor_ms": round(bench.peaks.floor_ms(case.work()), 5),
        "allowed_errors": allowed,
        "measured": {contender.name: _measured(contender, case, inputs, wanted, bench) for contender in contenders},
    }


def measure_compiled(case: Case, bench: Bench) -> dict[str, Any]:
    """Measure the compiled baselines of a case, for its entry "measured"."""
    inputs = case.inputs(bench.dtype, bench.device)
    wanted = case.definition(tuple(tensor.float() for tensor in inputs))
    return {one.name: _measured(one, case, inputs, wanted, bench) for one in baselines(case) if one.is_compiled}


def _measured(
    contender: Baseline, case: Case, inputs: tuple[Tensor, ...], wanted: Outputs, bench: Bench
) -> dict[str, Any]:
    try:
        call = contender.prepare(inputs)
        errors = worst_errors(call(), wanted)
        timing = bench.timer(call)
    except Exception as error:
        if not contender.is_compiled:
            raise
        # Compilers fail with all kinds of exceptions; the reason is part of the results.
        return {"refused": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300]}"}
    work, median = case.work(), timing.median
    return {
        "ms": percentiles(timing.milliseconds),
        "samples": len(timing.milliseconds),
        "tflops": round(work.operations / median / 1e9, 2),
        "gb_per_s": round(work.bytes / median / 1e6, 1),
        "of_roofline": round(bench.peaks.floor_ms(work) / median, 3),
        "extra_mib": timing.extra_mib,
        "errors": errors,
    }


def described(case: Case) -> dict[str, Any]:
    """Return a case's parameters for the results."""
    facts = {
        "operator": case.operator,
        "grid": case.level.grid,
        "channels": case.level.channels,
        "layers": case.level.layers,
        "rows": case.rows,
        "samples": case.samples,
        "gate": case.gate,
        "open_queries": case.open_queries,
    }
    if isinstance(case, SelfCase):
        facts |= {"form": case.form, "share": case.share}
        facts |= {"reference_tokens": case.reference_tokens, "kept_tokens": case.kept_tokens}
    return facts


def summary(cases: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Sum up the milliseconds of a step's attention layers: one sample, both guidance halves, 40 % of the reference.

    The fastest baseline of a kind counts for each layer; None if none of them could compute a layer. "layers" is the
    number of layers measured, out of 32.
    """
    counted = [c for c in cases if c["rows"] == SUMMARY_ROWS and c.get("share", SUMMARY_SHARE) == SUMMARY_SHARE]
    rows = []
    for form in FORMS:
        for gate in GATES:
            step = [case for case in counted if case["gate"] == gate and case.get("form", form) == form]
            layers = sum(case["layers"] for case in step)
            moma, eager, compiled = (_total(step, names) for names in (("moma",), EAGER, COMPILED))
            row = {"form": form, "gate": gate, "layers": layers, "moma_ms": moma, "eager_ms": eager}
            row |= {"compiled_ms": compiled, "over_eager": _ratio(eager, moma), "over_compiled": _ratio(compiled, moma)}
            rows.append(row)
    return rows


def _total(step: Sequence[Mapping[str, Any]], names: Sequence[str]) -> float | None:
    total = 0.0
    for case in step:
        times = [case["measured"][name]["ms"]["p50"] for name in names if "ms" in case["measured"].get(name, {})]
        if not times:
            return None
        total += case["layers"] * min(times)
    return round(total, 4)


def _ratio(baseline: float | None, ours: float | None) -> float | None:
    return round(baseline / ours, 2) if baseline and ours else None


def line(result: Mapping[str, Any]) -> str:
    """Format one case: median milliseconds, and for this project's operator the fraction of the roofline."""
    name = f"{result['operator'].rpartition('_attention')[0]} {result['grid']}² x {result['rows']} {result['gate']}"
    if "form" in result:
        name += f" {result['form']} {result['share']:.0%}"
    cells = [f"{name:<52}", f"{result['floor_ms']:8.4f}"]
    for contender in ("moma", *EAGER, *COMPILED, "flex_compiled"):
        found = result["measured"].get(contender)
        text = "" if found is None else "refused" if "refused" in found else f"{found['ms']['p50']:.4f}"
        if contender == "moma":
            text += f" ({found['of_roofline']:.0%})"
        cells.append(f"{text:>21}")
    return "".join(cells).rstrip()


def print_summary(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the summary as a table."""
    names = ("moma_ms", "eager_ms", "compiled_ms", "over_eager", "over_compiled")
    print(f"\nattention of one step, ms (targets: {TARGETS[0]}x over eager, {TARGETS[1]}x over compiled)")
    print(f"{'form':<8}{'gate':<6}{'layers':>7}" + "".join(f"{name:>15}" for name in names))
    for row in rows:
        cells = ["-" if row[name] is None else f"{row[name]:.2f}" for name in names]
        print(f"{row['form']:<8}{row['gate']:<6}{row['layers']:>7}" + "".join(f"{cell:>15}" for cell in cells))


def _name(text: str) -> str:
    if re.fullmatch(r"\w[\w.-]*", text) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a name of letters, digits, '_', '-' and '.'")
    return text
