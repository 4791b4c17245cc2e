"""A long mixed run from many threads, each picture checked, and memory watched: `python -m benchmarks.soak`.

Requests are drawn from a pool: several subjects with different numbers of reference tokens, prompts, strengths, seeds,
one or two pictures, three schedules, callbacks that let all steps pass or cancel, mistakes, and new enrolments. Before
the run another process makes each request of the pool alone, and where requests are made together also in batches of
every size that there will be. In the run

    wrong     is a picture that differs by more than --tolerance from each of those, a call that fails and should not,
              and one that does not fail and should. With --max-batch 1 a picture has to be the same to the bit
    growth    is how much more memory was in use after some request than ever after the first 50: of the GPU, by
              whichever process, or of this process where the backend runs on the CPU. Less than the captured graphs
              that the runtime keeps may take is none, unless it goes on to the end

Either ends with exit code 1. Without --bundle the tiny bundle is built, which takes about a minute.
"""

import argparse
import dataclasses
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

from benchmarks.environment import bundle_facts, environment, percentiles, repeatable, write_results
from benchmarks.memory import device_mib_in_process, device_mib_used, resident_mib
from benchmarks.soak.references import load_repeatable, references, subject_file
from benchmarks.soak.requests import SUBJECTS, Drawn, Kind, draw_requests, pool
from benchmarks.soak.run import Answered, Asker, Judge, run
from moma_rt import backends
from moma_rt.backends.selection import Host, choose
from moma_rt.bundle.manifest import Bundle
from moma_rt.bundle.specs import Precision
from moma_rt.errors import InputError, MomaError, print_output, run_command
from moma_rt.memory.limits import GRAPH_MEMORY, Limits
from moma_rt.subject import Subject

PROGRAM = "benchmarks.soak"
# The requests after which memory is to stay as it is.
SETTLED = 50
_CPU_BACKEND = "onnxruntime"
# On a GPU the captured graphs that the runtime keeps: which of them are there at a time is chance. On a CPU ONNX
# Runtime's arena, which grows until the largest batch has been made, and what the C library keeps.
_GROWTH_MIB, _GROWTH_MIB_ON_CPU = GRAPH_MEMORY / 2**20, 256.0
# Growth in every one of so many parts of a run in a row, by more than so many MiB each, is growth without end.
_GROWING_PARTS, _GROWING_MIB = 5, 1.0
# Where memory can only be asked of a process of its own: after every so many requests.
_SAMPLED_EVERY = 10
# How far rounding takes a picture of a batch from the same one in a batch of that size with others, in steps of 1/255:
# bf16 rounds eight times as coarsely as fp16.
_TOLERANCES = MappingProxyType({Precision.FP32: 1, Precision.FP16: 2, Precision.BF16: 16})
_SHOWN_WRONG, _KEPT_WRONG = 5, 50


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog=f"python -m {PROGRAM}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--bundle", type=Path, metavar="DIR", help="default: the tiny one, built now")
    p.add_argument("--backend", default=backends.AUTO, metavar="NAME", help="of the runtime (default: auto)")
    p.add_argument("--requests", type=int, default=1000, metavar="N", help="of the run (default: 1000)")
    p.add_argument("--threads", type=int, default=8, metavar="N", help="that ask (default: 8)")
    p.add_argument("--max-batch", type=int, default=4, metavar="N", help="of the runtime (default: 4)")
    p.add_argument("--distinct", type=int, default=48, metavar="N", help="different requests (default: 48)")
    p.add_argument("--seed", type=int, default=0, help="of the pool and of the draw (default: 0)")
    p.add_argument(
        "--tolerance",
        type=int,
        metavar="N",
        help="in steps of 1/255 (default: 0 with --max-batch 1, else "
        f"{', '.join(f'{n} in {p.value}' for p, n in _TOLERANCES.items())})",
    )
    p.add_argument(
        "--growth",
        type=float,
        metavar="MIB",
        help=f"that is allowed (default: {_GROWTH_MIB:.0f} on a GPU, {_GROWTH_MIB_ON_CPU:g} on a CPU)",
    )
    p.add_argument(
        "--minutes",
        type=float,
        metavar="M",
        help="begin no request later than so long after the start (default: make all)",
    )
    p.add_argument("--out", default="soak", metavar="NAME", help="of the JSON in benchmarks/results (default: soak)")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser().parse_args(given)
    return run_command(PROGRAM, lambda: _soak(options, given))


