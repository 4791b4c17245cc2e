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
        self._changed = threading.Condition()
        self._owner: int | None = None
        self._waiting: list[Call[R, A]] = []

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for this thread's turn.

        Raises:
            InputError: the thread has it already.
        """
        self._check_not_inside()
        try:
            with self._changed:
                self._changed.wait_for(lambda: self._owner is None)
                self._owner = threading.get_ident()
            yield
        finally:
            self._give_back()

    def answer(self, call: Call[R, A], together: Callable[[Sequence[Call[R, A]]], None]) -> A:
        """The answer of `call`, by this thread in its turn, or by one whose turn comes earlier.

        Args:
            together: answers calls of one kind: each of them has an answer or an error when it returns.
        """
        self._check_not_inside()
        group: list[Call[R, A]] = []
        try:
            with self._changed:
                self._waiting.append(call)
                self._changed.wait_for(lambda: self._owner is None or call.is_done)
                if not call.is_done:
                    self._owner = threading.get_ident()
                    group = self._take(call)
            if group:
                together(group)
        finally:
            with self._changed, contextlib.suppress(ValueError):
                self._waiting.remove(call)
            self._give_back()
        return call.result()

    def _check_not_inside(self) -> None:
        # Only this thread can have written its own number there, so it cannot change meanwhile.
        if self._owner == threading.get_ident():
            raise InputError("the runtime was called from on_step, while it is busy with the call that is reported")

    def _give_back(self) -> None:
        """End this thread's turn, if it has one."""
        with self._changed:
            if self._owner == threading.get_ident():
                self._owner = None
                self._changed.notify_all()

    def _take(self, first: Call[R, A]) -> list[Call[R, A]]:
        """`first` and those that go with it, in the order in which they came, no longer waiting."""
        taken, room = [first], self._most - first.size
        for call in self._waiting:
            if call is not first and call.kind == first.kind and call.size <= room:
                taken.append(call)
                room -= call.size
        self._waiting = [call for call in self._waiting if call not in taken]
        return taken
