"""How much a runtime does at a time, and how much memory it keeps."""

from dataclasses import dataclass

from moma_rt.bundle.footprint import parse_bytes
from moma_rt.errors import InputError
from moma_rt.messages import short_repr

MAX_IMAGES = 64
SUBJECT_MEMORY = 10**9
GRAPH_MEMORY = 2 * 10**9


@dataclass(frozen=True)
class Limits:
    """Checked, memory in bytes: what `Runtime.load` says of them.

    Raises:
        InputError: a `max_batch` out of range.
    """

    max_batch: int = 1
    memory_budget: int | None = None
    subject_memory: int = SUBJECT_MEMORY
    graph_memory: int = GRAPH_MEMORY

    def __post_init__(self) -> None:
        most = self.max_batch
        if isinstance(most, bool) or not isinstance(most, int) or not 1 <= most <= MAX_IMAGES:
            raise InputError(f"max_batch is {short_repr(most)}: it must be a whole number from 1 to {MAX_IMAGES}")

    @classmethod
    def of(cls, max_batch: int, memory_budget: object, subject_memory: object, graph_memory: object) -> "Limits":
        """From memory as numbers of bytes, or texts such as "8GB"; a budget may be None.

        Raises:
            InputError: one that is neither, or out of range.
        """
        return cls(
            max_batch,
            None if memory_budget is None else parse_bytes(memory_budget),
            parse_bytes(subject_memory, "subject_memory"),
            parse_bytes(graph_memory, "graph_memory"),
        )
