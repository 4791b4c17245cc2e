"""Waiting for another thread."""

import threading
import time
from collections.abc import Callable

# Seconds until a test that would hang fails.
DEADLINE = 60.0


def wait_until(condition: Callable[[], bool]) -> None:
    """Return once `condition` holds; fail if it does not within the deadline."""
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, "the condition did not hold in time"
        threading.Event().wait(0.001)
