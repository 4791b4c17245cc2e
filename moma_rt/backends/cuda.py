"""One stream of the first GPU, and memory of that GPU: the parts of the CUDA runtime that the backends need."""

import contextlib
import ctypes
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from moma_rt.backends.base import Array, gc_disabled
from moma_rt.backends.libraries import CUDA_PIP_NAME, cuda_runtime
from moma_rt.errors import MomaError, OutOfMemory
from moma_rt.messages import one_line

# TensorRT requires this alignment of every address; cudaMalloc guarantees it.
ALIGNMENT = 256
# Page-locked staging memory. The host fills one chunk while the device reads another, so a few are enough for large
# uploads at the bus's speed; the uploads of a generation, without those of a new subject, fit into one.
_CHUNK_BYTES, _CHUNKS = 1 << 22, 4
_ADVICE = {
    "cudaErrorMemoryAllocation": "close other programs on the GPU, or generate fewer pictures at a time",
    "cudaErrorInsufficientDriver": (
        f"{CUDA_PIP_NAME} is newer than the driver: update the driver, or install an older {CUDA_PIP_NAME}"
    ),
}


@dataclass(frozen=True, eq=False)
class DeviceMemory:
    """`size` bytes of device memory at `address`. The allocation is freed with its last part."""

    address: int
    size: int
    _allocation: object

    def part(self, offset: int, size: int) -> "DeviceMemory":
        """The `size` bytes that start at byte `offset`."""
        assert 0 <= offset <= offset + size <= self.size
        return DeviceMemory(self.address + offset, size, self._allocation)


