"""Summarizes the samples of the latency benchmark: times, memory, speedups, and a table."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.environment import percentiles
from benchmarks.latency.requests import RUNTIME, Answer


@dataclasses.dataclass
class Samples:
    """The samples of one contender: answers by kind of request, and memory in GB."""

    answers: dict[str, list[Answer]] = dataclasses.field(default_factory=dict)
    peak_gb: float = 0.0
    device_gb: float | None = None


def summary(samples: Mapping[str, Samples]) -> dict[str, Any]:
    """Return times in milliseconds, memory in GB, and each baseline's time as a multiple of the runtime's."""
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
    """Return p20, p50 and p80 in milliseconds, in total and by stage; a stage that an answer skipped counts as 0."""
    stages = dict.fromkeys(stage for answer in answers for stage in answer.stages)
    return {
        "total": _milliseconds([answer.seconds for answer in answers]),
        "stages": {stage: _milliseconds([answer.stages.get(stage, 0.0) for answer in answers]) for stage in stages},
    }


def table(results: Mapping[str, Any]) -> str:
    """Format the results as a table."""
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
