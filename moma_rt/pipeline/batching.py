"""Request queue: one thread at a time uses the device, and answers compatible waiting requests in one batch."""

import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from typing import Any, Generic, TypeVar

from moma_rt.errors import InputError, MomaError

R = TypeVar("R")
A = TypeVar("A")


class PendingRequest(Generic[R, A]):
    """A request of one thread, and in the end its result or its error.

    Requests of equal `batch_key` can share a batch; `size` is the request's share of it, in samples.
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
        """Complete the request."""
        self._results.append(result)

    def result(self) -> A:
        """Return the result, or raise the error. Call it once."""
        if self.error is not None:
            error, self.error = self.error, None
            try:
                raise error
            finally:
                # Break the reference cycle between error and frame, which would keep device memory alive.
                del error
        return self._results[0]


class RequestQueue(Generic[R, A]):
    """Lets one thread at a time use the device, first come, first served, and batches requests.

    The thread at the head of the queue runs its own request together with the waiting ones of equal `batch_key`.
    Batches thus form while the device is busy, and no request waits for others to arrive. Not reentrant.

    A forked process has none of its parent's threads. There the queue goes on if it was idle and the device can be
    used after a fork, and otherwise refuses every request.

    Args:
        max_batch: largest sum of sizes in a batch; a larger request runs alone.
        after_fork: makes the device usable in a forked process; None if it cannot be.
    """

    def __init__(self, max_batch: int, after_fork: Callable[[], None] | None = None) -> None:
        self._max_batch = max_batch
        self._after_fork = after_fork
        self._process = os.getpid()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=partial(_go_on, weakref.ref(self)))
        self._changed = threading.Condition()
        self._owner: int | None = None
        # Pending requests, and a ticket for each thread that waits in `exclusive`.
        self._waiting: list[object] = []

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Wait in the queue, then use the device alone.

        Raises:
            InputError: this thread is using it already.
            MomaError: see `check_process`.
        """
        self.check_process()
        self._refuse_reentrant_call()
        ticket = object()
        try:
            with self._changed:
                self._waiting.append(ticket)
                self._changed.wait_for(lambda: self._may_run(ticket))
                self._owner = threading.get_ident()
                self._waiting.remove(ticket)
            yield
        finally:
            self._release(ticket)

    def submit(self, pending: PendingRequest[R, A], run_batch: Callable[[Sequence[PendingRequest[R, A]]], None]) -> A:
        """Queue a request and return its result, computed by this thread or in the batch of another one.

        Args:
            run_batch: completes every request of a batch with a result or an error.

        Raises:
            InputError: this thread is using the device already.
            MomaError: see `check_process`.
        """
        self.check_process()
        self._refuse_reentrant_call()
        batch: list[PendingRequest[R, A]] = []
        try:
            with self._changed:
                self._waiting.append(pending)
                self._changed.wait_for(lambda: self._may_run(pending) or pending.is_done)
                if not pending.is_done:
                    self._owner = threading.get_ident()
                    batch = self._take_batch(pending)
            if batch:
                run_batch(batch)
        finally:
            self._release(pending)
        return pending.result()

    def check_process(self) -> None:
        """Check that requests can be answered in this process.

        Raises:
            MomaError: it was forked from the one that made the queue, while the queue was in use or its device cannot
                be used after a fork.
        """
        if os.getpid() != self._process:
            raise MomaError(
                f"this runtime was loaded by process {self._process}, and this one was forked from it"
                f"{'' if self._after_fork is None else ' while it was in use'}: load a runtime after the fork, in each "
                "process"
            )

    def go_on(self) -> None:
        """Accept requests in a forked process, if the queue was idle. To be called before it has other threads."""
        # A lock that another thread of the parent held stays locked here.
        if self._after_fork is None or not self._changed.acquire(blocking=False):
            return
        is_idle = self._owner is None and not self._waiting
        self._changed.release()
        if is_idle:
            self._after_fork()
            self._process = os.getpid()

    def _may_run(self, waiting: object) -> bool:
        # A request that left the queue unanswered was in the batch of an interrupted thread: it has waited longest.
        return self._owner is None and (waiting not in self._waiting or self._waiting[0] is waiting)

    def _refuse_reentrant_call(self) -> None:
        # Only this thread writes its own id there, so no lock is needed.
        if self._owner == threading.get_ident():
            raise InputError("the runtime was called from on_step: call it after generate has returned")

    def _release(self, waiting: object) -> None:
        """Leave the queue, and free the device if this thread uses it."""
        with self._changed:
            with contextlib.suppress(ValueError):
                self._waiting.remove(waiting)
            if self._owner == threading.get_ident():
                self._owner = None
            self._changed.notify_all()

    def _take_batch(self, first: PendingRequest[R, A]) -> list[PendingRequest[R, A]]:
        """Remove `first` and the requests that fit its batch from the queue, in order of arrival."""
        batch, room = [first], self._max_batch - first.size
        for waiting in self._waiting:
            if (
                isinstance(waiting, PendingRequest)
                and waiting is not first
                and waiting.batch_key == first.batch_key
                and waiting.size <= room
            ):
                batch.append(waiting)
                room -= waiting.size
        self._waiting = [waiting for waiting in self._waiting if waiting not in batch]
        return batch


def _go_on(queue: "weakref.ref[RequestQueue[Any, Any]]") -> None:
    if (alive := queue()) is not None:
        alive.go_on()
