import threading

from moma_rt.lazy import lazy_property


class Thing:
    """Counts how often its value is computed."""

    def __init__(self, wait=lambda: None):
        self.wait, self.count = wait, 0

    @lazy_property
    def value(self):
        """A number."""
        self.count += 1
        self.wait()
        return 7


def test_the_value_is_computed_once_and_for_each_instance():
    one, other = Thing(), Thing()
    assert [one.value, one.value, other.value] == [7, 7, 7]
    assert (one.count, other.count) == (1, 1)
    assert Thing.value.__doc__ == "A number."


def test_an_error_is_not_kept():
    def fail():
        raise ValueError("first")

    thing = Thing(fail)
    for _ in range(2):
        try:
            _ = thing.value
        except ValueError:
            continue
        raise AssertionError("no error")
    thing.wait = lambda: None
    assert (thing.value, thing.count) == (7, 3)


def test_one_instance_does_not_wait_for_another():
    """A fork while one instance computes must leave no lock behind that all others need."""
    entered, go_on = threading.Event(), threading.Event()

    def block():
        entered.set()
        assert go_on.wait(60)

    slow = Thing(block)
    busy = threading.Thread(target=lambda: slow.value)
    busy.start()
    assert entered.wait(60)
    found = []
    other = threading.Thread(target=lambda: found.append(Thing().value))
    other.start()
    other.join(60)
    go_on.set()
    busy.join()
    assert found == [7]
