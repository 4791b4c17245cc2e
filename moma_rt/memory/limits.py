"""Limits of a runtime: batch size and memory budgets."""

from dataclasses import dataclass

from moma_rt.bundle.footprint import parse_bytes
from moma_rt.errors import InputError
from moma_rt.messages import short_repr

MAX_IMAGES = 64
SUBJECT_MEMORY = 10**9
GRAPH_MEMORY = 2 * 10**9


@dataclass(frozen=True)
class Limits:
    """Checked limits, memory in bytes; see `Runtime.load`.

    Raises:
        InputError: `max_batch` is out of range.
    """

    max_batch: int = 1
    memory_budget: int | None = None
    subject_memory: int = SUBJECT_MEMORY
    graph_memory: int = GRAPH_MEMORY

    def __post_init__(self) -> None:
        given = self.max_batch
        if isinstance(given, bool) or not isinstance(given, int) or not 1 <= given <= MAX_IMAGES:
            raise InputError(f"max_batch is {short_repr(given)}: it must be a whole number from 1 to {MAX_IMAGES}")

    @classmethod
    def of(cls, max_batch: int, memory_budget: object, subject_memory: object, graph_memory: object) -> "Limits":
        """Parse memory given in bytes or as a text such as "8GB"; the budget may be None.

        Raises:
            InputError: a value is neither, or out of range.
        """
        return cls(
            max_batch,
            None if memory_budget is None else parse_bytes(memory_budget),
            parse_bytes(subject_memory, "subject_memory"),
            parse_bytes(graph_memory, "graph_memory"),
        )
