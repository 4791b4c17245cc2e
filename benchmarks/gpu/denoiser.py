"""Step 2: time and check the bundle's denoiser in the runtime: `python -m benchmarks.gpu.denoiser --bundle DIR`.

Times one step, and a whole generation with decoding, each as one CUDA graph, with and without guidance. Then computes
the error of a step against the eager module with the same weights in fp32, and, for comparison, the error of the eager
module in the bundle's precision. Exits with 1 if the package's error is more than twice that of eager PyTorch.
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
# The error of the next latents that is always allowed, because it is within rounding.
_LEAST_ALLOWED = {Precision.FP32: 1e-4, Precision.FP16: 2e-3, Precision.BF16: 2e-2}
_JUDGED = "next_latents"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the step; returns the exit code."""
    options = step_options(PROGRAM, sys.argv[1:] if arguments is None else arguments, description=__doc__)
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
    """Return which graphs were not captured and why; empty if all were."""
    halves = {2: "guided", 1: "unguided"}
    return "; ".join(
        f"{halves[case['halves']]} {what}: {why}" for case in cases for what, why in case["why_not"].items()
    )


def times(generation: Generation, halves: int, steps: int, samples: int) -> dict[str, Any]:
    """Time a step and a generation with this number of guidance halves, in milliseconds.

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

    # Capturing lets libraries select their algorithms; without graphs the first run does.
    whole_graph = buffers.graph([halves] * steps)
    generation.milliseconds(whole, samples=1)

    def enqueue_step() -> None:
        buffers.step(0, halves)

    step_graph = None if whole_graph is None else generation.backend.capture(enqueue_step)
    graphs = (("generation", whole_graph, whole), ("step", step_graph, enqueue_step))
    one = enqueue_step if step_graph is None else step_graph.replay
    of_step = generation.milliseconds(one, samples, at_once=1 if step_graph is None else 5)
    buffers.start(latents)
    run = whole if whole_graph is None else lambda: buffers.replay(whole_graph, steps)
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
        "is_captured": whole_graph is not None and step_graph is not None,
        # The reason for each graph that was not captured.
        "why_not": {name: generation.why_not_captured(work) for name, graph, work in graphs if graph is None},
        "step_ms": percentiles(of_step),
        "generation_ms": percentiles(of_generation),
        "buffers_mib": round(buffers.size / 2**20, 1),
    }


def errors(package: Arrays, eager: Arrays, exact: Arrays, precision: Precision) -> dict[str, Any]:
    """Return the errors of the package and of eager PyTorch in the same precision, and whether the package is right."""
    of_package, of_eager = relative_errors(package, exact), relative_errors(eager, exact)
    allowed = max(2 * of_eager[_JUDGED], _LEAST_ALLOWED[precision])
    # False for NaN.
    is_right = of_package[_JUDGED] <= allowed
    return {"package": of_package, "eager": of_eager, "allowed": allowed, "is_right": is_right}


def relative_errors(found: Arrays, exact: Arrays) -> dict[str, float]:
    """Return ‖found − exact‖ / ‖exact‖ of every output."""
    return {
        name: float(np.linalg.norm((found[name] - wanted).astype(np.float64)) / max(np.linalg.norm(wanted), 1e-30))
        for name, wanted in exact.items()
    }


if __name__ == "__main__":
    sys.exit(main())
