"""A small cache that forgets what was used longest ago."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Lru(Generic[K, V]):
    """At most `capacity` values by key, and as many as `budget` allows. Not thread-safe: its owner holds a lock.

    budget: of the sum of `size_of` all values; the one that was used last stays even if it alone is larger.
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
        """Of all values together."""
        return 0 if self._size_of is None else sum(map(self._size_of, self._values.values()))

    def clear(self) -> None:
        """Forget all."""
        self._values.clear()

    def get_or_make(self, key: K, make: Callable[[], V]) -> V:
        """The value of `key`, made by `make()` if it is not held; a `make` that raises leaves the key absent."""
        if key in self._values:
            self._values.move_to_end(key)
            return self._values[key]
        # Room is made first: two sets of large buffers must not be alive together when one is to be dropped.
        while len(self._values) >= self.capacity:
            self._values.popitem(last=False)
        value = make()
        self.put(key, value)
        return value

    def put(self, key: K, value: V) -> None:
        """Hold a value as the one used last, also one that is held and whose size has changed."""
        self._values[key] = value
        self._values.move_to_end(key)
        while len(self._values) > 1 and self.size > self._budget:
            self._values.popitem(last=False)
