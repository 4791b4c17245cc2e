"""Whose calls are answered together."""

import threading
import weakref

import pytest

from moma_rt.errors import InputError
from moma_rt.pipeline.batching import PendingRequest, RequestQueue
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
            call.set_result(f"{call.request}!")


def answers(queue, calls, gate):
    """The answers of calls from as many threads; the first call has its turn until all others wait."""
    found, started = {}, []

    def work(call):
        found[call.request] = queue.submit(call, gate)

    def start(call):
        started.append(threading.Thread(target=work, args=(call,)))
        started[-1].start()

    start(calls[0])
    assert gate.entered.wait(60)
    for count, call in enumerate(calls[1:], 1):
        start(call)
        wait_until(lambda count=count: len(queue._waiting) >= count)
    gate.go_on.set()
    for thread in started:
        thread.join()
    return found


def test_waiting_calls_of_one_kind_go_together():
    queue, calls = RequestQueue(4), [PendingRequest(f"call {i}", "batch_key", 1) for i in range(4)]
    gate = Gate(queue)
    assert answers(queue, calls, gate) == {f"call {i}": f"call {i}!" for i in range(4)}
    first, second = gate.groups
    assert first == ["call 0"]
    assert sorted(second) == ["call 1", "call 2", "call 3"]
    assert queue._waiting == []


def test_no_more_than_there_is_room_for():
    queue, calls = RequestQueue(3), [PendingRequest(i, "batch_key", size) for i, size in enumerate([1, 2, 2, 1, 1, 5])]
    gate = Gate(queue)
    assert answers(queue, calls, gate).keys() == set(range(6))
    assert sorted(request for group in gate.groups for request in group) == list(range(6))
    for group in gate.groups:
        assert len(group) == 1 or sum(calls[request].size for request in group) <= 3
    assert [5] in gate.groups, "a call that is too large for any company goes alone"
    assert any(len(group) > 1 for group in gate.groups)


def test_other_kinds_wait():
    queue, calls = RequestQueue(8), [PendingRequest(i, batch_key, 1) for i, batch_key in enumerate("abab")]
    gate = Gate(queue)
    assert answers(queue, calls, gate).keys() == set(range(4))
    assert sorted(map(sorted, gate.groups)) == [[0], [1, 3], [2]]


def test_an_error_is_that_of_its_call():
    queue = RequestQueue(1)

    def fail(calls):
        calls[0].error = ValueError("this one")

    with pytest.raises(ValueError, match="this one"):
        queue.submit(PendingRequest(1, "batch_key", 1), fail)
    assert queue.submit(PendingRequest(2, "batch_key", 1), lambda calls: calls[0].set_result("fine")) == "fine"
    assert queue._waiting == []


def test_calls_that_were_left_unanswered_are_asked_again():
    """Whoever answers others with its own call may be interrupted."""
    queue, calls = RequestQueue(4), [PendingRequest(i, "batch_key", 1) for i in range(3)]
    gate = Gate(queue)
    interrupted = []

    def run_batch(group):
        if len(group) > 1:
            interrupted.append(len(group))
            raise KeyboardInterrupt
        gate(group)

    found, threads = {}, []

    def work(call):
        try:
            found[call.request] = queue.submit(call, run_batch)
        except KeyboardInterrupt:
            found[call.request] = "interrupted"

    for call in calls:
        threads.append(threading.Thread(target=work, args=(call,)))
    threads[0].start()
    assert gate.entered.wait(60)
    for count, thread in enumerate(threads[1:], 1):
        thread.start()
        wait_until(lambda count=count: len(queue._waiting) >= count)
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
    queue, order, threads = RequestQueue(1), [], []

    def answer(calls):
        order.append(calls[0].request)
        calls[0].set_result(None)

    def call(name, times):
        for _ in range(times):
            queue.submit(PendingRequest(name, name, 1), answer)

    def exclusive(name, _):
        with queue.exclusive():
            order.append(name)

    with queue.exclusive():
        for waiting, (work, name, times) in enumerate([(call, 0, 2), (exclusive, 1, 1), (call, 2, 2), (call, 3, 1)], 1):
            threads.append(threading.Thread(target=work, args=(name, times)))
            threads[-1].start()
            wait_until(lambda count=waiting: len(queue._waiting) >= count)
    for thread in threads:
        thread.join()
    assert order[:4] == [0, 1, 2, 3]
    assert sorted(order[4:]) == [0, 2]
    assert queue._waiting == []


def test_whoever_waits_no_longer_does_not_hold_up_the_next():
    """A thread that is interrupted while it is the next one."""
    queue, done = RequestQueue(1), threading.Event()
    first, second = object(), PendingRequest(2, "batch_key", 1)
    with queue.exclusive():
        queue._waiting.append(first)
        thread = threading.Thread(
            target=lambda: (queue.submit(second, lambda calls: calls[0].set_result(None)), done.set())
        )
        thread.start()
        wait_until(lambda: second in queue._waiting)
    assert not done.is_set()
    queue._release(first)
    thread.join()
    assert done.is_set()


def test_a_turn_is_not_reentrant():
    queue = RequestQueue(1)
    with queue.exclusive(), pytest.raises(InputError, match="called from on_step"), queue.exclusive():
        pass
    with queue.exclusive():
        pass


def test_an_answered_call_does_not_wait_for_others():
    """Its thread returns while another kind has the turn."""
    queue = RequestQueue(4)
    entered, go_on = [threading.Event(), threading.Event()], [threading.Event(), threading.Event()]
    order = []

    def run_batch(calls):
        index = {"a": 0, "b": 1}[calls[0].batch_key]
        entered[index].set()
        assert go_on[index].wait(60)
        for call in calls:
            call.set_result(None)

    def work(name, batch_key):
        queue.submit(PendingRequest(name, batch_key, 1), run_batch)
        order.append(name)

    threads = []

    def start(name, batch_key, waiting):
        threads.append(threading.Thread(target=work, args=(name, batch_key)))
        threads[-1].start()
        wait_until(lambda: len(queue._waiting) >= waiting)

    with queue.exclusive():
        for waiting, (name, batch_key) in enumerate([("a1", "a"), ("a2", "a"), ("b", "b")], 1):
            start(name, batch_key, waiting)
    go_on[0].set()
    wait_until(lambda: {"a1", "a2"} <= set(order))
    go_on[1].set()
    for thread in threads:
        thread.join()
    assert sorted(order) == ["a1", "a2", "b"]
    assert queue._waiting == []


def test_an_interrupted_call_waits_no_longer():
    queue = RequestQueue(1)

    def interrupted(calls):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        queue.submit(PendingRequest(1, "batch_key", 1), interrupted)
    assert queue._waiting == []
    assert queue.submit(PendingRequest(2, "batch_key", 1), lambda calls: calls[0].set_result("fine")) == "fine"


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

    alive, queue = [], RequestQueue(1)
    with pytest.raises(ValueError, match="this one"):
        queue.submit(PendingRequest(1, "batch_key", 1), fail)
    assert alive[0]() is None
