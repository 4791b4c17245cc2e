"""Step 7: time whole requests: `python -m benchmarks.gpu.pictures --bundle DIR --bundle DIR --subject FILE`.

Runs `benchmarks.latency` with 50 steps of ddim and with 4 of lcm, an enrolled subject, and no baselines, on the first
usable bundle: the one built on this machine with autotuning, or else the packed one.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence

from benchmarks.environment import results_path
from benchmarks.gpu.generation import first_usable
from benchmarks.gpu.step import StepOptions, step_options
from benchmarks.latency import command as latency
from moma_rt.errors import print_output, run_command

PROGRAM = "benchmarks.gpu.pictures"
_SCHEDULES = (("ddim", 50, 10), ("lcm", 4, 10))
_REHEARSED_SCHEDULES = (("ddim", 1, 1), ("lcm", 1, 1))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the step; returns the exit code."""
    p = argparse.ArgumentParser(
        prog=f"python -m {PROGRAM}",
        description=__doc__,
        epilog="Further options are those of the other steps: python -m benchmarks.gpu.denoiser --help.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--subject", type=str, required=True, metavar="FILE", help="subject enrolled for these bundles")
    own, others = p.parse_known_args(arguments)
    options = step_options(PROGRAM, others)
    return run_command(PROGRAM, lambda: _measure(options, own.subject))


def _measure(options: StepOptions, subject: str) -> int:
    bundle, _ = first_usable(options)
    said, failed = [], 0
    schedules = _REHEARSED_SCHEDULES if options.rehearse else _SCHEDULES
    for index, (scheduler, steps, repeats) in enumerate(schedules):
        if options.is_over():
            said.append(f"{scheduler} left out")
            continue
        name = f"latency_{scheduler}"
        # Divides the remaining time equally between the remaining schedules.
        minutes = (options.end - time.monotonic()) / (len(schedules) - index) / 60
        command = ["--bundle", str(bundle.root), "--backend", options.backend, "--scheduler", scheduler]
        command += ["--steps", str(steps), "--repeats", str(repeats), "--minutes", f"{minutes:.2f}"]
        command += ["--baselines", "none", "--context-embedding", "random", "--subject", subject, "--out", name]
        # Exit code 1 means that a replayed picture differs; the results are written all the same.
        code = latency.main([*command, "--requests", "warm" if options.rehearse else "warm,warm_watched"])
        failed = max(failed, code)
        if code > 1:
            said.append(f"{scheduler} ended with {code}")
            continue
        times = json.loads(results_path(name).read_text(encoding="utf-8"))["runtime"]["requests"]["warm"]["total"]
        said.append(
            f"{steps} steps of {scheduler} p20/p50/p80 {times['p20']:.1f}/{times['p50']:.1f}/{times['p80']:.1f} ms"
        )
    print_output(f"{bundle.root.name}: {', '.join(said)}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