def _soak(options: argparse.Namespace, given: Sequence[str]) -> int:
    start = time.monotonic()
    _check_options(options)
    # Before the minutes of running: the commit is that of the code that is loaded now.
    where = environment(repeatable(PROGRAM, given))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle = Bundle.open(_tiny_bundle(folder / "bundle") if options.bundle is None else options.bundle)
        backend = choose(options.backend, bundle.manifest, Host()).backend
        plan = Plan.of(options, bundle, backend, start)
        requests = pool(options.distinct, bundle.has("vision_encoder", "language_model"), options.seed)
        made = references(bundle.root, backend, requests, folder, plan.batches)
        judge = Judge(requests, made, plan.tolerance)
        print_output(f"{len(requests)} requests made alone; {time.monotonic() - start:.0f} s since the start")
        apart, one, other = judge.closest_pair()
        results = {
            "environment": where,
            "bundle": bundle_facts(bundle),
            "backend": backend,
            "settings": {**plan.described(), "distinct": options.distinct},
            "closest_pair": {"difference": apart, "of": [one, other]},
            "together": {"difference": judge.largest_difference(), "allowed": plan.rounding},
            **soak(plan, bundle.root, backend, judge, folder),
        }
    path = write_results(options.out, results)
    print_output(f"{path}\n{table(results)}")
    if failed := verdict(results):
        print(f"{PROGRAM}: {failed}", file=sys.stderr)
    return 1 if failed else 0


def _check_options(options: argparse.Namespace) -> None:
    """Refuse numbers out of range before anything is built or made."""
    allowed = {
        "requests": (SETTLED + 1, 10**6),
        "threads": (1, 64),
        "distinct": (2, 1000),
        "seed": (0, 2**32 - 1),
        "tolerance": (0, 100),
        "growth": (0, 10**6),
        "minutes": (0, 10**6),
    }
    for name, (low, high) in allowed.items():
        value = getattr(options, name)
        if value is not None and not low <= value <= high:
            raise InputError(f"--{name} {value}: it must be {low} to {high}")
    Limits(options.max_batch)
    backends.check(options.backend, None)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The run, to a time `end` of the clock. Memory, of the GPU where `on_gpu`, may grow by `growth_mib`.

    tolerance: of pictures in the run. rounding: of one picture in batches of several sizes, before the run.
    """

    requests: int
    threads: int
    max_batch: int
    seed: int
    tolerance: int
    rounding: int
    growth_mib: float
    on_gpu: bool
    end: float

    @classmethod
    def of(cls, options: argparse.Namespace, bundle: Bundle, backend: str, start: float) -> "Plan":
        """What was asked for, and for the rest what suits the bundle and what it runs on."""
        rounding = _TOLERANCES[bundle.network("denoiser").precision]
        tolerance = 0 if options.max_batch == 1 else rounding
        on_gpu = backend != _CPU_BACKEND and device_mib_used() is not None
        growth = _GROWTH_MIB if on_gpu else _GROWTH_MIB_ON_CPU
        return cls(
            options.requests,
            options.threads,
            options.max_batch,
            options.seed,
            tolerance if options.tolerance is None else options.tolerance,
            rounding,
            growth if options.growth is None else options.growth,
            on_gpu,
            float("inf") if options.minutes is None else start + 60 * options.minutes,
        )

    def described(self) -> dict[str, Any]:
        """All but the time of the clock, which says nothing to others."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "end"}

    @property
    def batches(self) -> tuple[int, ...]:
        """In how many pictures at a time requests may be made together, beside 1: on a GPU they are rounded up."""
        powers = (1 << exponent for exponent in range(1, self.max_batch.bit_length()))
        return tuple(power for power in powers if self.on_gpu and power <= self.max_batch)

    def is_over(self) -> bool:
        return time.monotonic() > self.end

    def used_mib(self, number: int) -> float | None:
        """Memory in use after the `number`th request; None where it was not asked for."""
        if not self.on_gpu:
            return resident_mib()
        used = device_mib_in_process()
        return device_mib_used() if used is None and number % _SAMPLED_EVERY == 0 else used


