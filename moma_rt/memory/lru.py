"""A least-recently-used cache."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Lru(Generic[K, V]):
    """Caches at most `capacity` values, of at most `budget` in total size. Not thread-safe: its owner holds a lock.

    Args:
        size_of: size of a value; None: values have no size.
        budget: for the sum of sizes; the most recently used value stays even if it alone is larger.
    """

    def __init__(self, capacity: int, size_of: Callable[[V], int] | None = None, budget: int = 0) -> None:
        self.capacity = capacity
        self._size_of = size_of
        self._budget = budget
        self._values: OrderedDict[K, V] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    @property
    def size(self) -> int:
        """Total size of all values."""
        return 0 if self._size_of is None else sum(map(self._size_of, self._values.values()))

    def clear(self) -> None:
        """Evict all values."""
        self._values.clear()

    def get_or_make(self, key: K, make: Callable[[], V]) -> V:
        """Return the value of `key`; on a miss, make and cache it. If `make` raises, the key stays absent."""
        if key in self._values:
            self._values.move_to_end(key)
            return self._values[key]
        # Evict first: an evicted large set of buffers and the new one must not be alive together.
        while len(self._values) >= self.capacity:
            self._values.popitem(last=False)
        value = make()
        self.put(key, value)
        return value

    def put(self, key: K, value: V) -> None:
        """Cache a value as the most recently used; put it again when its size has changed."""
        self._values[key] = value
        self._values.move_to_end(key)
        while len(self._values) > 1 and self.size > self._budget:
            self._values.popitem(last=False)
