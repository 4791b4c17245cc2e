"""Measure how long a picture takes, compared with PyTorch: `python -m benchmarks.latency --bundle DIR`.

Requests of the runtime:

    cold                  new photo, mask and prompt: enroll and generate; the networks are already loaded
    warm                  an enrolled subject and a new prompt
    warm_cached_prompt    an enrolled subject and a prompt used before, with another seed
    warm_watched          the warm picture again, with a callback after each step; by default only on a GPU. Its steps
                          are enqueued one by one, while the other requests replay a captured CUDA graph: compares the
                          two pictures, and reports the host time of a replay.

Baselines generate the same picture as the warm request in PyTorch, with the same weights and noise, and in the bundle's
precision unless another one is given:

    eager           the original's algorithm, which recomputes everything for every picture
    compiled        the same, with the UNet of the steps and the decoder in torch.compile (reduce-overhead)
    plain           Stable Diffusion alone, without a photo
    plain_compiled  plain Stable Diffusion, compiled likewise
    plain_graph     plain Stable Diffusion, with the UNet in a CUDA graph

All contenders are loaded at the same time, each in its own process, and alternate request by request, so that other
load on the machine affects all alike; results are written after every turn. If that needs too much memory, name fewer
baselines, or leave out the cold request: then a separate process enrolls the subject, and the networks for that are
not kept loaded. With --subject nothing is enrolled, and the bundle needs no networks for it; baselines still read
their own photo. Bundles of random weights need no further options; for others, give the options that the bundle was
built with, which say where the weights are, as for export.compare.
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

from benchmarks.environment import bundle_facts, environment, results_path, shareable_command, write_results
from benchmarks.latency.agreement import agreement, replays
from benchmarks.latency.contenders import BASELINES, ContenderProcess
from benchmarks.latency.requests import RUNTIME, SUBJECT, Answer, Settings, random_embedding, requests
from benchmarks.latency.summary import Samples, summary, table
from benchmarks.memory import device_mib_used
from engines.targets import parse_list
from export.build import add_checkpoint_options
from moma_rt import backends
from moma_rt.backends.selection import Host, choose
from moma_rt.bundle.manifest import Bundle
from moma_rt.bundle.specs import Precision
from moma_rt.errors import InputError, MomaError, print_output, run_command
from moma_rt.schedulers.tables import schedule
from moma_rt.subject import Subject

PROGRAM = "benchmarks.latency"
KINDS = ("cold", "warm", "warm_cached_prompt", "warm_watched")
CHANNELS_FIRST, CHANNELS_LAST = "channels_first", "channels_last"
_USUAL_BASELINES = ("eager", "compiled", "plain")
# The schedulers that the baselines support.
SCHEDULERS = ("ddim", "lcm")
# Below this PSNR the baseline is not the same algorithm, and a comparison is meaningless.
LEAST_AGREEMENT_DB = 30.0
# Between a replayed picture and one whose steps were enqueued one by one, in steps of 1/255.
MOST_REPLAY_DIFFERENCE = 2

# On a GPU the first request captures or compiles, and PyTorch captures a function in its second call.
_WARM_UPS, _WARM_UPS_ON_GPU = 1, 3


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog=f"python -m {PROGRAM}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--bundle", type=Path, required=True, metavar="DIR", help="bundle to measure")
    p.add_argument("--backend", default=backends.AUTO, metavar="NAME", help="backend of the runtime (default: auto)")
    p.add_argument("--steps", type=int, default=50, help="denoising steps (default: 50)")
    p.add_argument("--repeats", type=int, default=5, help="samples of each request after the warm-up (default: 5)")
    p.add_argument(
        "--baselines",
        default=",".join(_USUAL_BASELINES),
        metavar="NAMES",
        help="baselines to compare with, separated by commas, or none "
        f"(default: {','.join(_USUAL_BASELINES)}; all: {','.join(BASELINES)})",
    )
    p.add_argument(
        "--baseline-precision",
        choices=[precision.value for precision in Precision if not precision.is_weight_only],
        help="precision of the baselines (default: the bundle's)",
    )
    p.add_argument(
        "--memory-format",
        choices=(CHANNELS_FIRST, CHANNELS_LAST),
        help=f"memory format of the baselines' convolutions (default: {CHANNELS_LAST} on a GPU, where it is faster)",
    )
    p.add_argument(
        "--subject", type=Path, metavar="FILE", help="subject saved by moma-rt enroll; excludes the cold request"
    )
    p.add_argument(
        "--requests",
        metavar="KINDS",
        help=f"kinds of request, separated by commas; warm is always measured (all: {','.join(KINDS)})",
    )
    p.add_argument(
        "--minutes", type=float, metavar="M", help="start no further turn after M minutes (default: no limit)"
    )
    p.add_argument(
        "--scheduler", choices=SCHEDULERS, default="ddim", help="scheduler; lcm runs without guidance (default: ddim)"
    )
    p.add_argument(
        "--threads", type=int, metavar="N", help="CPU threads of runtime and baselines (default: the libraries' choice)"
    )
    p.add_argument(
        "--context-embedding",
        choices=("random",),
        help="use a random embedding in place of the language model, in runtime and baselines; the default if the "
        "bundle has no language model",
    )
    p.add_argument(
        "--out", default="latency", metavar="NAME", help="write benchmarks/results/NAME.json (default: latency)"
    )
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
    names = () if options.baselines == "none" else parse_list("--baselines", "baseline", options.baselines, BASELINES)
    kinds = _kinds(options.requests, options.subject)
    schedule(options.scheduler, options.steps, 1.0)
    backends.check(options.backend, options.threads)
    bundle = Bundle.open(options.bundle)
    backend = choose(options.backend, bundle.manifest, Host()).backend
    settings = _settings(options, bundle, backend)
    # Taken before the measurements, since the commit is that of the code loaded now.
    where = environment(shareable_command(PROGRAM, given))

    def keep(samples: Mapping[str, Samples]) -> dict[str, Any]:
        results = {
            "environment": where,
            "bundle": bundle_facts(bundle),
            "settings": _described(settings, bundle, len(samples[RUNTIME].answers["warm"])),
            "backend": backend,
            **summary(samples),
            "replay": replays(samples[RUNTIME].answers, options.steps),
            "agreement": _agreement(samples, options, bundle.network("denoiser").precision),
        }
        write_results(options.out, results)
        return results

    with tempfile.TemporaryDirectory() as folder:
        if settings.subject is None and "cold" not in kinds:
            settings = dataclasses.replace(settings, subject=enrolled(settings, Path(folder) / "cup.subject"))
        is_over = _is_over(start, options.minutes)
        results = keep(measure(settings, kinds, names, options.repeats, is_over, keep))
    print_output(f"{results_path(options.out)}\n{table(results)}")
    return _check_replays(results["replay"])


def _settings(options: argparse.Namespace, bundle: Bundle, backend: str) -> Settings:
    """Return what all requests share.

    Raises:
        SubjectError: the subject cannot be read, or does not fit the bundle.
    """
    has_language_model = options.context_embedding is None and bundle.has("vision_encoder", "language_model")
    name = SUBJECT
    if options.subject is not None:
        subject = Subject.load(options.subject)
        subject.check(bundle)
        name = subject.name
    on_gpu = device_mib_used() is not None
    return Settings(
        bundle=options.bundle,
        backend=backend,
        steps=options.steps,
        scheduler=options.scheduler,
        embedding=None if has_language_model else random_embedding(bundle.manifest.geometry.embedding_width),
        weights=options,
        subject=options.subject,
        subject_name=name,
        threads=options.threads,
        baseline_precision=None if options.baseline_precision is None else Precision(options.baseline_precision),
        channels_last=on_gpu if options.memory_format is None else options.memory_format == CHANNELS_LAST,
    )


def _described(settings: Settings, bundle: Bundle, repeats: int) -> dict[str, Any]:
    precision = settings.baseline_precision or bundle.network("denoiser").precision
    return {
        "steps": settings.steps,
        "scheduler": settings.scheduler,
        "guidance_scale": settings.guidance_scale,
        "repeats": repeats,
        "threads": settings.threads,
        "language_model": settings.has_language_model,
        "baseline_precision": precision.value,
        "baseline_memory_format": CHANNELS_LAST if settings.channels_last else CHANNELS_FIRST,
    }


def _agreement(
    samples: Mapping[str, "Samples"], options: argparse.Namespace, precision: Precision
) -> dict[str, float] | None:
    """Compare the pictures with the original's; returns None if they need not be equal.

    Raises:
        MomaError: the baseline generates different pictures than the runtime.
    """
    # Schedulers other than ddim draw their own noise in every step, and a saved subject has another photo.
    if options.scheduler != "ddim" or options.subject is not None:
        return None
    found = agreement({name: of_contender.answers["warm"] for name, of_contender in samples.items()})
    if precision is Precision.FP32 and options.baseline_precision in (None, "fp32") and device_mib_used() is None:
        _check_agreement(found)
    return found


def _kinds(asked: str | None, subject: Path | None = None) -> tuple[str, ...]:
    """Return the kinds of request to measure, in the order of `KINDS`; CUDA graphs are replayed only on a GPU.

    Raises:
        InputError: an unknown kind, or "cold" together with a saved subject.
    """
    if asked is None:
        left_out = {"cold"} if subject is not None else set()
        if device_mib_used() is None:
            left_out.add("warm_watched")
        return tuple(kind for kind in KINDS if kind not in left_out)
    if subject is not None and "cold" in asked.split(","):
        raise InputError(f"--requests {asked}: with --subject nothing is enrolled; leave out cold, or --subject")
    chosen = parse_list("--requests", "request", asked, KINDS)
    return tuple(kind for kind in KINDS if kind in chosen or kind == "warm")


def _is_over(start: float, minutes: float | None) -> Callable[[], bool]:
    return lambda: minutes is not None and time.monotonic() - start > 60 * minutes


def enrolled(settings: Settings, out: Path) -> Path:
    """Enroll the subject of the warm requests and save it, in a process that ends and so frees its memory."""
    request = requests(0)["warm"]
    command = [sys.executable, "-m", "moma_rt", "enroll", settings.bundle, request.photo, request.mask, "--quiet"]
    command += ["--name", request.name, "--seed", request.subject_seed, "--backend", settings.backend, "--out", out]
    done = subprocess.run([str(part) for part in command], check=False)
    if done.returncode:
        raise MomaError(f"moma-rt enroll ended with {done.returncode}")
    return out


def measure(
    settings: Settings,
    kinds: Sequence[str],
    baselines: Sequence[str],
    repeats: int,
    is_over: Callable[[], bool],
    keep: Callable[[Mapping[str, Samples]], object] = lambda _: None,
) -> dict[str, Samples]:
    """Measure the runtime and the baselines alternately; each turn makes one set of requests.

    A baseline does the same work for all kinds, so it only gets the warm request. After the first turn, no turn starts
    once `is_over` returns True. `keep` is called with the samples so far after every turn.
    """
    asked = {RUNTIME: kinds} | dict.fromkeys(baselines, ("warm",))
    warm_ups = _WARM_UPS if device_mib_used() is None else _WARM_UPS_ON_GPU
    contenders: dict[str, ContenderProcess] = {}
    samples: dict[str, Samples] = {}
    for name in (RUNTIME, *baselines):
        contenders[name] = ContenderProcess(name, settings)
        for turn in range(warm_ups):
            make_requests(contenders[name], turn, asked[name], settings.subject_name)
        samples[name] = Samples(device_gb=contenders[name].device_gb())
    for turn in range(warm_ups, warm_ups + repeats):
        if turn > warm_ups and is_over():
            break
        for name, contender in contenders.items():
            for kind, answer in make_requests(contender, turn, asked[name], settings.subject_name).items():
                samples[name].answers.setdefault(kind, []).append(answer)
            samples[name].peak_gb = contender.peak_gb()
        keep(samples)
    for contender in contenders.values():
        contender.end()
    return samples


def make_requests(contender: ContenderProcess, turn: int, kinds: Sequence[str], subject_name: str) -> dict[str, Answer]:
    """Make the turn's request of each kind, and return the answers."""
    made = requests(turn, subject_name)
    return {kind: contender.answer(made[kind]) for kind in kinds}


def _check_agreement(found: Mapping[str, float] | None) -> None:
    """Check pictures of fp32 networks; random weights are chaotic in lower precisions, so these are only reported.

    Raises:
        MomaError: the baseline generates different pictures than the runtime.
    """
    if found is not None and found["psnr_db"] < LEAST_AGREEMENT_DB:
        raise MomaError(
            f"the runtime's pictures are {found['psnr_db']} dB from those of the original, less than "
            f"{LEAST_AGREEMENT_DB:g} dB: they are not the same algorithm, and their times are not written"
        )


def _check_replays(found: Mapping[str, Any] | None) -> int:
    """Return the exit code: 1, with a line on stderr, if replayed pictures differ."""
    apart = None if found is None else found["largest_difference"]
    if apart is None or apart <= MOST_REPLAY_DIFFERENCE:
        return 0
    print(
        f"{PROGRAM}: a replayed picture is {apart}/255 from the one whose steps were enqueued one by one, "
        f"{MOST_REPLAY_DIFFERENCE} are allowed",
        file=sys.stderr,
    )
    return 1
