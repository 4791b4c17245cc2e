"""Benchmark cases: both operators at every attention layer of Stable Diffusion 1.5, with inputs and required work."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

import kernels.context_cross_attention.operator
import kernels.injected_self_attention.operator  # noqa: F401  (both register the torch operators)
from benchmarks.timer import Work
from kernels.context_cross_attention.reference import context_cross_attention
from kernels.injected_self_attention.reference import injected_self_attention

HEADS = 8
GROUPS = 2
TEXT_TOKENS = 77
CONTEXT_TOKENS = 4
ROWS = (2, 8)
SHARES = (0.1, 0.4, 1.0)
# The cases whose times add up to those of a denoising step.
SUMMARY_ROWS, SUMMARY_SHARE = 2, 0.4
# What happens to reference tokens outside the object mask: enrollment removes them ("packed"); the original keeps them
# and masks them in every step.
FORMS = ("packed", "masked")
# "soft": gates are 0 outside a blob that covers half the picture. "open": no gate is 0.
GATES = ("soft", "open")
FOREGROUND_SHARE = 0.5
_ELEMENT_BYTES = 2


@dataclass(frozen=True)
class Level:
    """One resolution of the UNet: tokens per row, channels, and the number of layers of each operator."""

    grid: int
    channels: int
    layers: int

    @property
    def tokens(self) -> int:
        return self.grid * self.grid


# At 512².
SD15_LEVELS = (Level(64, 320, 5), Level(32, 640, 5), Level(16, 1280, 5), Level(8, 1280, 1))


@dataclass(frozen=True)
class Case(ABC):
    """One call of an operator with `rows` = G·B rows. `gate` is one of `GATES`."""

    level: Level
    rows: int
    gate: str
    operator: ClassVar[str]

    @property
    def samples(self) -> int:
        return self.rows // GROUPS

    @property
    def open_queries(self) -> int:
        """The number of queries in a row whose gate is not 0."""
        return self.level.tokens if self.gate == "open" else covered(self.level.tokens, FOREGROUND_SHARE)

    @abstractmethod
    def inputs(self, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
        """Return random tensors in the operator's order; the same on every call on one kind of device."""

    @abstractmethod
    def definition(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Compute the operator's definition in the inputs' precision."""

    @abstractmethod
    def work(self) -> Work:
        """Return the work needed in half precision, without a softmax's exponentials and sums."""

    def moma(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Compute this project's operator."""
        found = getattr(torch.ops.moma, self.operator)(*inputs, HEADS)
        return found if isinstance(found, tuple) else (found,)

    def _gates(self, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        """Return gates [B, S] in [0, 1]; no gate inside the foreground is 0."""
        size = (self.samples, self.level.tokens)
        gate = 0.1 + 0.9 * torch.rand(size, generator=generator, device=generator.device)
        if self.gate == "soft":
            gate = gate * blob(self.level.grid, FOREGROUND_SHARE).to(gate)
        return gate.to(dtype)


@dataclass(frozen=True)
class SelfCase(Case):
    """`moma::InjectedSelfAttention` with an object mask over a fraction `share` of the reference, in one of `FORMS`."""

    form: str
    share: float
    operator = "injected_self_attention"

    @property
    def kept_tokens(self) -> int:
        """The number of reference tokens inside the mask."""
        return covered(self.level.tokens, self.share)

    @property
    def reference_tokens(self) -> int:
        """The number of reference tokens passed to the operator."""
        return self.kept_tokens if self.form == "packed" else self.level.tokens

    def inputs(self, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
        generator = torch.Generator(device).manual_seed(0)
        tokens, channels = self.level.tokens, self.level.channels
        own = [_normal((self.rows, tokens, channels), dtype, generator) for _ in range(3)]
        size = (self.samples, self.reference_tokens)
        reference = [_normal((*size, channels), dtype, generator) for _ in range(2)]
        mask = torch.ones(size, dtype=dtype, device=device)
        if self.form == "masked":
            mask *= blob(self.level.grid, self.share).to(mask)
        return (*own, *reference, mask, self._gates(dtype, generator), torch.ones(1, dtype=dtype, device=device))

    def definition(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (injected_self_attention(*inputs, HEADS),)

    def work(self) -> Work:
        tokens, channels = self.level.tokens, self.level.channels
        own = 4 * self.rows * tokens * tokens * channels
        reference = 4 * self.rows * self.open_queries * self.kept_tokens * channels
        # q, k, v and the output; keys and values of the reference; mask, gates, scale.
        elements = 4 * self.rows * tokens * channels + 2 * self.samples * self.kept_tokens * channels
        elements += self.samples * (self.reference_tokens + tokens) + 1
        return Work(own + reference, _ELEMENT_BYTES * elements)


@dataclass(frozen=True)
class CrossCase(Case):
    """`moma::ContextCrossAttention` with 77 text tokens, two of which name the subject, and 4 context tokens."""

    operator = "context_cross_attention"

    def inputs(self, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
        generator = torch.Generator(device).manual_seed(0)
        channels = self.level.channels
        q = _normal((self.rows, self.level.tokens, channels), dtype, generator)
        text = [_normal((self.rows, TEXT_TOKENS, channels), dtype, generator) for _ in range(2)]
        context = [_normal((self.rows, CONTEXT_TOKENS, channels), dtype, generator) for _ in range(2)]
        weights = torch.zeros(self.samples, TEXT_TOKENS, dtype=dtype, device=device)
        weights[:, 2:4] = 1.0
        return (q, *text, *context, self._gates(dtype, generator), weights)

    def definition(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return context_cross_attention(*inputs, HEADS)

    def work(self) -> Work:
        tokens, channels = self.level.tokens, self.level.channels
        text = 4 * self.rows * tokens * TEXT_TOKENS * channels
        context = 4 * self.rows * self.open_queries * CONTEXT_TOKENS * channels
        saliency = 2 * self.rows * HEADS * tokens * TEXT_TOKENS
        # q and the output; keys and values of text and context; gates, weights, saliency.
        elements = 2 * self.rows * (tokens + TEXT_TOKENS + CONTEXT_TOKENS) * channels
        elements += self.samples * (tokens + TEXT_TOKENS) + self.rows * tokens
        return Work(text + context + saliency, _ELEMENT_BYTES * elements)


def all_cases(levels: tuple[Level, ...] = SD15_LEVELS) -> list[Case]:
    """Return all cases, those of the summary first, then by rows."""
    cases = list(_cases(levels))
    return sorted(cases, key=lambda case: (not in_summary(case), case.rows))


def in_summary(case: Case) -> bool:
    """Return whether a case is part of the summary of a step."""
    return case.rows == SUMMARY_ROWS and (not isinstance(case, SelfCase) or case.share == SUMMARY_SHARE)


def covered(tokens: int, share: float) -> int:
    """Return how many of `tokens` a mask over a fraction `share` of them covers."""
    return math.ceil(share * tokens)


def blob(grid: int, share: float) -> Tensor:
    """Return a bool mask [grid²] of the `covered(grid², share)` tokens nearest to the middle of the grid."""
    axis = torch.arange(grid) - (grid - 1) / 2
    distance = (axis[:, None] ** 2 + axis**2).flatten()
    inside = torch.zeros(grid * grid, dtype=torch.bool)
    inside[distance.argsort(stable=True)[: covered(grid * grid, share)]] = True
    return inside


def _cases(levels: tuple[Level, ...]) -> Iterator[Case]:
    for rows in ROWS:
        for gate in GATES:
            for level in levels:
                yield CrossCase(level, rows, gate)
                for form in FORMS:
                    for share in SHARES:
                        yield SelfCase(level, rows, gate, form, share)


def _normal(size: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randn(size, generator=generator, device=generator.device, dtype=dtype)
