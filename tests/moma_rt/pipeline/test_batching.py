"""Whose calls are answered together."""

import threading
import weakref

import pytest

from moma_rt.errors import InputError
from moma_rt.pipeline.batching import Call, Turns
from tests.moma_rt.waiting import wait_until


class Gate:
    """Answers calls with the calls of their group; the first group waits until it may go on."""

    def __init__(self, waiting):
        self.groups = []
        self.entered, self.go_on = threading.Event(), threading.Event()
        self.waiting = waiting

    def __call__(self, calls):
        self.groups.append([call.request for call in calls])
        if not self.entered.is_set():
            self.entered.set()
            assert self.go_on.wait(60)
        for call in calls:
            call.answer(f"{call.request}!")


def answers(turns, calls, gate):
    """The answers of calls from as many threads; the first call has its turn until all others wait."""
    found, started = {}, []

    def work(call):
        found[call.request] = turns.answer(call, gate)

    def start(call):
        started.append(threading.Thread(target=work, args=(call,)))
        started[-1].start()

    start(calls[0])
    assert gate.entered.wait(60)
    for count, call in enumerate(calls[1:], 1):
        start(call)
        wait_until(lambda count=count: len(turns._waiting) >= count)
    gate.go_on.set()
    for thread in started:
        thread.join()
    return found


def test_waiting_calls_of_one_kind_go_together():
    turns, calls = Turns(4), [Call(f"call {i}", "kind", 1) for i in range(4)]
    gate = Gate(turns)
    assert answers(turns, calls, gate) == {f"call {i}": f"call {i}!" for i in range(4)}
    first, second = gate.groups
    assert first == ["call 0"]
    assert sorted(second) == ["call 1", "call 2", "call 3"]
    assert turns._waiting == []


def test_no_more_than_there_is_room_for():
    turns, calls = Turns(3), [Call(i, "kind", size) for i, size in enumerate([1, 2, 2, 1, 1, 5])]
    gate = Gate(turns)
    assert answers(turns, calls, gate).keys() == set(range(6))
    assert sorted(request for group in gate.groups for request in group) == list(range(6))
    for group in gate.groups:
        assert len(group) == 1 or sum(calls[request].size for request in group) <= 3
    assert [5] in gate.groups, "a call that is too large for any company goes alone"
    assert any(len(group) > 1 for group in gate.groups)


def test_other_kinds_wait():
    turns, calls = Turns(8), [Call(i, kind, 1) for i, kind in enumerate("abab")]
    gate = Gate(turns)
    assert answers(turns, calls, gate).keys() == set(range(4))
    assert sorted(map(sorted, gate.groups)) == [[0], [1, 3], [2]]


def test_an_error_is_that_of_its_call():
    turns = Turns(1)

    def fail(calls):
        calls[0].error = ValueError("this one")

    with pytest.raises(ValueError, match="this one"):
        turns.answer(Call(1, "kind", 1), fail)
    assert turns.answer(Call(2, "kind", 1), lambda calls: calls[0].answer("fine")) == "fine"
    assert turns._waiting == []


def test_calls_that_were_left_unanswered_are_asked_again():
    """Whoever answers others with its own call may be interrupted."""
    turns, calls = Turns(4), [Call(i, "kind", 1) for i in range(3)]
    gate = Gate(turns)
    interrupted = []

    def together(group):
        if len(group) > 1:
            interrupted.append(len(group))
            raise KeyboardInterrupt
        gate(group)

    found, threads = {}, []

    def work(call):
        try:
            found[call.request] = turns.answer(call, together)
        except KeyboardInterrupt:
            found[call.request] = "interrupted"

    for call in calls:
        threads.append(threading.Thread(target=work, args=(call,)))
    threads[0].start()
    assert gate.entered.wait(60)
    for count, thread in enumerate(threads[1:], 1):
        thread.start()
        wait_until(lambda count=count: len(turns._waiting) >= count)
    gate.go_on.set()
    for thread in threads:
        thread.join()
    assert interrupted == [2]
    assert sorted(found.values()) == ["0!", "1!", "interrupted"] or sorted(found.values()) == [
        "0!",
        "2!",
        "interrupted",
    ]


