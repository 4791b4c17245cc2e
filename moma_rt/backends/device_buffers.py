"""What the backends on a GPU have in common: buffers in its memory, and copies in the order of one stream."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from moma_rt.backends.base import Array, Buffer, K, Size, check_shape, nbytes
from moma_rt.backends.cuda import ALIGNMENT, DeviceMemory, Stream


@dataclass(frozen=True, eq=False)
class DeviceBuffer:
    """Device memory and what lies in it."""

    memory: DeviceMemory
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def row(self, index: int) -> DeviceMemory:
        """Where a row of it lies."""
        size = nbytes(self) // self.shape[0]
        return self.memory.part(index * size, size)


class OnDevice:
    """The part of a backend that holds buffers and moves arrays; what it is asked for is put on `stream`."""

    is_host = False

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        stream.ends_with(self)

    def allocate(self, wanted: Mapping[K, Size]) -> dict[K, Buffer]:
        kinds = {key: (shape, np.dtype(dtype)) for key, (shape, dtype) in wanted.items()}
        # The addresses TensorRT takes are multiples of this; an empty buffer has one as well.
        sizes = [
            max(1, -(-kind.itemsize * math.prod(shape) // ALIGNMENT)) * ALIGNMENT for shape, kind in kinds.values()
        ]
        region = self._stream.allocate(sum(sizes))
        self._stream.clear(region)
        parts = [region.part(end - size, size) for end, size in zip(itertools.accumulate(sizes), sizes, strict=True)]
        return {key: DeviceBuffer(part, *kinds[key]) for key, part in zip(wanted, parts, strict=True)}

    def upload(self, buffer: Buffer, array: Array, row: int | None = None) -> None:
        check_shape(buffer, array, row)
        target = on_device(buffer)
        memory = target.memory if row is None else target.row(row)
        self._stream.copy_in(memory, array, target.dtype)

    def copy_row(self, table: Buffer, row: int, target: Buffer) -> None:
        self._stream.copy_within(on_device(target).memory, on_device(table).row(row))

    def fill_row(self, target: Buffer, row: int, source: Buffer) -> None:
        to, size = on_device(target).row(row), nbytes(source)
        self._stream.copy_within(to, on_device(source).memory.part(0, size))
        if size < to.size:
            self._stream.clear(to.part(size, to.size - size))

    def download(self, buffer: Buffer) -> Array:
        source = on_device(buffer)
        return self._stream.copy_out(source.memory, source.dtype, math.prod(source.shape)).reshape(source.shape)

    def limit_run_ahead(self) -> None:
        self._stream.limit_run_ahead()

    def synchronize(self) -> None:
        self._stream.synchronize()


def on_device(buffer: Buffer) -> DeviceBuffer:
    """The buffer as what it must be.

    Raises:
        TypeError: it is of a backend that has none of these.
    """
    if not isinstance(buffer, DeviceBuffer):
        raise TypeError(f"a {type(buffer).__name__} is not a buffer in a GPU's memory")
    return buffer
