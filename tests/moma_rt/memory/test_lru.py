import pytest

from moma_rt.memory.lru import Lru


def test_the_least_recently_used_value_is_evicted():
    cache = Lru(2)
    made = []

    def get(key):
        return cache.get_or_make(key, lambda: made.append(key) or key * 10)

    assert [get(k) for k in (1, 2, 1, 3, 1, 2)] == [10, 20, 10, 30, 10, 20]
    assert made == [1, 2, 3, 2]
    assert len(cache) == 2


def test_a_value_that_could_not_be_made_is_made_later():
    cache = Lru(1)

    def fail():
        raise OSError

    with pytest.raises(OSError):  # noqa: PT011 - any message
        cache.get_or_make("a", fail)
    assert len(cache) == 0
    assert cache.get_or_make("a", lambda: 1) == 1


def test_values_are_evicted_when_their_sizes_exceed_the_budget():
    cache = Lru(9, len, 5)
    a = [0, 0]
    cache.put("a", a)
    cache.put("b", [0, 0])
    assert (len(cache), cache.size) == (2, 4)
    a += [0, 0]
    cache.put("a", a)
    assert (len(cache), cache.size) == (1, 4)
    assert cache.get_or_make("a", list) is a
    cache.put("c", [0] * 9)
    assert (len(cache), cache.size) == (1, 9), "the last one stays, whatever its size"
    assert cache.get_or_make("d", lambda: [0]) == [0]
    assert cache.size == 1


def test_the_old_value_is_evicted_before_the_new_one_is_made():
    cache = Lru(1)
    cache.get_or_make("a", lambda: 1)
    assert cache.get_or_make("b", lambda: len(cache)) == 0