class Stream:
    """A CUDA stream that does not wait for the default stream: work runs in order, asynchronously to the host.

    Memory and contexts must stay alive until the work that uses them has run, not only until it is enqueued. So
    whoever enqueues work passes them to `keep_alive`.

    Raises:
        InputError: cuda-bindings is not installed.
        MomaError: CUDA failed, here or in any method. The message names the call and CUDA's error.
    """

    def __init__(self) -> None:
        self._cuda = cuda_runtime()
        stream = self._call("cudaStreamCreateWithFlags", self._cuda.cudaStreamNonBlocking)
        self.handle = int(stream)
        self._kept_alive: dict[int, object] = {}
        self._ring: deque[_Chunk] = deque()
        self.is_capturing = False
        # Of the last two calls of `limit_run_ahead`, the later one first.
        self._run_ahead_events: tuple[_Event, ...] = ()
        _finalize(self, _destroy_stream, self._cuda, stream)

    def allocate(self, size: int) -> DeviceMemory:
        """Allocate at least `size` bytes, aligned to 256 and uninitialized; even 0 bytes have an address.

        Raises:
            OutOfMemory: the device has too little memory left. Nothing has changed.
        """
        size = max(size, ALIGNMENT)
        address = int(self._call("cudaMalloc", size, detail=f" of {size} bytes"))
        return DeviceMemory(address, size, _OwnedHandle(self._cuda.cudaFree, address))

    def clear(self, memory: DeviceMemory) -> None:
        """Fill memory with zeros."""
        self.keep_alive(memory)
        self._call("cudaMemsetAsync", memory.address, 0, memory.size, self.handle)

    def synchronize_at_end_of(self, owner: object) -> None:
        """Call `synchronize` when `owner` is freed or the process ends.

        Objects that are kept alive may refer to this stream, a cycle that would otherwise wait for the garbage
        collector.
        """
        weakref.finalize(owner, _try_synchronize, self)

    def copy_in(self, memory: DeviceMemory, array: Array, dtype: np.dtype[Any]) -> None:
        """Copy an array, converted to `dtype`, to the start of `memory`. The array may change once this returns."""
        self.keep_alive(memory)
        flat, done = array.reshape(-1), 0
        while done < flat.size:
            piece = self._staging_memory(dtype, flat.size - done)
            np.copyto(piece, flat[done : done + piece.size], casting="same_kind")
            self._copy(
                memory.address + done * dtype.itemsize, piece.ctypes.data, piece.nbytes, "cudaMemcpyHostToDevice"
            )
            done += piece.size

    def copy_within(self, to: DeviceMemory, source: DeviceMemory) -> None:
        """Copy all of `source` to the start of `to`."""
        assert source.size <= to.size
        self.keep_alive(to)
        self.keep_alive(source)
        self._copy(to.address, source.address, source.size, "cudaMemcpyDeviceToDevice")

    def copy_out(self, memory: DeviceMemory, dtype: np.dtype[Any], count: int) -> Array:
        """Wait for all work enqueued before and return the first `count` numbers in `memory` as a new array."""
        self.keep_alive(memory)
        found, done = np.empty(count, dtype), 0
        if not count:
            self.synchronize()
        while done < count:
            piece = self._staging_memory(dtype, count - done)
            source = memory.address + done * dtype.itemsize
            self._copy(piece.ctypes.data, source, piece.nbytes, "cudaMemcpyDeviceToHost")
            self.synchronize()
            found[done : done + piece.size] = piece
            done += piece.size
        return found

    def _staging_memory(self, dtype: np.dtype[Any], count: int) -> Array:
        """Return unused page-locked memory for 1 to `count` numbers.

        Only copies from and to page-locked memory are asynchronous.
        """
        if not self._ring:
            for _ in range(_CHUNKS):
                self._ring.append(self._new_chunk())
        chunk = self._ring[0]
        if chunk.remaining < min(count * dtype.itemsize, _CHUNK_BYTES // 2):
            # All work that uses this chunk is on the stream now.
            self._call("cudaEventRecord", chunk.event.handle, self.handle)
            self._ring.rotate(-1)
            chunk = self._ring[0]
            # Returns at once if the event was never recorded.
            self._call("cudaEventSynchronize", chunk.event.handle)
            chunk.used = 0
        return chunk.take(dtype, count)

    def _new_chunk(self) -> "_Chunk":
        event = self._new_event()
        asked = (_CHUNK_BYTES, self._cuda.cudaHostAllocDefault)
        address = int(self._call("cudaHostAlloc", *asked, detail=f" of {_CHUNK_BYTES} bytes"))
        return _Chunk(address, event, _OwnedHandle(self._cuda.cudaFreeHost, address))

    def capture(self, enqueue: Callable[[], None]) -> "Graph":
        """Capture the work that `enqueue` enqueues, without running it. The work must not use host memory.

        Raises:
            MomaError: the work cannot be captured, or `enqueue` raised this. The stream is as before.
        """
        cuda, captured = self._cuda, None
        mode = cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        kept_alive_before, self._kept_alive = self._kept_alive, {}
        try:
            with gc_disabled():
                try:
                    self._call("cudaStreamBeginCapture", self.handle, mode)
                    self.is_capturing = True
                    enqueue()
                finally:
                    self.is_capturing = False
                    # Also after an error: until the capture ends, the stream runs nothing.
                    error, found = cuda.cudaStreamEndCapture(self.handle)
                    # An invalid capture has a null graph, which must not be destroyed.
                    captured = found if error == cuda.cudaError_t.cudaSuccess else None
            self._check("cudaStreamEndCapture", error)
            return self._instantiate(captured, tuple(self._kept_alive.values()))
        finally:
            self._kept_alive = kept_alive_before
            if captured is not None:
                cuda.cudaGraphDestroy(captured)

    def _instantiate(self, captured: Any, used: tuple[object, ...]) -> "Graph":
        free_before = self._free_bytes()
        executable = self._call("cudaGraphInstantiate", captured, 0)
        owned = _OwnedHandle(self._cuda.cudaGraphExecDestroy, executable)
        # Here and not at the first launch, so that the memory it takes is measured.
        self._call("cudaGraphUpload", executable, self.handle)
        self._call("cudaStreamSynchronize", self.handle)
        # An estimate: other processes may allocate and free memory meanwhile.
        return Graph(executable, max(0, free_before - self._free_bytes()), used, owned)

    def _free_bytes(self) -> int:
        return int(self._call("cudaMemGetInfo"))

    def launch(self, graph: "Graph") -> None:
        """Enqueue the work of a graph."""
        self.keep_alive(graph)
        self._call("cudaGraphLaunch", graph.executable, self.handle)

    def synchronize(self) -> None:
        """Wait until all work enqueued before has run, and release the objects kept alive for it."""
        self._call("cudaStreamSynchronize", self.handle)
        self._kept_alive.clear()
        for chunk in self._ring:
            chunk.used = 0

    def limit_run_ahead(self) -> None:
        """Wait until all work enqueued before the previous call has run; the first call returns at once."""
        if not self._run_ahead_events:
            self._run_ahead_events = (self._new_event(), self._new_event())
        previous, current = self._run_ahead_events
        self._call("cudaEventRecord", current.handle, self.handle)
        self._call("cudaEventSynchronize", previous.handle)
        self._run_ahead_events = (current, previous)

    def _new_event(self) -> "_Event":
        event = self._call("cudaEventCreateWithFlags", self._cuda.cudaEventDisableTiming)
        return _Event(event, _OwnedHandle(self._cuda.cudaEventDestroy, event))

    def keep_alive(self, used: object) -> None:
        """Keep an object that enqueued work uses alive until `synchronize`."""
        self._kept_alive[id(used)] = used

    def _copy(self, to: int, source: int, size: int, kind: str) -> None:
        self._call("cudaMemcpyAsync", to, source, size, getattr(self._cuda.cudaMemcpyKind, kind), self.handle)

    def _call(self, name: str, *arguments: object, detail: str = "") -> Any:
        """Call a CUDA function by its name; returns its value, if it has one besides the error."""
        try:
            error, *values = getattr(self._cuda, name)(*arguments)
        except RuntimeError as problem:  # raised by cuda-bindings if the driver is missing or lacks a function
            raise MomaError(f"{name}{detail} failed: {one_line(problem)}") from None
        self._check(f"{name}{detail}", error)
        return values[0] if values else None

    def _check(self, what: str, error: Any) -> None:
        if error != self._cuda.cudaError_t.cudaSuccess:
            advice = f"; {_ADVICE[error.name]}" if error.name in _ADVICE else ""
            kind = OutOfMemory if error == self._cuda.cudaError_t.cudaErrorMemoryAllocation else MomaError
            raise kind(f"{what} failed: {error.name}{advice}")


class _Chunk:
    """Page-locked host memory; work on the stream may use its first `used` bytes."""

    def __init__(self, address: int, event: "_Event", owned: "_OwnedHandle") -> None:
        self.event = event
        self.used = 0
        self._owned = owned
        self._bytes = np.ctypeslib.as_array((ctypes.c_ubyte * _CHUNK_BYTES).from_address(address))

    @property
    def remaining(self) -> int:
        return _CHUNK_BYTES - self.used

    def take(self, dtype: np.dtype[Any], count: int) -> Array:
        """Return memory for `count` numbers, or for as many as still fit."""
        size = min(count, self.remaining // dtype.itemsize) * dtype.itemsize
        taken: Array = self._bytes[self.used : self.used + size].view(dtype)
        self.used += -(-size // ALIGNMENT) * ALIGNMENT
        return taken


@dataclass(frozen=True, eq=False)
class _Event:
    """A CUDA event: a point of a stream that the host can wait for."""

    handle: Any
    _owned: "_OwnedHandle"


class _OwnedHandle:
    """Frees a CUDA handle when it is collected itself."""

    def __init__(self, free: Any, handle: Any) -> None:
        # Errors are ignored here: the next call reports whatever is wrong with the device.
        _finalize(self, free, handle)


@dataclass(frozen=True, eq=False)
class Graph:
    """An executable graph and its approximate device memory in bytes. It keeps alive what its work uses."""

    executable: Any
    size: int
    _used: tuple[object, ...]
    _owned: _OwnedHandle


def _destroy_stream(cuda: Any, stream: Any) -> None:
    # Wait before the objects that its work uses are freed.
    cuda.cudaStreamSynchronize(stream)
    cuda.cudaStreamDestroy(stream)


def _try_synchronize(stream: Stream) -> None:
    with contextlib.suppress(MomaError):
        stream.synchronize()


def _finalize(owner: object, call: Any, *arguments: object) -> None:
    finalizer = weakref.finalize(owner, call, *arguments)
    # When the process ends, the driver frees everything, and the CUDA runtime may already be shut down.
    finalizer.atexit = False
