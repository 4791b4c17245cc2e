"""Run all benchmarks on a GPU machine that is available for minutes: `python -m benchmarks.gpu.lease first|second
[STEP ...]`.

    first     590 s: facts about the machine; the kernels' tests; the denoiser of the packed bundle; a profile;
              baselines; attention; a build with autotuning; whole requests
    second    130 s: TensorRT-RTX on this GPU, if it was packed; whole requests; compiled baselines

Given step names, only these run, in their usual order; `--list` lists all steps, also those in neither call. Every step
has a time limit, writes its JSON after every case, and prints one line. Environment variables:

    OUT         folder for two files: the status of each step, and an archive of all results and logs
                (default: build/lease)
    WORK        folder outside the sources that is kept between calls; results are in WORK/results
                (default: /var/tmp/moma-rt-lease)
    SHIP        folder that benchmarks.gpu.pack wrote (default: .ship/first, .ship/second)
    BUNDLE      folder that the packed bundle is unpacked to (default: WORK/bundle)
    BACKEND     backend of the runtime (default: inductor)
    TARGET      --target of export.build for the packed bundle (default: inductor:smNN of this GPU)
    PRECISION   precision of bundles and baselines (default: fp16)
    REHEARSE=1  run every step on a CPU with the tiny geometry, and eager calls in place of CUDA graphs
    MOMA_RT_COMMIT  the commit of the sources, if they have no git history
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
# PyTorch's threads spin while they wait, which makes small networks ten times slower on shared cores.
_ON_FEW_CORES = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TORCHINDUCTOR_COMPILE_THREADS": "1"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code, 1 if a step did not pass."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    p = argparse.ArgumentParser(
        prog=f"python -m {PROGRAM}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("call", nargs="?", choices=CALLS, help="which set of steps to run; optional with --list")
    p.add_argument("steps", nargs="*", metavar="STEP", help="steps to run (default: those of the call)")
    p.add_argument("--seconds", type=float, metavar="N", help="time limit of the whole run (default: that of the call)")
    p.add_argument("--list", action="store_true", help="print every step and its command, and run nothing")
    options = p.parse_args(given)
    if options.call is None and not options.list:
        p.error(f"name the call: {' or '.join(CALLS)}")
    return run_command(PROGRAM, lambda: _run(options, given))


def _run(options: argparse.Namespace, given: Sequence[str]) -> int:
    setup = Setup.of(os.environ, options.call or FIRST, needs_gpu=not options.list)
    if options.list:
        print_output("\n".join(f"{name:<18}{' '.join(step.command)}" for name, step in all_steps(setup).items()))
        return 0
    chosen = groups(setup, options.call, options.steps)
    # Steps run in process groups of their own, which must end with this process.
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
    """Return the environment variables of every step."""
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
