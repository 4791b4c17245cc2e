"""A long mixed run from many threads, each picture checked, and memory watched: `python -m benchmarks.soak`.

Requests are drawn from a pool: several subjects with different numbers of reference tokens, prompts, strengths, seeds,
one or two pictures, three schedules, callbacks that let all steps pass or cancel, mistakes, and new enrolments. Before
the run another process makes each picture of the pool alone. In the run

    wrong     is a picture that differs from the one made alone by more than --tolerance, a call that fails and should
              not, and one that does not fail and should
    growth    is how much more memory was in use after some request than ever after the first 50: of the GPU, by
              whichever process, or of this process where the backend runs on the CPU

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
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from benchmarks.environment import bundle_facts, environment, percentiles, repeatable, write_results
from benchmarks.memory import device_mib_used, resident_mib
from benchmarks.soak_requests import SUBJECTS, Drawn, Kind, PictureRequest, draw_requests, photo_and_mask, pool
from benchmarks.soak_run import Answered, Asker, Images, Judge, run
from moma_rt import backends
from moma_rt.bundle import Bundle
from moma_rt.errors import InputError, MomaError, print_output, run_command
from moma_rt.limits import Limits
from moma_rt.runtime import Runtime
from moma_rt.selection import Host, choose
from moma_rt.specs import Precision
from moma_rt.subject import Subject

PROGRAM = "benchmarks.soak"
# The requests after which memory is to stay as it is.
SETTLED = 50
_CPU_BACKEND = "onnxruntime"
# On a CPU also ONNX Runtime's arena, which grows until the largest batch has been made, and what the C library keeps.
_GROWTH_MIB, _GROWTH_MIB_ON_CPU = 16.0, 256.0
# How far rounding takes a picture of a batch from the one made alone, in steps of 1/255: bf16 rounds eight times as
# coarsely as fp16.
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
        help=f"in steps of 1/255 (default: {', '.join(f'{n} in {p.value}' for p, n in _TOLERANCES.items())})",
    )
    p.add_argument(
        "--growth",
        type=float,
        metavar="MIB",
        help=f"that is allowed (default: {_GROWTH_MIB:g} on a GPU, {_GROWTH_MIB_ON_CPU:g} on a CPU)",
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
        judge = Judge(requests, references(bundle.root, backend, requests, folder), plan.tolerance)
        print_output(f"{len(requests)} requests made alone; {time.monotonic() - start:.0f} s since the start")
        apart, one, other = judge.closest_pair()
        results = {
            "environment": where,
            "bundle": bundle_facts(bundle),
            "backend": backend,
            "settings": {**plan.described(), "distinct": options.distinct},
            "closest_pair": {"difference": apart, "of": [one, other]},
            **soak(plan, bundle.root, backend, judge, folder),
        }
    path = write_results(options.out, results)
    print_output(f"{table(results)}\n{path}")
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
    """The run, to a time `end` of the clock. Memory, of the GPU where `on_gpu`, may grow by `growth_mib`."""

    requests: int
    threads: int
    max_batch: int
    seed: int
    tolerance: int
    growth_mib: float
    on_gpu: bool
    end: float

    @classmethod
    def of(cls, options: argparse.Namespace, bundle: Bundle, backend: str, start: float) -> "Plan":
        """What was asked for, and for the rest what suits the bundle and what it runs on."""
        tolerance = _TOLERANCES[bundle.network("denoiser").precision]
        on_gpu = backend != _CPU_BACKEND and device_mib_used() is not None
        growth = _GROWTH_MIB if on_gpu else _GROWTH_MIB_ON_CPU
        return cls(
            options.requests,
            options.threads,
            options.max_batch,
            options.seed,
            tolerance if options.tolerance is None else options.tolerance,
            growth if options.growth is None else options.growth,
            on_gpu,
            float("inf") if options.minutes is None else start + 60 * options.minutes,
        )

    def described(self) -> dict[str, Any]:
        """All but the time of the clock, which says nothing to others."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "end"}

    def is_over(self) -> bool:
        return time.monotonic() > self.end

    def used_mib(self) -> float | None:
        """Memory in use now."""
        return device_mib_used() if self.on_gpu else resident_mib()


def _tiny_bundle(out: Path) -> Path:
    command = [sys.executable, "-m", "export.build", "--base", "tiny", "--out", str(out)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise MomaError(f"export.build ended with {done.returncode}")
    return out


def references(bundle: Path, backend: str, requests: Sequence[PictureRequest], folder: Path) -> list[Images]:
    """The pictures of each request, made one at a time by a process that ends; it leaves its subjects in `folder`.

    Raises:
        MomaError: what went wrong there.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        try:
            return process.submit(_made_alone, bundle, backend, requests, folder).result()
        except BrokenProcessPool:
            raise MomaError(
                "the process that makes each request alone was killed; there may be too little memory"
            ) from None


def _made_alone(bundle: Path, backend: str, requests: Sequence[PictureRequest], folder: Path) -> list[Images]:
    runtime = Runtime.load(bundle, backend)
    width = runtime.bundle.manifest.geometry.embedding_width
    subjects = {name: runtime.enroll(*photo_and_mask(name), name) for name in SUBJECTS}
    for name, subject in subjects.items():
        subject.save(_subject_file(folder, name))
    return [
        [
            np.asarray(runtime.generate(subjects[one.subject], **one.options(width)).images[0])
            for one in request.single()
        ]
        for request in requests
    ]


def _subject_file(folder: Path, name: str) -> Path:
    return folder / f"{SUBJECTS.index(name)}.subject"


def soak(plan: Plan, bundle: Path, backend: str, judge: Judge, folder: Path) -> dict[str, Any]:
    """Make the run of subjects that lie in `folder`; what became of it."""
    drawn = draw_requests(plan.requests, len(judge.pool), plan.seed)
    before = plan.used_mib()
    runtime = Runtime.load(bundle, backend, max_batch=plan.max_batch)
    asker = Asker(runtime, {name: Subject.load(_subject_file(folder, name)) for name in SUBJECTS}, judge)

    def ask(number: int, chosen: Drawn) -> Answered:
        return dataclasses.replace(asker.ask(number, chosen), used_mib=plan.used_mib())

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
    if growth > allowed:
        said.append(f"memory grew by {growth:g} MiB after the first {SETTLED} requests, {allowed:g} are allowed")
    return "; ".join(said)


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


if __name__ == "__main__":
    sys.exit(main())
