"""Runs the soak test: threads make requests of one runtime, and each result is checked."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.picture_difference import difference
from benchmarks.soak.references import Images, Reference
from benchmarks.soak.requests import MISTAKES, DrawnRequest, Kind, PictureRequest, photo_and_mask
from moma_rt.errors import BundleError, Cancelled, InputError
from moma_rt.runtime import Runtime
from moma_rt.subject import Subject

# A cancelled generation ends after this step.
_LAST_STEP = 2
_EXPECTED = {Kind.CANCELLED: (Cancelled,), Kind.REFUSED: (InputError, BundleError)}


@dataclass(frozen=True)
class Outcome:
    """The outcome of one request.

    Attributes:
        seconds: latency, including the time in the queue.
        differences: largest difference of each picture from its reference, in steps of 1/255.
        wrong: what is wrong with the outcome, one line each.
        batch_id: equal for calls that ran in one batch; None for calls without pictures.
        used_mib: memory in use after the request, if it was sampled.
    """

    kind: Kind
    seconds: float
    differences: tuple[int, ...] = ()
    wrong: tuple[str, ...] = ()
    batch_id: float | None = None
    used_mib: float | None = None


@dataclass(frozen=True)
class Checker:
    """Compares pictures with the references of the pool's requests, within `tolerance` steps of 1/255.

    With a tolerance of 0 the pictures must equal those of the request made alone; otherwise a picture may also match
    its references generated singly or in a batch.
    """

    pool: Sequence[PictureRequest]
    references: Sequence[Reference]
    tolerance: int

    def largest_difference(self) -> int:
        """Return the largest difference between a picture and its other references, in steps of 1/255."""
        return max(
            difference(picture, other)
            for reference in self.references
            for index, picture in enumerate(reference.asked)
            for other in reference.of(index)
        )

    def closest_pair(self) -> tuple[int, str, str]:
        """Return the smallest difference between two pictures of the pool, in steps of 1/255, and their names.

        If it is at most twice the tolerance, one picture could pass for the other.
        """
        named = list(self._named())
        return min(
            (difference(one, other), name, other_name)
            for index, (name, one) in enumerate(named)
            for other_name, other in named[:index]
        )

    def check(self, chosen: int, images: Images) -> tuple[tuple[int, ...], list[str]]:
        """Return the pictures' differences from their references, and a line for each picture that is wrong."""
        expected = self.references[chosen]
        if len(images) != len(expected.asked):
            return (), [f"{len(images)} pictures instead of {len(expected.asked)}"]
        differences = tuple(
            min(difference(image, other) for other in self._allowed(expected, index))
            for index, image in enumerate(images)
        )
        lines = []
        for index, (image, apart) in enumerate(zip(images, differences, strict=True)):
            if apart > self.tolerance:
                nearest, name = min((difference(image, other), name) for name, other in self._named())
                whose = f"; it is {nearest} from {name}" if nearest < apart else ""
                lines.append(f"its picture {index + 1} is {apart}/255 from the one generated alone{whose}")
        return differences, lines

    def _allowed(self, reference: Reference, index: int) -> list[np.ndarray]:
        return [reference.asked[index]] if self.tolerance == 0 else reference.of(index)

    def _named(self) -> Iterator[tuple[str, np.ndarray]]:
        for number, reference in enumerate(self.references):
            for index, image in enumerate(reference.asked):
                yield f"picture {index + 1} of request {number} of the pool", image


class Client:
    """Makes requests of one runtime and checks the results; may be shared between threads."""

    def __init__(self, runtime: Runtime, subjects: Mapping[str, Subject], checker: Checker) -> None:
        self._runtime = runtime
        self._subjects = dict(subjects)
        self._checker = checker
        self._width = runtime.bundle.manifest.geometry.embedding_width

    def ask(self, number: int, drawn: DrawnRequest) -> Outcome:
        """Make the `number`th request of the run, and check its outcome."""
        start = time.perf_counter()
        try:
            images, batch_id = self._answer(drawn)
        except Exception as error:
            seconds = time.perf_counter() - start
            is_expected = isinstance(error, _EXPECTED.get(drawn.kind, ()))
            lines = [] if is_expected else [f"{type(error).__name__}: {error}"]
            return Outcome(drawn.kind, seconds, wrong=self._labeled(number, drawn, lines))
        seconds = time.perf_counter() - start
        if drawn.kind in _EXPECTED:
            return Outcome(drawn.kind, seconds, wrong=self._labeled(number, drawn, ["it was answered"]))
        if drawn.kind is Kind.ENROLLED:
            return Outcome(drawn.kind, seconds)
        differences, lines = self._checker.check(drawn.chosen, images)
        return Outcome(drawn.kind, seconds, differences, self._labeled(number, drawn, lines), batch_id)

    def _answer(self, drawn: DrawnRequest) -> tuple[Images, float | None]:
        request = self._checker.pool[drawn.chosen]
        if drawn.kind is Kind.ENROLLED:
            # Later requests use the newly enrolled subject.
            self._subjects[request.subject] = self._runtime.enroll(*photo_and_mask(request.subject), request.subject)
            return (), None
        options = request.options(self._width)
        if drawn.kind is Kind.REFUSED:
            options |= MISTAKES[drawn.mistake]
        elif drawn.kind is Kind.CANCELLED:
            options["on_step"] = lambda info: info.step < _LAST_STEP
        elif drawn.kind is Kind.WATCHED:
            options["on_step"] = lambda info: None
        result = self._runtime.generate(self._subjects[request.subject], **options)
        # Calls of one batch report the same times.
        return [np.asarray(image) for image in result.images], result.seconds["denoiser"]

    def _labeled(self, number: int, drawn: DrawnRequest, lines: Sequence[str]) -> tuple[str, ...]:
        return tuple(f"request {number} ({drawn.kind.value}, {drawn.chosen} of the pool): {line}" for line in lines)


def run(
    ask: Callable[[int, DrawnRequest], Outcome],
    drawn: Sequence[DrawnRequest],
    threads: int,
    is_over: Callable[[], bool],
) -> list[Outcome]:
    """Make all drawn requests from `threads` threads; returns their outcomes in the order of completion.

    is_over: called before each request; once it returns True no further request starts.
    """
    numbered, lock, answers = iter(enumerate(drawn)), threading.Lock(), list[Outcome]()

    def next_request() -> tuple[int, DrawnRequest] | None:
        with lock:
            return None if is_over() else next(numbered, None)

    def work() -> None:
        while (item := next_request()) is not None:
            answer = ask(*item)
            with lock:
                answers.append(answer)

    # Daemon threads, so that Ctrl-C ends the whole process.
    workers = [threading.Thread(target=work, daemon=True) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return answers
