"""How long a picture takes, against what a user of MoMA runs today: `python -m benchmarks.latency --bundle DIR`.

Requests of the runtime:

    cold                  photo, mask and prompt, all new: enroll and generate; the networks were loaded before
    warm                  an enrolled subject and a new prompt
    warm_cached_prompt    an enrolled subject and a prompt that was asked for before, with another seed
    warm_watched          warm's picture once more with a callback after each step; only on a GPU, unless asked for.
                          Its steps are enqueued one by one, while those of the others are replayed from a recording:
                          the two pictures are compared, and how long a replay takes the host is told.

Baselines make the same picture as the warm request, of the same weights and noises, in PyTorch (float32 on a CPU,
bfloat16 on a GPU):

    eager       the original's algorithm, which computes everything anew for every picture
    compiled    the same, with the UNet of the steps and the decoder compiled (max-autotune)
    plain       Stable Diffusion alone, without a photo

All contenders are loaded at once, in a process each, and take turns request by request, so that what else the machine
does falls on all of them alike. Where that is too much memory, name fewer baselines, or leave the cold request out:
then the subject is enrolled by a process that ends, and the networks for it are not held. A bundle of random weights
is compared as it is; for others the options that it was built with say where the weights are, as for export.compare.
"""

import argparse
import dataclasses
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.agreement import agreement, replays
from benchmarks.contenders import (
    BASELINES,
    RUNTIME,
    Answer,
    ContenderProcess,
    Request,
    Settings,
)
from benchmarks.environment import bundle_facts, environment, percentiles, repeatable, write_results
from benchmarks.memory import device_mib_used
from engines.targets import listed
from export.build import add_checkpoint_options
from moma_rt import backends
from moma_rt.bundle import Bundle
from moma_rt.errors import InputError, MomaError, print_output, run_command
from moma_rt.schedules import schedule
from moma_rt.selection import Host, choose
from moma_rt.specs import Precision

PROGRAM = "benchmarks.latency"
KINDS = ("cold", "warm", "warm_cached_prompt", "warm_watched")
# Those that the baselines have as well.
SCHEDULERS = ("ddim", "lcm")
# Below it the baseline is not the same algorithm, and no comparison means anything.
LEAST_AGREEMENT_DB = 30.0
# Of a replayed picture from the one whose steps were enqueued one by one, in steps of 1/255.
MOST_REPLAY_DIFFERENCE = 2

_ASSETS = Path(__file__).resolve().parent.parent / "assets"
_SUBJECT = "coffee cup"
# More than the runtime keeps the texts of.
_COLOURS = ("red", "blue", "green", "white", "black", "yellow", "brown", "grey", "pink")
_MATERIALS = ("glass", "paper", "metal", "wooden", "plastic", "stone", "clay", "tin", "bone")
# On a GPU the first request records or compiles, and PyTorch records a function when it runs for the second time.
_WARM_UPS, _WARM_UPS_ON_GPU = 1, 3


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog=f"python -m {PROGRAM}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--bundle", type=Path, required=True, metavar="DIR")
    p.add_argument("--backend", default=backends.AUTO, metavar="NAME", help="of the runtime (default: auto)")
    p.add_argument("--steps", type=int, default=50, help="of denoising (default: 50)")
    p.add_argument("--repeats", type=int, default=5, help="samples of each, after the warm-up (default: 5)")
    p.add_argument(
        "--baselines",
        default=",".join(BASELINES),
        metavar="NAMES",
        help=f"separated by commas, or none (default: {','.join(BASELINES)})",
    )
    p.add_argument(
        "--requests", metavar="KINDS", help=f"separated by commas; warm is always among them (all: {','.join(KINDS)})"
    )
    p.add_argument(
        "--minutes", type=float, metavar="M", help="begin no further turn once this has run so long (default: make all)"
    )
    p.add_argument("--scheduler", choices=SCHEDULERS, default="ddim", help="lcm goes without guidance (default: ddim)")
    p.add_argument(
        "--threads", type=int, metavar="N", help="of the CPU, on both sides (default: what libraries choose)"
    )
    p.add_argument(
        "--context-embedding",
        choices=("random",),
        help="instead of the language model, on both sides; so it is where the bundle has none",
    )
    p.add_argument("--out", default="latency", metavar="NAME", help="of the JSON in benchmarks/results")
    add_checkpoint_options(p, base_required=False)
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser().parse_args(given)
    return run_command(PROGRAM, lambda: _measure(options, given))