def test_turns_are_given_in_the_order_in_which_they_were_asked_for():
    """Whoever asks again waits behind those that wait already, or a busy thread would keep all others from theirs."""
    turns, order, threads = Turns(1), [], []

    def answer(calls):
        order.append(calls[0].request)
        calls[0].answer(None)

    def call(name, times):
        for _ in range(times):
            turns.answer(Call(name, name, 1), answer)

    def turn(name, _):
        with turns.turn():
            order.append(name)

    with turns.turn():
        for waiting, (work, name, times) in enumerate([(call, 0, 2), (turn, 1, 1), (call, 2, 2), (call, 3, 1)], 1):
            threads.append(threading.Thread(target=work, args=(name, times)))
            threads[-1].start()
            wait_until(lambda count=waiting: len(turns._waiting) >= count)
    for thread in threads:
        thread.join()
    assert order[:4] == [0, 1, 2, 3]
    assert sorted(order[4:]) == [0, 2]
    assert turns._waiting == []


def test_whoever_waits_no_longer_does_not_hold_up_the_next():
    """A thread that is interrupted while it is the next one."""
    turns, done = Turns(1), threading.Event()
    first, second = object(), Call(2, "kind", 1)
    with turns.turn():
        turns._waiting.append(first)
        thread = threading.Thread(
            target=lambda: (turns.answer(second, lambda calls: calls[0].answer(None)), done.set())
        )
        thread.start()
        wait_until(lambda: second in turns._waiting)
    assert not done.is_set()
    turns._leave(first)
    thread.join()
    assert done.is_set()


def test_a_turn_is_not_reentrant():
    turns = Turns(1)
    with turns.turn(), pytest.raises(InputError, match="called from on_step"), turns.turn():
        pass
    with turns.turn():
        pass


def test_an_answered_call_does_not_wait_for_others():
    """Its thread returns while another kind has the turn."""
    turns = Turns(4)
    entered, go_on = [threading.Event(), threading.Event()], [threading.Event(), threading.Event()]
    order = []

    def together(calls):
        index = {"a": 0, "b": 1}[calls[0].kind]
        entered[index].set()
        assert go_on[index].wait(60)
        for call in calls:
            call.answer(None)

    def work(name, kind):
        turns.answer(Call(name, kind, 1), together)
        order.append(name)

    threads = []

    def start(name, kind, waiting):
        threads.append(threading.Thread(target=work, args=(name, kind)))
        threads[-1].start()
        wait_until(lambda: len(turns._waiting) >= waiting)

    with turns.turn():
        for waiting, (name, kind) in enumerate([("a1", "a"), ("a2", "a"), ("b", "b")], 1):
            start(name, kind, waiting)
    go_on[0].set()
    wait_until(lambda: {"a1", "a2"} <= set(order))
    go_on[1].set()
    for thread in threads:
        thread.join()
    assert sorted(order) == ["a1", "a2", "b"]
    assert turns._waiting == []


def test_an_interrupted_call_waits_no_longer():
    turns = Turns(1)

    def interrupted(calls):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        turns.answer(Call(1, "kind", 1), interrupted)
    assert turns._waiting == []
    assert turns.answer(Call(2, "kind", 1), lambda calls: calls[0].answer("fine")) == "fine"


def test_an_error_is_let_go():
    class Held:
        pass

    def fail(calls):
        held = Held()
        alive.append(weakref.ref(held))
        try:
            raise ValueError("this one")
        except ValueError as error:
            calls[0].error = error

    alive, turns = [], Turns(1)
    with pytest.raises(ValueError, match="this one"):
        turns.answer(Call(1, "kind", 1), fail)
    assert alive[0]() is None
