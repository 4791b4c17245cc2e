"""A GPU machine that is lent for minutes, used well: `python -m benchmarks.gpu.lease first|second [STEP ...]`.

    first     590 s: the machine's facts; the kernels' tests; a denoiser that was carried as code; a profile; baselines;
              attention; a build that measures; whole requests
    second    130 s: TensorRT-RTX on this GPU, where it was carried; whole requests; compiled baselines

Named steps run alone, in their order; `--list` names all, also those that belong to no call. Every step has its own
limit, writes its JSON after every case, and prints one line. Environment variables:

    OUT         folder that gets two files, what became of each step and an archive of all results and logs
                (default: build/lease)
    WORK        folder outside the sources, kept from one call to the next, with each result in WORK/results
                (default: /var/tmp/moma-rt-lease)
    SHIP        folder of what benchmarks.gpu.pack made to be carried (default: .ship/first, .ship/second)
    BUNDLE      default: WORK/bundle
    BACKEND     of the runtime (default: inductor)
    TARGET      of the carried bundle, as export.build's --target (default: inductor:smNN of this GPU)
    PRECISION   of bundles and baselines (default: fp16)
    REHEARSE=1  every step on a CPU with the tiny geometry, eager calls in place of CUDA graphs
    MOMA_RT_COMMIT  the commit, where the sources have no history
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.environment import RESULTS_VARIABLE, environment
from benchmarks.gpu.plan import CALLS, FIRST, ROOT, Setup, all_steps, groups
from benchmarks.gpu.runner import Lease, run_steps
from benchmarks.gpu.toolchain import toolchain
from moma_rt.errors import print_output, run_command

PROGRAM = "benchmarks.gpu.lease"
# Long enough that no step of a rehearsal is skipped.
_REHEARSAL_SECONDS = 3600.0
# Threads of PyTorch spin while they wait: where cores are shared, small networks take ten times as long.
_ON_FEW_CORES = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TORCHINDUCTOR_COMPILE_THREADS": "1"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 1 where a step did not pass."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    p = argparse.ArgumentParser(
        prog=f"python -m {PROGRAM}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("call", nargs="?", choices=CALLS, help="(with --list: either)")
    p.add_argument("steps", nargs="*", metavar="STEP", help="(default: those of the call)")
    p.add_argument("--seconds", type=float, metavar="N", help="of all of it (default: those of the call)")
    p.add_argument("--list", action="store_true", help="print every step and its command, and run nothing")
    options = p.parse_args(given)
    if options.call is None and not options.list:
        p.error(f"which call is it: {' or '.join(CALLS)}?")
    return run_command(PROGRAM, lambda: _run(options, given))


def _run(options: argparse.Namespace, given: Sequence[str]) -> int:
    setup = Setup.of(os.environ, options.call or FIRST, needs_gpu=not options.list)
    if options.list:
        print_output("\n".join(f"{name:<18}{' '.join(step.command)}" for name, step in all_steps(setup).items()))
        return 0
    chosen = groups(setup, options.call, options.steps)
    # Steps are children in sessions of their own, which have to be ended as well.
    signal.signal(signal.SIGTERM, _stop)
    usual = _REHEARSAL_SECONDS if setup.rehearse else CALLS[options.call]
    setup.work.mkdir(parents=True, exist_ok=True)
    lease = Lease(
        name={"first": "lease", "second": "lease_2"}[options.call],
        out=setup.out,
        results=setup.results,
        seconds=usual if options.seconds is None else options.seconds,
        environment=_environment(setup),
        facts={"environment": environment(f"python -m {PROGRAM} {' '.join(given)}"), "rehearsal": setup.rehearse},
        places=setup.places,
    )
    return 0 if run_steps(lease, chosen) else 1


def _environment(setup: Setup) -> dict[str, str]:
    """Of every step."""
    path = (str(ROOT), str(setup.packages), os.environ.get("PYTHONPATH"))
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "PYTHONUNBUFFERED": "1",
        RESULTS_VARIABLE: str(setup.results),
        **(_ON_FEW_CORES if setup.rehearse else toolchain(setup.work / "lib")),
    }


def _stop(*_: Any) -> None:
    raise SystemExit(128 + signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
