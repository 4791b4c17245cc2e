"""Step 4: time the PyTorch baselines with the bundle's weights: `python -m benchmarks.gpu.baselines --bundle DIR
[eager|compiled]`.

    eager       the original MoMA and plain Stable Diffusion, in fp16 and bf16, with channels first and last, 50 steps
                of ddim with guidance and 4 of lcm without; then plain Stable Diffusion with its UNet in a CUDA graph
    compiled    both with torch.compile (reduce-overhead)

The results are written after each case; those in the bundle's precision come first.
"""

import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.environment import bundle_facts, percentiles
from benchmarks.gpu.eager import checkpoint_of_bundle
from benchmarks.gpu.generation import NETWORKS, first_usable
from benchmarks.gpu.step import StepOptions, StepResults, step_options
from benchmarks.latency.original import Original, PlainDiffusion
from benchmarks.latency.requests import Answer, Settings, random_embedding, requests
from benchmarks.timer import GpuTimer, HostTimer, Timer
from export.checkpoints.model import Checkpoint
from moma_rt.bundle.manifest import Bundle
from moma_rt.bundle.specs import Precision
from moma_rt.errors import run_command

PROGRAM = "benchmarks.gpu.baselines"
PARTS = ("eager", "compiled")
_KINDS: Mapping[str, type[PlainDiffusion]] = {"moma": Original, "plain": PlainDiffusion}
# Scheduler and steps.
_SCHEDULES = (("ddim", 50), ("lcm", 4))
_REHEARSED_SCHEDULES = (("ddim", 1), ("lcm", 1))
_SAMPLES = 3


@dataclass(frozen=True)
class Variant:
    """A way to run an algorithm. `execution` is that of `PlainDiffusion`; `formats` are values of channels_last."""

    kind: str
    precision: Precision
    execution: str
    formats: tuple[bool, ...]

    def described(self) -> dict[str, str]:
        return {"kind": self.kind, "precision": self.precision.value, "execution": self.execution}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the step; returns the exit code."""
    options = step_options(PROGRAM, sys.argv[1:] if arguments is None else arguments, PARTS, description=__doc__)
    return run_command(PROGRAM, lambda: _measure(options))


def _measure(options: StepOptions) -> int:
    bundle, _ = first_usable(options)
    name = "baselines" if options.part == "eager" else f"baselines_{options.part}"
    results = StepResults(name, options, bundle=bundle_facts(bundle), cases=[], unet_steps=[])
    checkpoint = checkpoint_of_bundle(bundle, NETWORKS)
    left_out = 0
    for variant in variants(options.part, bundle.network("denoiser").precision, options.rehearse):
        if options.is_over():
            left_out += 1
            continue
        for key, case in measured(variant, checkpoint, bundle, options):
            results.add(key, case)
    results.finish(summary(results["cases"], results["unet_steps"], left_out), variants_left_out=left_out)
    return 0


def variants(part: str, precision: Precision, rehearse: bool) -> Iterator[Variant]:
    """Yield the variants, the bundle's precision first. A rehearsal has only that one, and eager calls for graphs."""
    others = [] if rehearse else [p for p in (Precision.FP16, Precision.BF16) if p is not precision]
    if part == "compiled":
        # The variant that takes longest to compile comes last.
        yield from (
            Variant(kind, precision, "eager" if rehearse else "compiled", (True,)) for kind in ("plain", "moma")
        )
        return
    for each in (precision, *others):
        formats = (True,) if rehearse else (False, True)
        yield from (Variant(kind, each, "eager", formats) for kind in _KINDS)
        if each is precision:
            yield Variant("plain", each, "eager" if rehearse else "graph", (True,))