def _tiny_bundle(out: Path) -> Path:
    command = [sys.executable, "-m", "export.build", "--base", "tiny", "--out", str(out)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise MomaError(f"export.build ended with {done.returncode}")
    return out


def soak(plan: Plan, bundle: Path, backend: str, judge: Judge, folder: Path) -> dict[str, Any]:
    """Make the run of subjects that lie in `folder`; what became of it."""
    drawn = draw_requests(plan.requests, len(judge.pool), plan.seed)
    before = plan.used_mib(0)
    runtime = load_repeatable(bundle, backend, max_batch=plan.max_batch)
    asker = Asker(runtime, {name: Subject.load(subject_file(folder, name)) for name in SUBJECTS}, judge)

    def ask(number: int, chosen: Drawn) -> Answered:
        return dataclasses.replace(asker.ask(number, chosen), used_mib=plan.used_mib(number))

    start = time.monotonic()
    answers = run(ask, drawn, plan.threads, plan.is_over)
    return {**summary(answers, time.monotonic() - start), "memory": memory(before, [a.used_mib for a in answers])}


def summary(answers: Sequence[Answered], seconds: float) -> dict[str, Any]:
    """Counts, latencies in milliseconds, and what was wrong."""
    pictures = [answer for answer in answers if answer.differences]
    differences = Counter(apart for answer in pictures for apart in answer.differences)
    made = sum(differences.values())
    kinds = Counter(answer.kind.value for answer in answers)
    wrong = [line for answer in answers for line in answer.wrong]
    return {
        "answered": len(answers),
        "kinds": {kind.value: kinds[kind.value] for kind in Kind},
        "pictures": made,
        "wrong": len(wrong),
        "what_is_wrong": wrong[:_KEPT_WRONG],
        # How many pictures differ so much, in steps of 1/255, from those made alone.
        "differences": {str(apart): differences[apart] for apart in sorted(differences)},
        "pictures_at_a_time": round(made / max(1, len({answer.made_with for answer in pictures})), 2),
        "seconds": round(seconds, 1),
        "requests_per_second": round(len(answers) / seconds, 2),
        "latency_ms": percentiles([1000 * answer.seconds for answer in pictures] or [0.0], (50, 99)),
    }


def memory(before: float | None, samples: Sequence[float | None]) -> dict[str, Any]:
    """Of the samples after each request, in MiB: the most of the first 50, the most of all, the last, the growth.

    Also the most of every 50 requests, which tells growth that ends from growth that does not. Samples that failed are
    left out.
    """
    early, late = ([used for used in part if used is not None] for part in (samples[:SETTLED], samples[SETTLED:]))
    if not early or not late:
        raise MomaError(f"{len(early)} and {len(late)} samples of memory before and after {SETTLED} requests: too few")
    found = {"before": before or 0.0, f"after_{SETTLED}": max(early), "most": max(early + late), "end": late[-1]}
    found |= {"growth": max(late) - max(early)}
    known = [used or 0.0 for used in samples]
    parts = [round(max(known[start : start + SETTLED]), 1) for start in range(0, len(known), SETTLED)]
    return {**{name: round(value, 1) for name, value in found.items()}, f"most_of_each_{SETTLED}": parts}


def verdict(results: Mapping[str, Any]) -> str:
    """What the run failed for, on one line; empty where it did not."""
    growth, allowed = results["memory"]["growth"], results["settings"]["growth_mib"]
    said = [f"{results['wrong']} wrong: {results['what_is_wrong'][0]}"] if results["wrong"] else []
    closest, tolerance = results["closest_pair"], results["settings"]["tolerance"]
    if closest["difference"] <= 2 * tolerance:
        one, other = closest["of"]
        said.append(f"with a tolerance of {tolerance}, {one} and {other} could be mixed up without being seen")
    together = results["together"]
    if together["difference"] > together["allowed"]:
        said.append(
            f"a picture that is made with others is {together['difference']}/255 from the one made alone, "
            f"{together['allowed']} are allowed"
        )
    parts = [part for part in results["memory"][f"most_of_each_{SETTLED}"] if part]
    if still_grows(parts):
        said.append(f"memory grew in each of the last {_GROWING_PARTS} times {SETTLED} requests, to {parts[-1]:g} MiB")
    if growth > allowed:
        said.append(f"memory grew by {growth:g} MiB after the first {SETTLED} requests, {allowed:g} are allowed")
    return "; ".join(said)


def still_grows(parts: Sequence[float]) -> bool:
    """Whether memory, the most of each part of a run, grew in every one of the last parts."""
    last = parts[-_GROWING_PARTS - 1 :]
    return len(last) > _GROWING_PARTS and all(after - before > _GROWING_MIB for before, after in pairwise(last))


def table(results: Mapping[str, Any]) -> str:
    """The results for a person."""
    settings, found, latency = results["settings"], results["memory"], results["latency_ms"]
    kinds = ", ".join(f"{count} {kind}" for kind, count in results["kinds"].items())
    differences = list(results["differences"])
    rows = {
        "requests": f"{results['answered']} of {settings['requests']} ({kinds})",
        "pictures": f"{results['pictures']}, {results['pictures_at_a_time']} at a time",
        "wrong": f"{results['wrong']}; at most {differences[-1] if differences else 0}/255 from those made alone, "
        f"{settings['tolerance']} allowed; no two of those are closer than {results['closest_pair']['difference']}",
        "rate": f"{results['requests_per_second']} requests/s from {settings['threads']} threads, "
        f"latency p50 {latency['p50']:.0f} ms, p99 {latency['p99']:.0f} ms",
        "GPU memory" if settings["on_gpu"] else "memory": f"{found[f'after_{SETTLED}']:g} MiB after {SETTLED}, most "
        f"{found['most']:g}, end {found['end']:g}: growth {found['growth']:g}, {settings['growth_mib']:g} allowed",
    }
    wrong = [f"  {line}" for line in results["what_is_wrong"][:_SHOWN_WRONG]]
    return "\n".join([f"{name:<12}{text}" for name, text in rows.items()] + wrong)
