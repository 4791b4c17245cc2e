"""The request queue: who uses the device when, and which requests share a batch."""

import os
import signal
import threading
import weakref

import pytest

from moma_rt.errors import InputError
from moma_rt.pipeline.batching import PendingRequest, RequestQueue
from tests.moma_rt.waiting import wait_until


class Gate:
    """A `run_batch` that completes each request; the first batch blocks until `go_on` is set."""

    def __init__(self, waiting):
        self.batches = []
        self.entered, self.go_on = threading.Event(), threading.Event()
        self.waiting = waiting

    def __call__(self, calls):
        self.batches.append([call.request for call in calls])
        if not self.entered.is_set():
            self.entered.set()
            assert self.go_on.wait(60)
        for call in calls:
            call.set_result(f"{call.request}!")


def submit_all(queue, calls, gate):
    """Results of requests that one thread each submits; the first one runs until all others wait."""
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


def test_waiting_requests_of_one_key_share_a_batch():
    queue, calls = RequestQueue(4), [PendingRequest(f"call {i}", "batch_key", 1) for i in range(4)]
    gate = Gate(queue)
    assert submit_all(queue, calls, gate) == {f"call {i}": f"call {i}!" for i in range(4)}
    first, second = gate.batches
    assert first == ["call 0"]
    assert sorted(second) == ["call 1", "call 2", "call 3"]
    assert queue._waiting == []


def test_a_batch_is_no_larger_than_max_batch():
    queue, calls = RequestQueue(3), [PendingRequest(i, "batch_key", size) for i, size in enumerate([1, 2, 2, 1, 1, 5])]
    gate = Gate(queue)
    assert submit_all(queue, calls, gate).keys() == set(range(6))
    assert sorted(request for group in gate.batches for request in group) == list(range(6))
    for group in gate.batches:
        assert len(group) == 1 or sum(calls[request].size for request in group) <= 3
    assert [5] in gate.batches, "a request larger than max_batch runs alone"
    assert any(len(group) > 1 for group in gate.batches)


def test_requests_of_other_keys_wait():
    queue, calls = RequestQueue(8), [PendingRequest(i, batch_key, 1) for i, batch_key in enumerate("abab")]
    gate = Gate(queue)
    assert submit_all(queue, calls, gate).keys() == set(range(4))
    assert sorted(map(sorted, gate.batches)) == [[0], [1, 3], [2]]


def test_an_error_is_raised_in_its_own_thread():
    queue = RequestQueue(1)

    def fail(calls):
        calls[0].error = ValueError("this one")

    with pytest.raises(ValueError, match="this one"):
        queue.submit(PendingRequest(1, "batch_key", 1), fail)
    assert queue.submit(PendingRequest(2, "batch_key", 1), lambda calls: calls[0].set_result("fine")) == "fine"
    assert queue._waiting == []


def test_requests_of_an_interrupted_batch_are_run_again():
    """The thread that runs other threads' requests with its own may be interrupted."""
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


def test_requests_run_in_order_of_arrival():
    """A thread's next request waits behind those in the queue, or a busy thread would starve the others."""
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


def test_an_interrupted_waiting_thread_does_not_block_the_next():
    """The thread at the head of the queue is interrupted while it waits."""
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


def test_the_queue_is_not_reentrant():
    queue = RequestQueue(1)
    with queue.exclusive(), pytest.raises(InputError, match="called from on_step"), queue.exclusive():
        pass
    with queue.exclusive():
        pass


def test_a_completed_request_does_not_wait_for_others():
    """Its thread returns while requests of another key run."""
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


def test_an_interrupted_request_leaves_the_queue():
    queue = RequestQueue(1)

    def interrupted(calls):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        queue.submit(PendingRequest(1, "batch_key", 1), interrupted)
    assert queue._waiting == []
    assert queue.submit(PendingRequest(2, "batch_key", 1), lambda calls: calls[0].set_result("fine")) == "fine"


def test_a_raised_error_keeps_nothing_alive():
    class Resource:
        pass

    def fail(calls):
        resource = Resource()
        alive.append(weakref.ref(resource))
        try:
            raise ValueError("this one")
        except ValueError as error:
            calls[0].error = error

    alive, queue = [], RequestQueue(1)
    with pytest.raises(ValueError, match="this one"):
        queue.submit(PendingRequest(1, "batch_key", 1), fail)
    assert alive[0]() is None


def in_a_fork(call):
    """What `call` returns in a forked process, as text, or the error that it raises."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        # Ends a child that waits for ever.
        signal.alarm(60)
        try:
            text = str(call())
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
        os.write(writing, text.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as stream:
        text = stream.read()
    _, status = os.waitpid(child, 0)
    assert status == 0, "the child waited for ever"
    return text


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")


def answer(queue):
    return queue.submit(PendingRequest("call", "key", 1), lambda batch: [call.set_result("done") for call in batch])


@needs_fork
def test_an_idle_queue_goes_on_in_a_fork():
    queue = RequestQueue(1, after_fork=lambda: None)
    assert answer(queue) == "done"
    assert in_a_fork(lambda: answer(queue)) == "done"
    assert in_a_fork(lambda: in_a_fork(lambda: answer(queue))) == "done"
    assert answer(queue) == "done"


@needs_fork
def test_a_queue_whose_device_does_not_survive_is_refused_in_a_fork():
    queue = RequestQueue(1)
    assert answer(queue) == "done"
    text = in_a_fork(lambda: answer(queue))
    assert text.startswith("MomaError: this runtime was loaded by process")
    assert text.endswith("was forked from it: load a runtime after the fork, in each process")
    assert answer(queue) == "done"


@needs_fork
@pytest.mark.parametrize("state", ["running", "exclusive", "waiting", "locked"])
def test_a_fork_of_a_busy_queue_is_refused_at_once(state):
    queue = RequestQueue(1, after_fork=lambda: None)
    entered, go_on = threading.Event(), threading.Event()

    def block(batch=()):
        entered.set()
        assert go_on.wait(60)
        for call in batch:
            call.set_result("done")

    def hold():
        if state == "exclusive":
            with queue.exclusive():
                block()
        elif state == "locked":
            with queue._changed:
                block()
        else:
            queue.submit(PendingRequest("first", "key", 1), block)

    threads = [threading.Thread(target=hold)]
    threads[0].start()
    assert entered.wait(60)
    if state == "waiting":
        threads.append(threading.Thread(target=answer, args=(queue,)))
        threads[1].start()
        wait_until(lambda: len(queue._waiting) == 1)
    for use in (lambda: answer(queue), queue.check_process, lambda: queue.exclusive().__enter__()):
        text = in_a_fork(use)
        assert text.startswith("MomaError: this runtime was loaded by process")
        assert "while it was in use: load a runtime after the fork" in text
    go_on.set()
    for thread in threads:
        thread.join()
    assert answer(queue) == "done"