def _measure(options: argparse.Namespace, given: Sequence[str]) -> int:
    start = time.monotonic()
    if options.repeats < 1:
        raise InputError(f"--repeats {options.repeats}: at least 1 is needed")
    names = () if options.baselines == "none" else listed("--baselines", "baseline", options.baselines, BASELINES)
    kinds = _kinds(options.requests)
    schedule(options.scheduler, options.steps, 1.0)
    backends.check(options.backend, options.threads)
    bundle = Bundle.open(options.bundle)
    backend = choose(options.backend, bundle.manifest, Host()).backend
    has_language_model = options.context_embedding is None and bundle.has("vision_encoder", "language_model")
    settings = Settings(
        bundle=options.bundle,
        backend=backend,
        steps=options.steps,
        scheduler=options.scheduler,
        embedding=None if has_language_model else random_embedding(bundle.manifest.geometry.embedding_width),
        weights=options,
        threads=options.threads,
    )
    precision = bundle.network("denoiser").precision
    # Before the minutes of measuring: the commit is that of the code that is loaded now.
    where = environment(repeatable(PROGRAM, given))
    with tempfile.TemporaryDirectory() as folder:
        if "cold" not in kinds:
            settings = dataclasses.replace(settings, subject=enrolled(settings, Path(folder) / "cup.subject"))
        samples = measure(settings, kinds, names, options.repeats, _is_over(start, options.minutes))
    # Other schedulers draw noise of their own at every step.
    warm = {name: of_contender.answers["warm"] for name, of_contender in samples.items()}
    found = agreement(warm) if options.scheduler == "ddim" else None
    if precision is Precision.FP32 and device_mib_used() is None:
        _check_agreement(found)
    results = {
        "environment": where,
        "bundle": bundle_facts(bundle),
        "settings": {
            "steps": settings.steps,
            "scheduler": settings.scheduler,
            "guidance_scale": settings.guidance_scale,
            "repeats": len(samples[RUNTIME].answers["warm"]),
            "threads": settings.threads,
            "language_model": settings.has_language_model,
        },
        "backend": backend,
        **summary(samples),
        "replay": replays(samples[RUNTIME].answers, options.steps),
        "agreement": found,
    }
    path = write_results(options.out, results)
    print_output(f"{table(results)}\n{path}")
    return _check_replays(results["replay"])


def _kinds(asked: str | None) -> tuple[str, ...]:
    """The kinds of request, in the order of `KINDS`; only on a GPU is anything replayed."""
    if asked is None:
        return KINDS if device_mib_used() is not None else tuple(kind for kind in KINDS if kind != "warm_watched")
    chosen = listed("--requests", "request", asked, KINDS)
    return tuple(kind for kind in KINDS if kind in chosen or kind == "warm")


def _is_over(start: float, minutes: float | None) -> Callable[[], bool]:
    return lambda: minutes is not None and time.monotonic() - start > 60 * minutes


@dataclasses.dataclass
class Samples:
    """What one contender was measured at: answers by kind of request, and memory in GB."""

    answers: dict[str, list[Answer]] = dataclasses.field(default_factory=dict)
    peak_gb: float = 0.0
    device_gb: float | None = None


def enrolled(settings: Settings, out: Path) -> Path:
    """Enroll the subject of the warm requests into a file, in a process that gives its memory back."""
    request = requests(0)["warm"]
    command = [sys.executable, "-m", "moma_rt", "enroll", settings.bundle, request.photo, request.mask, "--quiet"]
    command += ["--name", request.name, "--seed", request.subject_seed, "--backend", settings.backend, "--out", out]
    done = subprocess.run([str(part) for part in command], check=False)
    if done.returncode:
        raise MomaError(f"moma-rt enroll ended with {done.returncode}")
    return out


def measure(
    settings: Settings, kinds: Sequence[str], baselines: Sequence[str], repeats: int, is_over: Callable[[], bool]
) -> dict[str, Samples]:
    """Answers of the runtime to each kind of request, and of the baselines, in turns; a turn has one set of requests.

    To a baseline all kinds are the same, so it has the warm request alone. After the first turn none is begun once
    `is_over` says so.
    """
    asked = {RUNTIME: kinds} | dict.fromkeys(baselines, ("warm",))
    warm_ups = _WARM_UPS if device_mib_used() is None else _WARM_UPS_ON_GPU
    contenders: dict[str, ContenderProcess] = {}
    samples: dict[str, Samples] = {}
    for name in (RUNTIME, *baselines):
        contenders[name] = ContenderProcess(name, settings)
        for turn in range(warm_ups):
            take_turn(contenders[name], turn, asked[name])
        samples[name] = Samples(device_gb=contenders[name].device_gb())
    for turn in range(warm_ups, warm_ups + repeats):
        if turn > warm_ups and is_over():
            break
        for name, contender in contenders.items():
            for kind, answer in take_turn(contender, turn, asked[name]).items():
                samples[name].answers.setdefault(kind, []).append(answer)
    for name, contender in contenders.items():
        samples[name].peak_gb = contender.end()
    return samples


def take_turn(contender: ContenderProcess, turn: int, kinds: Sequence[str]) -> dict[str, Answer]:
    """An answer to each of some kinds of request."""
    made = requests(turn)
    return {kind: contender.answer(made[kind]) for kind in kinds}


