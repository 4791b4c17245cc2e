"""Soak-test one runtime with mixed requests from many threads, and check each picture: `python -m benchmarks.soak`.

Requests are drawn from a pool: several subjects with different numbers of reference tokens, prompts, strengths, seeds,
one or two pictures, three schedules, callbacks that cancel or do not, invalid requests, and new enrollments. Before the
run, another process generates each request of the pool alone, and, where requests are batched, also in batches of every
size that occurs. The run counts

    wrong     pictures that differ from all of these by more than --tolerance, calls that fail and should not, and calls
              that should fail and do not. With --max-batch 1 pictures must be bit-identical
    growth    the maximum of the memory in use after later requests, minus the maximum after the first 50: memory of the
              GPU, used by any process, or of this process if the backend runs on the CPU. Growth up to the budget of
              the runtime's captured graphs is allowed, unless it continues until the end

Anything wrong or too much growth gives exit code 1. Without --bundle, first builds the tiny bundle in about a minute.
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

from benchmarks.environment import bundle_facts, environment, percentiles, shareable_command, write_results
from benchmarks.memory import device_mib_in_process, device_mib_used, resident_mib
from benchmarks.soak.references import load_deterministic, references, subject_file
from benchmarks.soak.requests import SUBJECTS, DrawnRequest, Kind, draw_requests, pool
from benchmarks.soak.run import Checker, Client, Outcome, run
from moma_rt import backends
from moma_rt.backends.selection import Host, choose
from moma_rt.bundle.manifest import Bundle
from moma_rt.bundle.specs import Precision
from moma_rt.errors import InputError, MomaError, print_output, run_command
from moma_rt.memory.limits import GRAPH_MEMORY, Limits
from moma_rt.subject import Subject

PROGRAM = "benchmarks.soak"
# The number of requests after which memory should no longer grow.
SETTLED = 50
_CPU_BACKEND = "onnxruntime"
# On a GPU, the budget of captured graphs, since chance decides which are cached at a time. On a CPU, ONNX Runtime's
# arena, which grows until the largest batch has run, and memory that the C library does not return.
_GROWTH_MIB, _GROWTH_MIB_ON_CPU = GRAPH_MEMORY / 2**20, 256.0
# Growth by more than so many MiB in each of the last so many parts of a run counts as a leak.
_GROWING_PARTS, _GROWING_MIB = 5, 1.0
# Memory is sampled after every so many requests where a sample starts a process.
_SAMPLED_EVERY = 10
# How much rounding changes a picture between batches of one size but with other samples, in steps of 1/255: bf16 rounds
# eight times as coarsely as fp16.
_TOLERANCES = MappingProxyType({Precision.FP32: 1, Precision.FP16: 2, Precision.BF16: 16})
_SHOWN_WRONG, _KEPT_WRONG = 5, 50


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog=f"python -m {PROGRAM}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--bundle", type=Path, metavar="DIR", help="bundle to run (default: build the tiny one)")
    p.add_argument("--backend", default=backends.AUTO, metavar="NAME", help="backend of the runtime (default: auto)")
    p.add_argument("--requests", type=int, default=1000, metavar="N", help="requests to make (default: 1000)")
    p.add_argument("--threads", type=int, default=8, metavar="N", help="threads that make requests (default: 8)")
    p.add_argument("--max-batch", type=int, default=4, metavar="N", help="max_batch of the runtime (default: 4)")
    p.add_argument("--distinct", type=int, default=48, metavar="N", help="distinct requests in the pool (default: 48)")
    p.add_argument("--seed", type=int, default=0, help="seed of the pool and of the draw (default: 0)")
    p.add_argument(
        "--tolerance",
        type=int,
        metavar="N",
        help="allowed difference of a picture in steps of 1/255 (default: 0 with --max-batch 1, else "
        f"{', '.join(f'{n} in {p.value}' for p, n in _TOLERANCES.items())})",
    )
    p.add_argument(
        "--growth",
        type=float,
        metavar="MIB",
        help=f"allowed growth of memory (default: {_GROWTH_MIB:.0f} on a GPU, {_GROWTH_MIB_ON_CPU:g} on a CPU)",
    )
    p.add_argument(
        "--minutes",
        type=float,
        metavar="M",
        help="start no request later than M minutes after the start (default: no limit)",
    )
    p.add_argument("--out", default="soak", metavar="NAME", help="write benchmarks/results/NAME.json (default: soak)")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser().parse_args(given)
    return run_command(PROGRAM, lambda: _soak(options, given))


def _soak(options: argparse.Namespace, given: Sequence[str]) -> int:
    start = time.monotonic()
    _check_options(options)
    # Taken before the run, since the commit is that of the code loaded now.
    where = environment(shareable_command(PROGRAM, given))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle = Bundle.open(_tiny_bundle(folder / "bundle") if options.bundle is None else options.bundle)
        backend = choose(options.backend, bundle.manifest, Host()).backend
        plan = Plan.of(options, bundle, backend, start)
        requests = pool(options.distinct, bundle.has("vision_encoder", "language_model"), options.seed)
        made = references(bundle.root, backend, requests, folder, plan.batches)
        checker = Checker(requests, made, plan.tolerance)
        print_output(f"{len(requests)} requests generated alone; {time.monotonic() - start:.0f} s since the start")
        apart, one, other = checker.closest_pair()
        results = {
            "environment": where,
            "bundle": bundle_facts(bundle),
            "backend": backend,
            "settings": {**plan.described(), "distinct": options.distinct},
            "closest_pair": {"difference": apart, "of": [one, other]},
            "together": {"difference": checker.largest_difference(), "allowed": plan.rounding},
            **soak(plan, bundle.root, backend, checker, folder),
        }
    path = write_results(options.out, results)
    print_output(f"{path}\n{table(results)}")
    if failed := verdict(results):
        print(f"{PROGRAM}: {failed}", file=sys.stderr)
    return 1 if failed else 0


def _check_options(options: argparse.Namespace) -> None:
    """Refuse numbers out of range before anything is built or generated."""
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
    """The run's settings.

    Attributes:
        tolerance: allowed difference of pictures in the run, in steps of 1/255.
        rounding: allowed difference of one picture between batch sizes, before the run, in steps of 1/255.
        growth_mib: allowed growth of memory, of the GPU if `on_gpu`, else of this process.
        end: time of `time.monotonic` after which no request starts.
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
        """Take the options, with defaults that suit the bundle and the device."""
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
        """Return the settings for the results, without `end`, which is only meaningful in this process."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "end"}

    @property
    def batches(self) -> tuple[int, ...]:
        """Batch sizes above 1 for the references: on a GPU, where batches are padded to powers of two."""
        powers = (1 << exponent for exponent in range(1, self.max_batch.bit_length()))
        return tuple(power for power in powers if self.on_gpu and power <= self.max_batch)

    def is_over(self) -> bool:
        return time.monotonic() > self.end

    def used_mib(self, number: int) -> float | None:
        """Return the memory in use after the `number`th request; None if it is not sampled then."""
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


def soak(plan: Plan, bundle: Path, backend: str, checker: Checker, folder: Path) -> dict[str, Any]:
    """Run with the subjects saved in `folder`, and return the results."""
    drawn = draw_requests(plan.requests, len(checker.pool), plan.seed)
    before = plan.used_mib(0)
    runtime = load_deterministic(bundle, backend, max_batch=plan.max_batch)
    client = Client(runtime, {name: Subject.load(subject_file(folder, name)) for name in SUBJECTS}, checker)

    def ask(number: int, chosen: DrawnRequest) -> Outcome:
        return dataclasses.replace(client.ask(number, chosen), used_mib=plan.used_mib(number))

    start = time.monotonic()
    answers = run(ask, drawn, plan.threads, plan.is_over)
    return {**summary(answers, time.monotonic() - start), "memory": memory(before, [a.used_mib for a in answers])}


def summary(answers: Sequence[Outcome], seconds: float) -> dict[str, Any]:
    """Return counts, latencies in milliseconds, and what was wrong."""
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
        # The number of pictures by their difference from those generated alone, in steps of 1/255.
        "differences": {str(apart): differences[apart] for apart in sorted(differences)},
        "pictures_at_a_time": round(made / max(1, len({answer.batch_id for answer in pictures})), 2),
        "seconds": round(seconds, 1),
        "requests_per_second": round(len(answers) / seconds, 2),
        "latency_ms": percentiles([1000 * answer.seconds for answer in pictures] or [0.0], (50, 99)),
    }


def memory(before: float | None, samples: Sequence[float | None]) -> dict[str, Any]:
    """Summarize the memory samples after each request, in MiB: maximum of the first 50, of all, the last, the growth.

    Also gives the maximum of every 50 requests, which tells growth that ends from a leak. Missing samples are skipped.
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
    """Return why the run failed, in one line; empty if it passed."""
    growth, allowed = results["memory"]["growth"], results["settings"]["growth_mib"]
    said = [f"{results['wrong']} wrong: {results['what_is_wrong'][0]}"] if results["wrong"] else []
    closest, tolerance = results["closest_pair"], results["settings"]["tolerance"]
    if closest["difference"] <= 2 * tolerance:
        one, other = closest["of"]
        said.append(f"with a tolerance of {tolerance}, {one} and {other} could be mixed up unnoticed")
    together = results["together"]
    if together["difference"] > together["allowed"]:
        said.append(
            f"a picture generated in a batch is {together['difference']}/255 from the one generated alone, "
            f"{together['allowed']} are allowed"
        )
    parts = [part for part in results["memory"][f"most_of_each_{SETTLED}"] if part]
    if still_grows(parts):
        said.append(f"memory grew in each of the last {_GROWING_PARTS} x {SETTLED} requests, to {parts[-1]:g} MiB")
    if growth > allowed:
        said.append(f"memory grew by {growth:g} MiB after the first {SETTLED} requests, {allowed:g} are allowed")
    return "; ".join(said)


