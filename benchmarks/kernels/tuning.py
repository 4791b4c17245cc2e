"""Tunes launch configurations on this GPU: `python -m benchmarks.kernels --tune`.

Measures the layers of a denoising step: one sample, both guidance halves, 40 % of the reference, packed.
"""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass
from multiprocessing import get_context
from typing import Any

import torch
import triton
from torch import Tensor

import kernels.context_cross_attention.triton_kernel as cross
import kernels.injected_self_attention.triton_kernel as own
from benchmarks.kernels.attention_baselines import allowed_errors, is_within, worst_errors
from benchmarks.kernels.attention_cases import (
    HEADS,
    SD15_LEVELS,
    SUMMARY_ROWS,
    SUMMARY_SHARE,
    Case,
    CrossCase,
    Level,
    SelfCase,
)
from benchmarks.timer import Timer
from kernels.launch import (
    PORTABLE_SHARED_BYTES,
    AttentionShape,
    LaunchConfig,
    cross_attention_launch,
    self_attention_launch,
    split_width,
)

# Queries and warps of a program. A warp needs 16 rows of queries, but more warps may still be faster.
_FEW_QUERIES = 256
_LARGE_BLOCKS = ((64, 4), (64, 8), (128, 4), (128, 8))
# For few queries, or programs that loop over all heads, larger blocks leave most of a device idle.
_SMALL_BLOCKS = ((16, 1), (16, 2), (16, 4), (32, 2), (32, 4), (64, 4))
_TOKENS = (16, 32, 64, 128)
_STAGES = (1, 2, 3, 4)
# Registers for accumulators and scores, out of a thread's 255, above which the compiler probably spills.
_REGISTERS = 200
_ELEMENT_BYTES = 2


