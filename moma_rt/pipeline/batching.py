"""Calls from many threads, one after the other, or those that can be together at a time."""

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Generic, TypeVar

from moma_rt.errors import InputError

R = TypeVar("R")
A = TypeVar("A")


class PendingRequest(Generic[R, A]):
    """What one thread asks for, and in the end its answer or its error.

    Calls of equal `batch_key` can be answered together, up to a sum of `size`.
    """

    def __init__(self, request: R, batch_key: Hashable, size: int) -> None:
        self.request = request
        self.batch_key = batch_key
        self.size = size
        self.error: BaseException | None = None
        self._results: list[A] = []

    @property
    def is_done(self) -> bool:
        return self.error is not None or bool(self._results)

    def set_result(self, result: A) -> None:
        """End the call."""
        self._results.append(result)

    def result(self) -> A:
        """Its answer; raises its error. To be asked once."""
        if self.error is not None:
            error, self.error = self.error, None
            try:
                raise error
            finally:
                # Else the error would hold this frame, which would hold the error, and with it memory of the device.
                del error
        return self._results[0]


class RequestQueue(Generic[R, A]):
    """Gives threads their turns.

    They get them in the order in which they asked. A turn is not reentrant: what it protects is in use. Whoever has the
    turn answers with its own call those that wait and are of its kind, so calls gather by themselves while the device
    is busy and none waits for company.

    most: the sum of sizes up to which calls are answered together.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._changed = threading.Condition()
        self._owner: int | None = None
        # Calls, and whatever else stands for a thread that wants a turn.
        self._waiting: list[object] = []

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Wait for this thread's turn.

        Raises:
            InputError: the thread has it already.
        """
        self._check_not_inside()
        ticket = object()
        try:
            with self._changed:
                self._waiting.append(ticket)
                self._changed.wait_for(lambda: self._is_next(ticket))
                self._owner = threading.get_ident()
                self._waiting.remove(ticket)
            yield
        finally:
            self._leave(ticket)

    def submit(self, pending: PendingRequest[R, A], run_batch: Callable[[Sequence[PendingRequest[R, A]]], None]) -> A:
        """The answer of `pending`, by this thread in its turn, or by one whose turn comes earlier.

        Args:
            together: answers calls of one kind: each of them has an answer or an error when it returns.
        """
        self._check_not_inside()
        group: list[PendingRequest[R, A]] = []
        try:
            with self._changed:
                self._waiting.append(pending)
                self._changed.wait_for(lambda: self._is_next(pending) or pending.is_done)
                if not pending.is_done:
                    self._owner = threading.get_ident()
                    group = self._take(pending)
            if group:
                run_batch(group)
        finally:
            self._leave(pending)
        return pending.result()

    def _is_next(self, waiting: object) -> bool:
        # A call that was taken by somebody who could not answer it waits no more, and has waited longest.
        return self._owner is None and (waiting not in self._waiting or self._waiting[0] is waiting)

    def _check_not_inside(self) -> None:
        # Only this thread can have written its own number there, so it cannot change meanwhile.
        if self._owner == threading.get_ident():
            raise InputError("the runtime was called from on_step, while it is busy with the call that is reported")

    def _leave(self, waiting: object) -> None:
        """Wait no longer, and end this thread's turn, if it has one."""
        with self._changed:
            with contextlib.suppress(ValueError):
                self._waiting.remove(waiting)
            if self._owner == threading.get_ident():
                self._owner = None
            self._changed.notify_all()

    def _take(self, first: PendingRequest[R, A]) -> list[PendingRequest[R, A]]:
        """`first` and those that go with it, in the order in which they came, no longer waiting."""
        taken, room = [first], self._most - first.size
        for call in self._waiting:
            if (
                isinstance(call, PendingRequest)
                and call is not first
                and call.batch_key == first.batch_key
                and call.size <= room
            ):
                taken.append(call)
                room -= call.size
        self._waiting = [call for call in self._waiting if call not in taken]
        return taken
