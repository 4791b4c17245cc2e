"""A small cache that forgets what was used longest ago."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Lru(Generic[K, V]):
    """At most `capacity` values by key. Not thread-safe: its owner holds a lock."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._values: OrderedDict[K, V] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

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
        value = self._values[key] = make()
        return value