def still_grows(parts: Sequence[float]) -> bool:
    """Return whether memory, given as the maximum of each part of a run, grew in all of the last parts."""
    last = parts[-_GROWING_PARTS - 1 :]
    return len(last) > _GROWING_PARTS and all(after - before > _GROWING_MIB for before, after in pairwise(last))


def table(results: Mapping[str, Any]) -> str:
    """Format the results as a table."""
    settings, found, latency = results["settings"], results["memory"], results["latency_ms"]
    kinds = ", ".join(f"{count} {kind}" for kind, count in results["kinds"].items())
    differences = list(results["differences"])
    rows = {
        "requests": f"{results['answered']} of {settings['requests']} ({kinds})",
        "pictures": f"{results['pictures']}, {results['pictures_at_a_time']} at a time",
        "wrong": f"{results['wrong']}; at most {differences[-1] if differences else 0}/255 from those generated alone, "
        f"{settings['tolerance']} allowed; no two of those are closer than {results['closest_pair']['difference']}",
        "rate": f"{results['requests_per_second']} requests/s from {settings['threads']} threads, "
        f"latency p50 {latency['p50']:.0f} ms, p99 {latency['p99']:.0f} ms",
        "GPU memory" if settings["on_gpu"] else "memory": f"{found[f'after_{SETTLED}']:g} MiB after {SETTLED}, most "
        f"{found['most']:g}, end {found['end']:g}: growth {found['growth']:g}, {settings['growth_mib']:g} allowed",
    }
    wrong = [f"  {line}" for line in results["what_is_wrong"][:_SHOWN_WRONG]]
    return "\n".join([f"{name:<12}{text}" for name, text in rows.items()] + wrong)