@dataclass(frozen=True)
class Entry:
    """A table entry in kernels/launch.py, and the levels of SD1.5 that use it.

    `is_portable`: the launch must fit in PORTABLE_SHARED_BYTES on every device, so the entry is a single launch.
    """

    name: str
    is_cross: bool
    levels: tuple[Level, ...]
    is_portable: bool

    def case(self, level: Level) -> Case:
        if self.is_cross:
            return CrossCase(level, SUMMARY_ROWS, "soft")
        return SelfCase(level, SUMMARY_ROWS, "soft", "packed", SUMMARY_SHARE)

    def present(self, capability: int) -> tuple[LaunchConfig, LaunchConfig]:
        """Return the current launches: with all shared memory, and within PORTABLE_SHARED_BYTES."""
        level = self.levels[0]
        shape = AttentionShape(level.tokens, level.channels // HEADS, _ELEMENT_BYTES)
        if self.is_cross:
            return cross_attention_launch(shape), cross_attention_launch(shape)
        return self_attention_launch(shape, capability), self_attention_launch(shape, capability, portable=True)


@dataclass(frozen=True)
class Attempt:
    """A launch to compile."""

    case: Case
    config: LaunchConfig
    dtype: torch.dtype


@dataclass(frozen=True)
class Compiled:
    """The outcome of an attempt: its shared memory, or why it cannot be launched."""

    shared_bytes: int
    refused: str = ""


@dataclass(frozen=True)
class Device:
    """A GPU: its compute capability (90 for 9.0) and the largest shared memory of a block."""

    name: str
    capability: int
    shared_bytes: int


def this_device() -> Device:
    """Describe the current CUDA device."""
    properties = torch.cuda.get_device_properties()
    capability = 10 * properties.major + properties.minor
    return Device("cuda", capability, properties.shared_memory_per_block_optin)


def entries(capability: int, levels: tuple[Level, ...] = SD15_LEVELS) -> tuple[Entry, ...]:
    """Return the table entries that SD1.5 at 512² uses on a device of this compute capability."""
    table = "_SELF_WGMMA" if capability // 10 in (9, 10) else "_SELF_MMA"
    return (
        Entry(f"{table}[48]", False, levels[:1], is_portable=False),
        Entry(f"{table}[96]", False, levels[1:2], is_portable=False),
        Entry("_SELF_FEW", False, levels[2:], is_portable=True),
        Entry("_CROSS[96]", True, levels[:2], is_portable=True),
        Entry("_CROSS[160]", True, levels[2:], is_portable=True),
    )


def candidates(entry: Entry, shared_limit: int) -> Iterator[LaunchConfig]:
    """Yield launches whose tiles may fit in registers and shared memory at every level of an entry."""
    columns = max(sum(split_width(level.channels // HEADS)) for level in entry.levels)
    has_few_programs = entry.is_cross or entry.levels[0].tokens <= _FEW_QUERIES
    blocks = _SMALL_BLOCKS if has_few_programs else _LARGE_BLOCKS
    for (queries, warps), tokens, stages in itertools.product(blocks, _TOKENS, _STAGES):
        # Both kernels hold one branch's accumulator while they compute the other's.
        registers = queries * (2 * columns + tokens) // (32 * warps)
        buffers = max(stages - 1, 1) * 2 * tokens * columns * _ELEMENT_BYTES
        # The text tokens fit in a block or two, so more stages have nothing to load.
        if registers <= _REGISTERS and buffers <= shared_limit and not (entry.is_cross and stages > 2):
            yield LaunchConfig(queries, tokens, warps, stages)


def compile_attempt(attempt: Attempt) -> Compiled:
    """Compile and launch once; the kernel stays in Triton's cache on disk."""
    shared: list[int] = []
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.listener = lambda **told: shared.append(told["metadata"]["shared"])
        try:
            launched(attempt.case, attempt.case.inputs(attempt.dtype, "cuda"), attempt.config)
            torch.cuda.synchronize()
        except Exception as error:
            # A launch that does not compile is only skipped.
            return Compiled(0, f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}")
    return Compiled(shared[-1])


def compile_all(attempts: Sequence[Attempt]) -> list[Compiled]:
    """Run `compile_attempt` in as many processes as there are cores, up to 12."""
    workers = min(12, len(os.sched_getaffinity(0)))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return list(pool.map(compile_attempt, attempts))


def launched(case: Case, inputs: tuple[Tensor, ...], config: LaunchConfig) -> tuple[Tensor, ...]:
    """Launch the case's kernel with this configuration."""
    if isinstance(case, SelfCase):
        return (own.launch(inputs, HEADS, config),)
    return cross.launch(inputs, HEADS, config)


def tuned(
    timer: Timer,
    dtype: torch.dtype,
    device: Device,
    most: int | None = None,
    keep: Callable[[list[dict[str, Any]]], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Return for each entry the current launches, the best ones, and all that were tried.

    Args:
        most: the number of candidates per entry, spread over all candidates; None tries all.
        keep: called with the results so far after every entry.
    """
    plan = {
        entry: tuple(
            dict.fromkeys((*entry.present(device.capability), *_spread(candidates(entry, device.shared_bytes), most)))
        )
        for entry in entries(device.capability)
    }
    attempts = [
        Attempt(entry.case(level), config, dtype)
        for entry, configs in plan.items()
        for config in configs
        for level in entry.levels
    ]
    compiled = dict(zip(attempts, compile_all(attempts), strict=True))
    results = []
    for entry, configs in plan.items():
        cases = [entry.case(level) for level in entry.levels]
        prepared = tuple(_Prepared.of(case, dtype, device.name) for case in cases)
        measure = _Measurement(entry, prepared, timer)
        outcomes = {config: [compiled[Attempt(case, config, dtype)] for case in cases] for config in configs}
        tried = [_tried(measure, config, outcomes[config]) for config in configs]
        results.append(_chosen(measure, tried, entry.present(device.capability)))
        keep(results)
    return results


def _spread(configs: Iterable[LaunchConfig], most: int | None) -> list[LaunchConfig]:
    """Return at most `most` of the launches, spread evenly."""
    found = list(configs)
    return found if most is None else found[:: -(-len(found) // most) or 1]


@dataclass(frozen=True)
class _Prepared:
    """A case, its inputs, expected outputs and allowed errors."""

    case: Case
    inputs: tuple[Tensor, ...]
    wanted: tuple[Tensor, ...]
    allowed: list[float]

    @classmethod
    def of(cls, case: Case, dtype: torch.dtype, device: str) -> "_Prepared":
        inputs = case.inputs(dtype, device)
        wanted = case.definition(tuple(tensor.float() for tensor in inputs))
        return cls(case, inputs, wanted, allowed_errors(case, inputs, wanted))


@dataclass(frozen=True)
class _Measurement:
    """Checks and times an entry's launches."""

    entry: Entry
    prepared: tuple[_Prepared, ...]
    timer: Timer

    def wrong(self, config: LaunchConfig) -> str:
        """Return why a launch's outputs are wrong; empty if they are right."""
        for each in self.prepared:
            errors = worst_errors(launched(each.case, each.inputs, config), each.wanted)
            if not is_within(errors, each.allowed):
                return f"off by {errors} at {each.case.level.grid}²; {each.allowed} is allowed"
        return ""

    def total_ms(self, config: LaunchConfig) -> float:
        """Return the milliseconds of all the entry's layers in a step."""
        return sum(
            each.case.level.layers * self.timer(lambda e=each: launched(e.case, e.inputs, config)).median
            for each in self.prepared
        )


def _tried(measure: _Measurement, config: LaunchConfig, outcomes: Sequence[Compiled]) -> dict[str, Any]:
    refused = next((outcome.refused for outcome in outcomes if outcome.refused), "") or measure.wrong(config)
    if refused:
        return {"launch": astuple(config), "refused": refused}
    shared_bytes = max(outcome.shared_bytes for outcome in outcomes)
    return {"launch": astuple(config), "shared_bytes": shared_bytes, "step_ms": round(measure.total_ms(config), 4)}


def _chosen(
    measure: _Measurement, tried: Sequence[dict[str, Any]], present: tuple[LaunchConfig, LaunchConfig]
) -> dict[str, Any]:
    """Choose the fastest launches, and measure them and the present ones again to compare them.

    They are measured again because the fastest of many samples is partly luck.
    """
    fastest = sorted((one for one in tried if "step_ms" in one), key=lambda one: one["step_ms"])
    portable = [one for one in fastest if one["shared_bytes"] <= PORTABLE_SHARED_BYTES]
    is_portable = measure.entry.is_portable
    choices = []
    for choice, now in zip([portable[0]] if is_portable else [fastest[0], portable[0]], present, strict=False):
        before, after = measure.total_ms(now), measure.total_ms(LaunchConfig(*choice["launch"]))
        gain = {"present": astuple(now), "present_ms": round(before, 4), "gain": round(before / after, 3)}
        choices.append({**choice, "step_ms": round(after, 4), **gain})
    return {"entry": measure.entry.name, "is_portable": is_portable, "choices": choices, "tried": list(tried)}


def print_tuning(results: Sequence[Mapping[str, Any]]) -> None:
    """Print rows for the tables in kernels/launch.py, with their speedups."""
    for result in results:
        launches = [f"LaunchConfig{choice['launch']}" for choice in result["choices"]]
        text = launches[0] if result["is_portable"] else f"({', '.join(launches)})"
        gains = " and ".join(f"{choice['gain']:.2f}x" for choice in result["choices"])
        print(f"{result['entry']}: {text}  # {gains} as fast as now")
