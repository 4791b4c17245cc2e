"""Times how long the host takes to launch a captured generation."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moma_rt.backends.base import Backend, CapturedGraph


class TimedReplays:
    """Wraps a backend so that every replay of a captured graph appends its seconds to `seconds`.

    A replay returns when the graph is enqueued, not when the device has run it.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.seconds: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def capture(self, enqueue: Callable[[], None]) -> CapturedGraph | None:
        made = self._backend.capture(enqueue)
        return None if made is None else _TimedGraph(made, self.seconds)


@dataclass(frozen=True, eq=False)
class _TimedGraph:
    graph: CapturedGraph
    seconds: list[float]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.graph, name)

    def replay(self) -> None:
        start = time.perf_counter()
        self.graph.replay()
        self.seconds.append(time.perf_counter() - start)
