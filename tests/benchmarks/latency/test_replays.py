"""Replays of captured graphs are timed; everything else is passed to the backend."""

from types import SimpleNamespace

from benchmarks.latency.replays import TimedReplays


class FakeBackend:
    name = "fake"
    supports_capture = True

    def __init__(self):
        self.replayed = 0
        self.graph = SimpleNamespace(is_valid=True, replay=self._replay)

    def _replay(self):
        self.replayed += 1

    def allocate(self, shape, dtype):
        return (shape, dtype)

    def capture(self, enqueue):
        enqueue()
        return self.graph


def test_each_replay_is_timed():
    inner, enqueued = FakeBackend(), []
    backend = TimedReplays(inner)
    graph = backend.capture(lambda: enqueued.append(1))
    assert enqueued == [1]
    assert backend.seconds == []
    graph.replay()
    graph.replay()
    assert inner.replayed == len(backend.seconds) == 2
    assert all(seconds >= 0 for seconds in backend.seconds)
    assert graph.is_valid
    inner.graph.is_valid = False
    assert not graph.is_valid


def test_everything_else_is_passed_to_the_backend():
    inner = FakeBackend()
    backend = TimedReplays(inner)
    assert (backend.name, backend.supports_capture) == ("fake", True)
    assert backend.allocate((1,), "float32") == ((1,), "float32")
    inner.graph = None
    assert backend.capture(lambda: None) is None
