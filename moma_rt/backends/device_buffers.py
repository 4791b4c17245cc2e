"""The base of the GPU backends: buffers in device memory, and copies in the order of one stream."""

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
    """Device memory with a shape and a dtype."""

    memory: DeviceMemory
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def row(self, index: int) -> DeviceMemory:
        """The memory of one row."""
        size = nbytes(self) // self.shape[0]
        return self.memory.part(index * size, size)


class DeviceBackend:
    """Base class of the GPU backends: allocates buffers, and enqueues copies on `stream`."""

    is_host = False
    # CUDA cannot be used after a fork.
    survives_fork = False

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        stream.synchronize_at_end_of(self)

    def allocate(self, wanted: Mapping[K, Size]) -> dict[K, Buffer]:
        kinds = {key: (shape, np.dtype(dtype)) for key, (shape, dtype) in wanted.items()}
        # Every buffer, even an empty one, needs an address of this alignment for TensorRT.
        sizes = [
            max(1, -(-kind.itemsize * math.prod(shape) // ALIGNMENT)) * ALIGNMENT for shape, kind in kinds.values()
        ]
        region = self._stream.allocate(sum(sizes))
        self._stream.clear(region)
        parts = [region.part(end - size, size) for end, size in zip(itertools.accumulate(sizes), sizes, strict=True)]
        return {key: DeviceBuffer(part, *kinds[key]) for key, part in zip(wanted, parts, strict=True)}

    def upload(self, buffer: Buffer, array: Array, row: int | None = None) -> None:
        check_shape(buffer, array, row)
        target = as_device_buffer(buffer)
        memory = target.memory if row is None else target.row(row)
        self._stream.copy_in(memory, array, target.dtype)

    def copy_row(self, table: Buffer, row: int, target: Buffer) -> None:
        self._stream.copy_within(as_device_buffer(target).memory, as_device_buffer(table).row(row))

    def fill_row(self, target: Buffer, row: int, source: Buffer) -> None:
        to, size = as_device_buffer(target).row(row), nbytes(source)
        self._stream.copy_within(to, as_device_buffer(source).memory.part(0, size))
        if size < to.size:
            self._stream.clear(to.part(size, to.size - size))

    def download(self, buffer: Buffer) -> Array:
        source = as_device_buffer(buffer)
        return self._stream.copy_out(source.memory, source.dtype, math.prod(source.shape)).reshape(source.shape)

    def limit_run_ahead(self) -> None:
        self._stream.limit_run_ahead()

    def synchronize(self) -> None:
        self._stream.synchronize()


def as_device_buffer(buffer: Buffer) -> DeviceBuffer:
    """Return the buffer as a `DeviceBuffer`.

    Raises:
        TypeError: it belongs to another kind of backend.
    """
    if not isinstance(buffer, DeviceBuffer):
        raise TypeError(f"a {type(buffer).__name__} is not a buffer in a GPU's memory")
    return buffer
