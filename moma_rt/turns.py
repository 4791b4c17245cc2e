"""Calls from many threads, one after the other, or those that can be together at a time."""

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Generic, TypeVar

from moma_rt.errors import InputError

R = TypeVar("R")
A = TypeVar("A")


class Call(Generic[R, A]):
    """What one thread asks for, and in the end its answer or its error.

    Calls of equal `kind` can be answered together, up to a sum of `size`.
    """

    def __init__(self, request: R, kind: Hashable, size: int) -> None:
        self.request = request
        self.kind = kind
        self.size = size
        self.error: BaseException | None = None
        self._answers: list[A] = []

    @property
    def is_done(self) -> bool:
        return self.error is not None or bool(self._answers)

    def answer(self, answer: A) -> None:
        """End the call."""
        self._answers.append(answer)

    def result(self) -> A:
        """Its answer; raises its error. To be asked once."""
        if self.error is not None:
            error, self.error = self.error, None
            try:
                raise error
            finally:
                # Else the error would hold this frame, which would hold the error, and with it memory of the device.
                del error
        return self._answers[0]


class Turns(Generic[R, A]):
    """Gives threads their turns.

    A turn is not reentrant: what it protects is in use. Whoever has the turn answers with its own call those that wait
    and are of its kind, so calls gather by themselves while the device is busy and none waits for company.

    most: the sum of sizes up to which calls are answered together.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._turn = threading.Lock()
        self._owner: int | None = None
        self._waiting: list[Call[R, A]] = []
        self._list = threading.Lock()

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for this thread's turn.

        Raises:
            InputError: the thread has it already.
        """
        here = threading.get_ident()
        # Only this thread can have written its own number there, so it cannot change between here and the lock.
        if self._owner == here:
            raise InputError("the runtime was called from on_step, while it is busy with the call that is reported")
        with self._turn:
            self._owner = here
            try:
                yield
            finally:
                self._owner = None

    def answer(self, call: Call[R, A], together: Callable[[Sequence[Call[R, A]]], None]) -> A:
        """The answer of `call`, by this thread or by one that had its turn before.

        Args:
            together: answers calls of one kind: each of them has an answer or an error when it returns.
        """
        with self._list:
            self._waiting.append(call)
        try:
            with self.turn():
                if not call.is_done:
                    together(self._take(call))
        finally:
            with self._list, contextlib.suppress(ValueError):
                self._waiting.remove(call)
        return call.result()

    def _take(self, first: Call[R, A]) -> list[Call[R, A]]:
        """`first` and those that go with it, in the order in which they came, no longer waiting."""
        with self._list:
            taken, room = [first], self._most - first.size
            for call in self._waiting:
                if call is not first and call.kind == first.kind and call.size <= room:
                    taken.append(call)
                    room -= call.size
            self._waiting = [call for call in self._waiting if call not in taken]
        return taken
