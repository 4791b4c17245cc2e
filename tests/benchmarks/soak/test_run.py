"""The soak run detects pictures of another request, and calls that end in an unexpected way."""

from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.soak.references import Reference
from benchmarks.soak.requests import MISTAKES, SCHEDULES, SUBJECTS, DrawnRequest, Kind, PictureRequest
from benchmarks.soak.run import Checker, Client, Outcome, run
from moma_rt.errors import Cancelled, InputError, MomaError
from moma_rt.pipeline.sampling import StepInfo


def grey(value: int) -> np.ndarray:
    return np.full((4, 4, 3), value, np.uint8)


@pytest.fixture
def checker() -> Checker:
    """A checker of two requests, the second for two pictures."""
    requests = [PictureRequest(SCHEDULES[0]), PictureRequest(SCHEDULES[0], seed=1000, num_images=2)]
    return Checker(requests, [Reference([grey(10)]), Reference([grey(100), grey(200)])], tolerance=2)


def test_wrong_pictures_are_reported(checker):
    assert checker.check(1, [grey(102), grey(200)]) == ((2, 0), [])
    assert checker.check(1, [grey(104), grey(200)]) == ((4, 0), ["its picture 1 is 4/255 from the one generated alone"])
    differences, (line,) = checker.check(1, [grey(100), grey(11)])
    assert differences == (0, 189)
    assert line.endswith("generated alone; it is 1 from picture 1 of request 0 of the pool")
    assert checker.check(1, [grey(100)])[1] == ["1 pictures instead of 2"]


def test_a_batched_picture_may_match_the_reference_of_any_batch_size():
    request = PictureRequest(SCHEDULES[0])
    reference = Reference([grey(100)], [grey(100)], [[grey(103)], [grey(107)]])
    checker = Checker([request], [reference], tolerance=1)
    assert checker.largest_difference() == 7
    assert checker.check(0, [grey(108)]) == ((1,), [])
    assert checker.check(0, [grey(105)])[0] == (2,)
    assert checker.check(0, [grey(105)])[1] != []
    to_the_bit = Checker([request], [reference], tolerance=0)
    assert to_the_bit.check(0, [grey(100)]) == ((0,), [])
    assert to_the_bit.check(0, [grey(103)])[0] == (3,)


def test_the_closest_pair(checker):
    apart, one, other = checker.closest_pair()
    assert apart == 90
    assert {one, other} == {"picture 1 of request 0 of the pool", "picture 1 of request 1 of the pool"}


class FakeRuntime:
    """Generates grey pictures for the requests of the pool, or calls `generates` if it is set."""

    bundle = SimpleNamespace(manifest=SimpleNamespace(geometry=SimpleNamespace(embedding_width=8)))

    def __init__(self):
        self.enrolled, self.asked, self.generates = [], [], None

    def enroll(self, photo, mask, name):
        self.enrolled.append(name)
        return f"new {name}"

    def generate(self, subject, **options):
        self.asked.append((subject, options))
        if self.generates is not None:
            return self.generates(**options)
        if "on_step" in options:
            for step in range(1, options["steps"] + 1):
                if options["on_step"](StepInfo(step, options["steps"], 0)) is False:
                    raise Cancelled(f"after {step}")
        greys = (10,) if options["seed"] == 0 else (100, 200)
        return SimpleNamespace(images=[grey(value) for value in greys], seconds={"denoiser": 0.5})


@pytest.fixture
def runtime() -> FakeRuntime:
    return FakeRuntime()


@pytest.fixture
def client(runtime, checker) -> Client:
    return Client(runtime, {name: f"old {name}" for name in SUBJECTS}, checker)


@pytest.mark.parametrize("kind", [Kind.PICTURE, Kind.WATCHED])
def test_pictures_are_compared(kind, client):
    answer = client.ask(3, DrawnRequest(kind, 1))
    assert answer.differences == (0, 0)
    assert answer.wrong == ()
    assert answer.batch_id == 0.5
    assert answer.seconds >= 0


def test_another_requests_picture_is_wrong(client, runtime):
    runtime.generates = lambda **_: SimpleNamespace(images=[grey(200)], seconds={"denoiser": 1.0})
    (line,) = client.ask(3, DrawnRequest(Kind.PICTURE, 0)).wrong
    assert line == (
        "request 3 (picture, 0 of the pool): its picture 1 is 190/255 from the one generated alone; "
        "it is 0 from picture 2 of request 1 of the pool"
    )


def test_a_request_that_is_cancelled(client, runtime):
    answer = client.ask(0, DrawnRequest(Kind.CANCELLED, 0))
    assert answer.wrong == ()
    assert answer.differences == ()
    runtime.generates = lambda **_: SimpleNamespace(images=[grey(10)], seconds={"denoiser": 1.0})
    assert client.ask(0, DrawnRequest(Kind.CANCELLED, 0)).wrong == (
        "request 0 (cancelled, 0 of the pool): it was answered",
    )


def test_a_request_that_is_refused(client, runtime):
    def refuse(**options):
        assert options["steps"] == 0
        raise InputError("steps must be 1 to 999")

    runtime.generates = refuse
    mistake = next(index for index, options in enumerate(MISTAKES) if "steps" in options)
    assert client.ask(0, DrawnRequest(Kind.REFUSED, 0, mistake)).wrong == ()
    runtime.generates = None
    assert len(client.ask(0, DrawnRequest(Kind.REFUSED, 0, mistake)).wrong) == 1


@pytest.mark.parametrize("kind", [Kind.REFUSED, Kind.CANCELLED, Kind.PICTURE, Kind.WATCHED])
@pytest.mark.parametrize("error", [MomaError("the GPU failed"), KeyError("lost")])
def test_an_unexpected_error_is_reported(kind, error, client, runtime):
    def fail(**_):
        raise error

    runtime.generates = fail
    (line,) = client.ask(7, DrawnRequest(kind, 1)).wrong
    assert line.startswith(f"request 7 ({kind.value}, 1 of the pool): {type(error).__name__}: ")


def test_a_newly_enrolled_subject_is_used(client, runtime):
    assert client.ask(0, DrawnRequest(Kind.ENROLLED, 0)).wrong == ()
    assert runtime.enrolled == [SUBJECTS[0]]
    client.ask(1, DrawnRequest(Kind.PICTURE, 0))
    assert runtime.asked[-1][0] == f"new {SUBJECTS[0]}"


def test_every_request_is_made_once():
    drawn = [DrawnRequest(Kind.PICTURE, index) for index in range(100)]
    asked = []

    def ask(number, item):
        asked.append((number, item))
        return Outcome(item.kind, float(number))

    answers = run(ask, drawn, 8, lambda: False)
    assert sorted(number for number, _ in asked) == list(range(100))
    assert all(item is drawn[number] for number, item in asked)
    assert sorted(answer.seconds for answer in answers) == list(range(100))


def test_no_request_starts_after_the_deadline():
    asked = []

    def ask(number, item):
        asked.append(number)
        return Outcome(item.kind, 0.0)

    assert len(run(ask, [DrawnRequest(Kind.PICTURE, 0)] * 50, 1, lambda: len(asked) >= 10)) == 10