def requests(turn: int) -> dict[str, Request]:
    """A request of each kind, in an order in which it is what it is named. Other turns have other texts and seeds."""
    photo, mask = _ASSETS / "coffee.jpg", _ASSETS / "coffee_mask.png"
    colour, material = _COLOURS[turn % len(_COLOURS)], _MATERIALS[turn // len(_COLOURS) % len(_MATERIALS)]
    name, prompt = f"{colour} {material} cup", f"A {_SUBJECT} on a beach, picture number {turn}."
    return {
        "cold": Request(photo, mask, name, f"A {name} on a beach, picture number {turn}.", 1 + turn, 3 * turn),
        "warm": Request(photo, mask, _SUBJECT, prompt, 0, 3 * turn + 1),
        "warm_cached_prompt": Request(photo, mask, _SUBJECT, prompt, 0, 3 * turn + 2),
        "warm_watched": Request(photo, mask, _SUBJECT, prompt, 0, 3 * turn + 1, is_watched=True),
    }


def random_embedding(width: int) -> np.ndarray:
    """Stands for the language model's reading of photo and prompt: float32 [width], the same on every call."""
    return np.random.default_rng(0).standard_normal(width, dtype=np.float32)


def summary(samples: Mapping[str, Samples]) -> dict[str, Any]:
    """Times in milliseconds, memory in GB, and how many times as long as the runtime each baseline takes."""
    ours = samples[RUNTIME]
    baselines = {}
    for name, theirs in samples.items():
        if name != RUNTIME:
            measured = times(theirs.answers["warm"])
            speedup = {
                kind: round(measured["total"]["p50"] / times(answers)["total"]["p50"], 2)
                for kind, answers in ours.answers.items()
            }
            baselines[name] = {**_memory(theirs), "request": measured, "runtime_is_faster": speedup}
    runtime = {**_memory(ours), "requests": {kind: times(answers) for kind, answers in ours.answers.items()}}
    return {"runtime": runtime, "baselines": baselines}


def times(answers: Sequence[Answer]) -> dict[str, Any]:
    """p20, p50 and p80 in milliseconds, in all and by stage; a stage that an answer did not need took it none."""
    stages = dict.fromkeys(stage for answer in answers for stage in answer.stages)
    return {
        "total": _milliseconds([answer.seconds for answer in answers]),
        "stages": {stage: _milliseconds([answer.stages.get(stage, 0.0) for answer in answers]) for stage in stages},
    }


def table(results: Mapping[str, Any]) -> str:
    """The results for a person."""
    runtime = results["runtime"]
    rows = [(f"{RUNTIME} {kind}", measured, runtime, None) for kind, measured in runtime["requests"].items()]
    for name, found in results["baselines"].items():
        rows.append((name, found["request"], found, found["runtime_is_faster"]))
    lines = [
        f"{'ms':<28}{'p20':>10}{'p50':>10}{'p80':>10}   peak GB   times as long as {', '.join(runtime['requests'])}"
    ]
    for name, measured, memory, faster in rows:
        numbers = "".join(f"{measured['total'][p]:10.1f}" for p in ("p20", "p50", "p80"))
        ratios = "" if faster is None else "   " + ", ".join(f"{ratio:.2f}" for ratio in faster.values())
        lines.append(f"{name:<28}{numbers}{memory['peak_gb']:10.2f}{ratios}")
    if results["agreement"] is not None:
        lines.append(
            f"the runtime's pictures against the original's: {results['agreement']['psnr_db']} dB PSNR or more"
        )
    if (found := results["replay"]) is not None:
        apart = found["largest_difference"]
        compared = "" if apart is None else f"; at most {apart}/255 from the picture of steps enqueued one by one"
        lines.append(f"replays: {found['host_us_per_step']['p50']:.2f} us of the host a step (p50){compared}")
    return "\n".join(lines)


def _memory(samples: Samples) -> dict[str, float]:
    device = {} if samples.device_gb is None else {"device_gb": round(samples.device_gb, 2)}
    return {"peak_gb": round(samples.peak_gb, 2), **device}


def _milliseconds(seconds: Sequence[float]) -> dict[str, float]:
    return {name: round(value, 2) for name, value in percentiles([1000.0 * s for s in seconds]).items()}


def _check_agreement(found: Mapping[str, float] | None) -> None:
    """In fp32 on both sides: random weights are chaotic in lower precisions, so there the number is only reported.

    Raises:
        MomaError: the baseline makes other pictures than the runtime.
    """
    if found is not None and found["psnr_db"] < LEAST_AGREEMENT_DB:
        raise MomaError(
            f"the runtime's pictures are {found['psnr_db']} dB from those of the original, less than "
            f"{LEAST_AGREEMENT_DB:g} dB: they are not the same algorithm, and their times are not written"
        )


def _check_replays(found: Mapping[str, Any] | None) -> int:
    """The exit code: 1, and a line that says so, where replayed pictures are others."""
    apart = None if found is None else found["largest_difference"]
    if apart is None or apart <= MOST_REPLAY_DIFFERENCE:
        return 0
    print(
        f"{PROGRAM}: a replayed picture is {apart}/255 from the one whose steps were enqueued one by one, "
        f"{MOST_REPLAY_DIFFERENCE} are allowed",
        file=sys.stderr,
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())
