"""Waiting for another thread."""

import threading
import time
from collections.abc import Callable

# Of a test that would hang otherwise; nothing is slowed down by it.
DEADLINE = 60.0


def wait_until(condition: Callable[[], bool]) -> None:
    """Return once `condition` holds; fails where it never does."""
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, "what was waited for did not come"
        threading.Event().wait(0.001)
