"""Step 2: the bundle's denoiser on the runtime's own objects: `python -m benchmarks.gpu.denoiser --bundle DIR`.

Times of one step and of a whole generation with the decoding, each as one CUDA graph, with and without guidance; then
the error of a step against the eager module of the same weights in fp32, and that of the eager module in the bundle's
precision beside it. Ends with 1 where the package's error is more than twice that of eager PyTorch.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.environment import bundle_facts, percentiles
from benchmarks.gpu.eager import EagerDenoiser, checkpoint_of_bundle
from benchmarks.gpu.generation import Generation, first_usable
from benchmarks.gpu.step import StepOptions, StepResults, step_options
from moma_rt.backends.base import Array
from moma_rt.bundle.specs import Precision
from moma_rt.errors import MomaError, run_command
from moma_rt.schedulers.tables import schedule

PROGRAM = "benchmarks.gpu.denoiser"
Arrays = Mapping[str, Array]
_GUIDANCE = {2: 7.5, 1: 1.0}
# What rounding alone may do to the next latents, where eager PyTorch happens to be closer than that.
_LEAST_ALLOWED = {Precision.FP32: 1e-4, Precision.FP16: 2e-3, Precision.BF16: 2e-2}
_JUDGED = "next_latents"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the step; returns the exit code."""
    options = step_options(PROGRAM, sys.argv[1:] if arguments is None else arguments)
    return run_command(PROGRAM, lambda: _measure(options))


def _measure(options: StepOptions) -> int:
    bundle, choice = first_usable(options)
    results = StepResults("denoiser", options, bundle=bundle_facts(bundle), backend=choice.backend)
    generation = Generation(bundle, choice)
    results.put(load_seconds=generation.load_seconds)
    steps, samples = (2, 1) if options.rehearse else (50, 10)
    for halves in _GUIDANCE:
        results.add("times", times(generation, halves, steps, samples))
    checkpoint = checkpoint_of_bundle(bundle, ("denoiser",))
    precision = bundle.network("denoiser").precision
    eager = {
        p: EagerDenoiser(checkpoint, bundle.manifest.geometry, p, options.device) for p in {Precision.FP32, precision}
    }
    for halves in _GUIDANCE:
        inputs = generation.inputs(halves)
        exact, rounded = (eager[p].outputs(inputs) for p in (Precision.FP32, precision))
        results.add("errors", {"halves": halves, **errors(generation.outputs(inputs), rounded, exact, precision)})
    (guided, plain), found = results["times"], results["errors"]
    is_right = all(one["is_right"] for one in found)
    missing = "" if options.rehearse else not_captured(results["times"])
    said = ", ".join(f"{one['package'][_JUDGED]:.1e} (eager {one['eager'][_JUDGED]:.1e})" for one in found)
    results.finish(
        f"{steps} guided steps and decoding {guided['generation_ms']['p50']:.1f} ms, a step "
        f"{guided['step_ms']['p50']:.3f} ms; unguided {plain['generation_ms']['p50']:.1f} and "
        f"{plain['step_ms']['p50']:.3f} ms; error {said}{'' if is_right else ', WRONG'}"
        f"{missing and ', NOT CAPTURED: ' + missing}",
        is_right=is_right,
    )
    return 0 if is_right and not missing else 1


def not_captured(cases: Sequence[Mapping[str, Any]]) -> str:
    """Which graphs of which cases were not captured and why; empty where all were."""
    halves = {2: "guided", 1: "unguided"}
    return "; ".join(
        f"{halves[case['halves']]} {what}: {why}" for case in cases for what, why in case["why_not"].items()
    )


def times(generation: Generation, halves: int, steps: int, samples: int) -> dict[str, Any]:
    """Milliseconds of a step and of a generation with this number of guidance halves.

    Raises:
        MomaError: the latents became NaN or infinity.
    """
    rows = schedule("ddim", steps, _GUIDANCE[halves])
    buffers = generation.buffers(halves, rows)
    latents = generation.inputs(halves)["latents"]

    def whole() -> None:
        for index in range(steps):
            buffers.step(index, halves)
        buffers.decode()

    # This prepares what the libraries choose when they first run; without graphs the first run does.
    recording = buffers.graph([halves] * steps)
    generation.milliseconds(whole, samples=1)

    def enqueue_step() -> None:
        buffers.step(0, halves)

    of_one = None if recording is None else generation.backend.capture(enqueue_step)
    graphs = (("generation", recording, whole), ("step", of_one, enqueue_step))
    one = enqueue_step if of_one is None else of_one.replay
    of_step = generation.milliseconds(one, samples, at_once=1 if of_one is None else 5)
    buffers.start(latents)
    run = whole if recording is None else lambda: buffers.replay(recording, steps)
    of_generation = []
    for _ in range(samples):
        buffers.start(latents)
        of_generation += generation.milliseconds(run, samples=1)
    buffers.start(latents)
    run()
    if not np.isfinite(buffers.read_state("latents")).all():
        raise MomaError(f"the latents became NaN or infinity in {steps} steps")
    return {
        "halves": halves,
        "steps": steps,
        "is_captured": recording is not None and of_one is not None,
        # Of the graphs that were not captured.
        "why_not": {name: generation.why_not_captured(work) for name, graph, work in graphs if graph is None},
        "step_ms": percentiles(of_step),
        "generation_ms": percentiles(of_generation),
        "buffers_mib": round(buffers.size / 2**20, 1),
    }


def errors(package: Arrays, eager: Arrays, exact: Arrays, precision: Precision) -> dict[str, Any]:
    """Errors of a package's outputs and of eager PyTorch's in the same precision, and whether the former are right."""
    of_package, of_eager = relative_errors(package, exact), relative_errors(eager, exact)
    allowed = max(2 * of_eager[_JUDGED], _LEAST_ALLOWED[precision])
    # A NaN is not right either.
    is_right = of_package[_JUDGED] <= allowed
    return {"package": of_package, "eager": of_eager, "allowed": allowed, "is_right": is_right}


def relative_errors(found: Arrays, exact: Arrays) -> dict[str, float]:
    """‖found − exact‖ / ‖exact‖ of every output."""
    return {
        name: float(np.linalg.norm((found[name] - wanted).astype(np.float64)) / max(np.linalg.norm(wanted), 1e-30))
        for name, wanted in exact.items()
    }


if __name__ == "__main__":
    sys.exit(main())
