"""How long the host takes to hand a recorded generation to the device."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moma_rt.backends.base import Backend, CapturedGraph


class TimedReplays:
    """A backend like `backend`, whose recordings append the seconds that each of their replays took to `seconds`.

    A replay returns when it was handed over, not when the device has run it.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.seconds: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def capture(self, enqueue: Callable[[], None]) -> CapturedGraph | None:
        made = self._backend.capture(enqueue)
        return None if made is None else _TimedRecording(made, self.seconds)


@dataclass(frozen=True, eq=False)
class _TimedRecording:
    recording: CapturedGraph
    seconds: list[float]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.recording, name)

    def replay(self) -> None:
        start = time.perf_counter()
        self.recording.replay()
        self.seconds.append(time.perf_counter() - start)