def measured(
    variant: Variant, checkpoint: Checkpoint, bundle: Bundle, options: StepOptions
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Measure pictures of every schedule ("cases") and guided UNet steps ("unet_steps"); yields each result."""
    schedules = _REHEARSED_SCHEDULES if options.rehearse else _SCHEDULES
    if options.part == "compiled":
        # Without guidance the batch size differs, which would need a second compilation.
        schedules = schedules[:1]
    embedding = random_embedding(bundle.manifest.geometry.embedding_width)
    settings = Settings(bundle.root, "none", 1, "ddim", embedding, Namespace(), baseline_precision=variant.precision)
    start = time.perf_counter()
    baseline = _KINDS[variant.kind](checkpoint, settings, variant.execution)
    load_seconds = round(time.perf_counter() - start, 2)
    for channels_last in variant.formats:
        if channels_last:
            baseline.use_channels_last()
        facts = {**variant.described(), "channels_last": channels_last, "load_seconds": load_seconds}
        for scheduler, steps in schedules:
            if options.is_over():
                return
            baseline.settings = replace(settings, scheduler=scheduler, steps=steps, channels_last=channels_last)
            case = {"scheduler": scheduler, "steps": steps, **pictures(baseline, options)}
            yield "cases", {**facts, **case}
        if variant.kind == "plain" and not options.is_over():
            yield "unet_steps", {**facts, "ms": unet_step(baseline, options)}


def pictures(baseline: PlainDiffusion, options: StepOptions) -> dict[str, Any]:
    """Time pictures in milliseconds; the first is reported separately, because libraries tune or compile in it."""
    made = requests(0)["warm"]
    first = baseline.answer(made)
    if baseline.compiled:
        # PyTorch captures CUDA graphs in a function's second call.
        baseline.answer(made)
    answers: list[Answer] = []
    for _ in range(1 if options.rehearse else _SAMPLES):
        if answers and options.is_over():
            break
        answers.append(baseline.answer(made))
    return {
        "first_ms": round(1000 * first.seconds, 1),
        "ms": percentiles([1000 * answer.seconds for answer in answers]),
        "stages_ms": {
            stage: percentiles([1000 * answer.stages[stage] for answer in answers])["p50"]
            for stage in answers[0].stages
        },
        "samples": len(answers),
    }


def unet_step(baseline: PlainDiffusion, options: StepOptions) -> dict[str, float]:
    """Time the UNet alone on both guidance halves, in milliseconds; on a GPU always as a CUDA graph.

    A compiled UNet captures its own graphs.
    """
    geometry, device, dtype = baseline.geometry, baseline.device, baseline.dtype
    latents = torch.randn(1, geometry.latent_channels, geometry.latent_size, geometry.latent_size, device=device)
    text = torch.randn(2, geometry.text_tokens, geometry.text_width, device=device).to(dtype)
    timestep = torch.tensor(500, device=device)
    # Expanded as in a picture, because other strides would trigger a recompilation.
    latents = latents.to(dtype).expand(2, -1, -1, -1)
    unet = baseline.step if baseline.compiled else baseline.unet

    def call() -> object:
        if baseline.compiled:
            torch.compiler.cudagraph_mark_step_begin()
        return unet(latents, timestep, encoder_hidden_states=text, cross_attention_kwargs=None, return_dict=False)

    timer: Timer
    if options.rehearse:
        timer = HostTimer(1)
    elif baseline.compiled:
        timer = HostTimer(20, torch.cuda.synchronize)
    else:
        timer = GpuTimer(20)
    with torch.inference_mode():
        return percentiles(timer(call).milliseconds)


def summary(cases: Sequence[Mapping[str, Any]], steps: Sequence[Mapping[str, Any]], left_out: int) -> str:
    """Return one line: the fastest of each kind and schedule, and the fastest UNet step."""
    fastest: dict[str, float] = {}
    for case in cases:
        name = f"{case['kind']} {case['scheduler']} {case['steps']}"
        fastest[name] = min(case["ms"]["p50"], fastest.get(name, float("inf")))
    said = [f"{name} {ms:.0f} ms" for name, ms in fastest.items()]
    if steps:
        said.append(f"plain UNet {min(step['ms']['p50'] for step in steps):.2f} ms a step")
    return f"fastest of {len(cases)}: {', '.join(said)}{f'; {left_out} variants left out' if left_out else ''}"


if __name__ == "__main__":
    sys.exit(main())
