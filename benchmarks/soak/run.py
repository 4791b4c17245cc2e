"""The run of the soak benchmark: threads that ask one runtime, and what is found in each answer."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.picture_difference import difference
from benchmarks.soak.references import Images, Reference
from benchmarks.soak.requests import MISTAKES, Drawn, Kind, PictureRequest, photo_and_mask
from moma_rt.errors import BundleError, Cancelled, InputError
from moma_rt.runtime import Runtime
from moma_rt.subject import Subject

# A cancelled generation ends after this step.
_LAST_STEP = 2
_EXPECTED = {Kind.CANCELLED: (Cancelled,), Kind.REFUSED: (InputError, BundleError)}


@dataclass(frozen=True)
class Answered:
    """What one request came to.

    Attributes:
        seconds: until the answer, the waiting included.
        differences: of each picture from the one made alone, the largest of all values, in steps of 1/255.
        wrong: what is wrong with it, a line each.
        made_with: equal for the calls that were made together; None for those without pictures.
        used_mib: memory in use after it, where that was asked for.
    """

    kind: Kind
    seconds: float
    differences: tuple[int, ...] = ()
    wrong: tuple[str, ...] = ()
    made_with: float | None = None
    used_mib: float | None = None


@dataclass(frozen=True)
class Judge:
    """The pool, and what the pictures of its requests may be, within `tolerance` steps of 1/255.

    With a tolerance of 0 a request's pictures are those that it had when it was asked for alone; else each may also be
    what it was by itself, or in a batch of others.
    """

    pool: Sequence[PictureRequest]
    references: Sequence[Reference]
    tolerance: int

    def largest_difference(self) -> int:
        """How far a picture of the pool is at most from itself made with others, in steps of 1/255."""
        return max(
            difference(picture, other)
            for reference in self.references
            for index, picture in enumerate(reference.asked)
            for other in reference.of(index)
        )

    def closest_pair(self) -> tuple[int, str, str]:
        """How far the two pictures most alike are apart, and which they are.

        Within twice the tolerance one could be taken for the other.
        """
        named = list(self._named())
        return min(
            (difference(one, other), name, other_name)
            for index, (name, one) in enumerate(named)
            for other_name, other in named[:index]
        )

    def wrong(self, chosen: int, images: Images) -> tuple[tuple[int, ...], list[str]]:
        """The differences of a request's pictures from those made alone, and a line for each that is wrong."""
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
                lines.append(f"its picture {index + 1} is {apart}/255 from the one made alone{whose}")
        return differences, lines

    def _allowed(self, reference: Reference, index: int) -> list[np.ndarray]:
        return [reference.asked[index]] if self.tolerance == 0 else reference.of(index)

    def _named(self) -> Iterator[tuple[str, np.ndarray]]:
        for number, reference in enumerate(self.references):
            for index, image in enumerate(reference.asked):
                yield f"picture {index + 1} of request {number} of the pool", image


class Asker:
    """Makes requests of one runtime, from any thread."""

    def __init__(self, runtime: Runtime, subjects: Mapping[str, Subject], judge: Judge) -> None:
        self._runtime = runtime
        self._subjects = dict(subjects)
        self._judge = judge
        self._width = runtime.bundle.manifest.geometry.embedding_width

    def ask(self, number: int, drawn: Drawn) -> Answered:
        """Make a request, the `number`th of the run, and judge the answer."""
        start = time.perf_counter()
        try:
            images, made_with = self._answer(drawn)
        except Exception as error:
            seconds = time.perf_counter() - start
            as_it_should = isinstance(error, _EXPECTED.get(drawn.kind, ()))
            lines = [] if as_it_should else [f"{type(error).__name__}: {error}"]
            return Answered(drawn.kind, seconds, wrong=self._told(number, drawn, lines))
        seconds = time.perf_counter() - start
        if drawn.kind in _EXPECTED:
            return Answered(drawn.kind, seconds, wrong=self._told(number, drawn, ["it was answered"]))
        if drawn.kind is Kind.ENROLLED:
            return Answered(drawn.kind, seconds)
        differences, lines = self._judge.wrong(drawn.chosen, images)
        return Answered(drawn.kind, seconds, differences, self._told(number, drawn, lines), made_with)

    def _answer(self, drawn: Drawn) -> tuple[Images, float | None]:
        request = self._judge.pool[drawn.chosen]
        if drawn.kind is Kind.ENROLLED:
            # Later requests of it are made with what this one enrolled.
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
        # Calls that are made together are told the same times.
        return [np.asarray(image) for image in result.images], result.seconds["denoiser"]

    def _told(self, number: int, drawn: Drawn, lines: Sequence[str]) -> tuple[str, ...]:
        return tuple(f"request {number} ({drawn.kind.value}, {drawn.chosen} of the pool): {line}" for line in lines)


def run(
    ask: Callable[[int, Drawn], Answered], drawn: Sequence[Drawn], threads: int, is_over: Callable[[], bool]
) -> list[Answered]:
    """Have `threads` threads ask for everything that was drawn, in the order in which it was answered.

    is_over: asked before each request; once it says so no further one is begun.
    """
    numbered, lock, answers = iter(enumerate(drawn)), threading.Lock(), list[Answered]()

    def following() -> tuple[int, Drawn] | None:
        with lock:
            return None if is_over() else next(numbered, None)

    def work() -> None:
        while (item := following()) is not None:
            answer = ask(*item)
            with lock:
                answers.append(answer)

    # Daemons: Ctrl-C ends the process and not only the thread that waits for these.
    workers = [threading.Thread(target=work, daemon=True) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return answers
