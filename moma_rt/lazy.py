"""A property that is computed once."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from functools import cached_property as lazy_property
else:

    class lazy_property:
        """`functools.cached_property` without a lock.

        Before Python 3.12, that one holds a lock that all instances share while it computes. A process that is forked
        in that time inherits it locked, for ever. Without it, two threads may compute an equal value at the same time.
        """

        def __init__(self, compute: Any) -> None:
            self._compute, self.__doc__ = compute, compute.__doc__

        def __set_name__(self, owner: type, name: str) -> None:
            self._name = name

        def __get__(self, instance: Any, owner: type | None = None) -> Any:
            if instance is None:
                return self
            value = instance.__dict__[self._name] = self._compute(instance)
            return value


__all__ = ["lazy_property"]
