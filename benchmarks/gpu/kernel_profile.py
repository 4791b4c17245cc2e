"""Step 3: profile the kernels of a denoiser step: `python -m benchmarks.gpu.kernel_profile --bundle DIR`.

Steps are enqueued one by one under torch.profiler. The times of kernels are summed by group, and the twenty slowest
kernels are listed, with the number of launches per step.
"""

import re
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.environment import bundle_facts
from benchmarks.gpu.generation import Generation, first_usable
from benchmarks.gpu.step import StepOptions, StepResults, step_options
from moma_rt.errors import MomaError, run_command
from moma_rt.schedulers.tables import schedule

PROGRAM = "benchmarks.gpu.kernel_profile"
HALVES = 2
_LISTED_KERNELS = 20
# The first pattern that matches a kernel's name gives its group. Inductor names a Triton kernel after all operations
# fused into it: a pointwise kernel named after a convolution adds its bias, and is not a convolution.
_GROUPS = (
    ("attention", r"injected_self_attention|context_cross_attention|flash|fmha|sdpa|attention"),
    ("gemm", r"triton_tem"),
    ("norm", r"triton_(red|per)_.*(norm|welford|var_mean)|native_group_norm|native_layer_norm|layer_norm_kernel"),
    ("other", r"^triton_"),
    # Before gemm, because convolutions may be computed as matrix products.
    ("conv", r"conv|fprop|implicit_gemm|winograd|cudnn|nchwtonhwc|nhwctonchw"),
    ("gemm", r"gemm|nvjet|cublas|splitk|addmm|aten::b?mm|linear"),
)
_OTHER = "other"
GROUPS = ("conv", "gemm", "attention", "norm", _OTHER)


@dataclass(frozen=True)
class Kernel:
    """A kernel: its name, launches per step, and microseconds per step."""

    name: str
    launches: float
    microseconds: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the step; returns the exit code."""
    options = step_options(PROGRAM, sys.argv[1:] if arguments is None else arguments, description=__doc__)
    return run_command(PROGRAM, lambda: _measure(options))


def _measure(options: StepOptions) -> int:
    bundle, choice = first_usable(options)
    results = StepResults("profile", options, bundle=bundle_facts(bundle), backend=choice.backend)
    kernels = profiled(Generation(bundle, choice), steps=1 if options.rehearse else 10, on_gpu=not options.rehearse)
    if not kernels and not options.rehearse:
        raise MomaError("the profiler saw no kernel: CUPTI may lack the permission to trace on this machine")
    found = summed(kernels)
    shares = ", ".join(f"{name} {found['groups'][name]['share']:.0%}" for name in GROUPS)
    results.finish(f"{found['launches']:.0f} launches a step, {found['milliseconds']:.3f} ms: {shares}", **found)
    return 0


def profiled(generation: Generation, steps: int, on_gpu: bool) -> list[Kernel]:
    """Return the kernels of a guided step, the slowest first; on a CPU, PyTorch's operators."""
    buffers = generation.buffers(HALVES, schedule("ddim", 50, 7.5))
    # Libraries select their kernels in the first runs.
    for index in range(2):
        buffers.step(index, HALVES)
    generation.backend.synchronize()
    activities = [ProfilerActivity.CUDA, ProfilerActivity.CPU] if on_gpu else [ProfilerActivity.CPU]
    with profile(activities=activities) as trace:
        for index in range(steps):
            buffers.step(index, HALVES)
        generation.backend.synchronize()
    launches: dict[str, int] = defaultdict(int)
    microseconds: dict[str, float] = defaultdict(float)
    wanted = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    for event in trace.events():
        # User annotations also appear as device events, and span kernels.
        if event.device_type == wanted and not getattr(event, "is_user_annotation", False):
            launches[event.name] += 1
            microseconds[event.name] += event.self_device_time_total if on_gpu else event.self_cpu_time_total
    made = [Kernel(name, launches[name] / steps, microseconds[name] / steps) for name in launches]
    return sorted(made, key=lambda kernel: -kernel.microseconds)


def group_of(name: str) -> str:
    """Return the group of a kernel, one of `GROUPS`, by its name."""
    return next((group for group, pattern in _GROUPS if re.search(pattern, name, re.IGNORECASE)), _OTHER)


def summed(kernels: Sequence[Kernel]) -> dict[str, Any]:
    """Return launches and milliseconds per step, in total and by group, and the slowest kernels."""
    total = sum(kernel.microseconds for kernel in kernels)
    groups: dict[str, Mapping[str, float]] = {}
    for group in GROUPS:
        own = [kernel for kernel in kernels if group_of(kernel.name) == group]
        taken = sum(kernel.microseconds for kernel in own)
        groups[group] = {
            "launches": round(sum(kernel.launches for kernel in own), 1),
            "milliseconds": round(taken / 1000, 4),
            "share": round(taken / total, 4) if total else 0.0,
        }
    return {
        "launches": round(sum(kernel.launches for kernel in kernels), 1),
        "milliseconds": round(total / 1000, 4),
        "groups": groups,
        "slowest": [
            {
                "name": kernel.name,
                "group": group_of(kernel.name),
                "launches": round(kernel.launches, 1),
                "microseconds": round(kernel.microseconds, 1),
            }
            for kernel in kernels[:_LISTED_KERNELS]
        ],
    }


if __name__ == "__main__":
    sys.exit(main())
