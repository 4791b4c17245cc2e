"""One stream of the first GPU, and memory of that GPU: what running engines needs of the CUDA runtime."""

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

# What TensorRT asks of every address, and no more than cudaMalloc promises of all its own.
ALIGNMENT = 256
# Of page-locked memory. While the device reads one chunk the host fills the next, so large uploads run at the bus's
# speed from a few; a generation's own uploads, without those of a new subject, fit one.
_CHUNK_BYTES, _CHUNKS = 1 << 22, 4
_ADVICE = {
    "cudaErrorMemoryAllocation": "end what else runs on the GPU, or make fewer pictures at a time",
    "cudaErrorInsufficientDriver": f"{CUDA_PIP_NAME} is newer than the driver: update that, or install an older one",
}


@dataclass(frozen=True, eq=False)
class DeviceMemory:
    """`size` bytes at `address`. What they were allocated with is freed when no part of it is left."""

    address: int
    size: int
    _allocation: object

    def part(self, offset: int, size: int) -> "DeviceMemory":
        """`size` of its bytes, from byte `offset` on."""
        assert 0 <= offset <= offset + size <= self.size
        return DeviceMemory(self.address + offset, size, self._allocation)


class Stream:
    """A stream that does not wait for the default one: what is put on it runs in order, while the caller goes on.

    Whoever puts work on it gives it to `keep`: memory and contexts must outlive the work that uses them, and not only
    the call that enqueued it.

    Raises:
        InputError: cuda-bindings is not installed.
        MomaError: CUDA failed. The message of this and every method's names the call and CUDA's name of the error.
    """

    def __init__(self) -> None:
        self._cuda = cuda_runtime()
        stream = self._call("cudaStreamCreateWithFlags", self._cuda.cudaStreamNonBlocking)
        self.handle = int(stream)
        self._kept: dict[int, object] = {}
        self._ring: deque[_Chunk] = deque()
        self.is_capturing = False
        # Of the last call of `limit_run_ahead` and of the one before.
        self._paces: tuple[_Event, ...] = ()
        _when_gone(self, _end, self._cuda, stream)

    def allocate(self, size: int) -> DeviceMemory:
        """Memory of at least `size` bytes, aligned to 256, of unknown content; even of 0 bytes it has an address.

        Raises:
            OutOfMemory: there is not so much left. Nothing else changed.
        """
        size = max(size, ALIGNMENT)
        address = int(self._call("cudaMalloc", size, of=f" of {size} bytes"))
        return DeviceMemory(address, size, _Owned(self._cuda.cudaFree, address))

    def clear(self, memory: DeviceMemory) -> None:
        """Fill memory with zeros."""
        self.keep(memory)
        self._call("cudaMemsetAsync", memory.address, 0, memory.size, self.handle)

    def ends_with(self, owner: object) -> None:
        """Wait when `owner` goes, or the process, and let go of what was kept.

        It may refer to this stream, and such a circle would last until the collector comes by.
        """
        weakref.finalize(owner, _wait, self)

    def copy_in(self, memory: DeviceMemory, array: Array, dtype: np.dtype[Any]) -> None:
        """Copy an array, converted to `dtype`, to the beginning of `memory`. It has been read when this returns."""
        self.keep(memory)
        flat, done = array.reshape(-1), 0
        while done < flat.size:
            piece = self._staged(dtype, flat.size - done)
            np.copyto(piece, flat[done : done + piece.size], casting="same_kind")
            self._copy(
                memory.address + done * dtype.itemsize, piece.ctypes.data, piece.nbytes, "cudaMemcpyHostToDevice"
            )
            done += piece.size

    def copy_within(self, to: DeviceMemory, source: DeviceMemory) -> None:
        """Copy all of `source` to the beginning of `to`."""
        assert source.size <= to.size
        self.keep(to)
        self.keep(source)
        self._copy(to.address, source.address, source.size, "cudaMemcpyDeviceToDevice")

    def copy_out(self, memory: DeviceMemory, dtype: np.dtype[Any], count: int) -> Array:
        """A new array of the first `count` numbers in `memory`; returns when everything enqueued before has run."""
        self.keep(memory)
        found, done = np.empty(count, dtype), 0
        if not count:
            self.synchronize()
        while done < count:
            piece = self._staged(dtype, count - done)
            source = memory.address + done * dtype.itemsize
            self._copy(piece.ctypes.data, source, piece.nbytes, "cudaMemcpyDeviceToHost")
            self.synchronize()
            found[done : done + piece.size] = piece
            done += piece.size
        return found

    def _staged(self, dtype: np.dtype[Any], count: int) -> Array:
        """Page-locked memory for up to `count` numbers and at least one, which nothing on the stream uses any more.

        Only such memory is read and written by a device while the host goes on.
        """
        if not self._ring:
            for _ in range(_CHUNKS):
                self._ring.append(self._new_chunk())
        chunk = self._ring[0]
        if chunk.room < min(count * dtype.itemsize, _CHUNK_BYTES // 2):
            # Everything that uses it is on the stream now.
            self._call("cudaEventRecord", chunk.event.handle, self.handle)
            self._ring.rotate(-1)
            chunk = self._ring[0]
            # One that was never recorded has nothing to wait for.
            self._call("cudaEventSynchronize", chunk.event.handle)
            chunk.used = 0
        return chunk.take(dtype, count)

    def _new_chunk(self) -> "_Chunk":
        event = self._new_event()
        asked = (_CHUNK_BYTES, self._cuda.cudaHostAllocDefault)
        address = int(self._call("cudaHostAlloc", *asked, of=f" of {_CHUNK_BYTES} bytes"))
        return _Chunk(address, event, _Owned(self._cuda.cudaFreeHost, address))

    def capture(self, enqueue: Callable[[], None]) -> "Graph":
        """What `enqueue` puts on the stream, which is not run, as a graph. Host memory must have no part in it.

        Raises:
            MomaError: something in it cannot be captured, or `enqueue` raised it. The stream is as before.
        """
        cuda, captured = self._cuda, None
        mode = cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        kept_before, self._kept = self._kept, {}
        try:
            with gc_disabled():
                try:
                    self._call("cudaStreamBeginCapture", self.handle, mode)
                    self.is_capturing = True
                    enqueue()
                finally:
                    self.is_capturing = False
                    # Whatever happened: until then the stream runs nothing.
                    error, found = cuda.cudaStreamEndCapture(self.handle)
                    # That of an invalid capture is null, which may not be destroyed.
                    captured = found if error == cuda.cudaError_t.cudaSuccess else None
            self._check("cudaStreamEndCapture", error)
            return self._instantiated(captured, tuple(self._kept.values()))
        finally:
            self._kept = kept_before
            if captured is not None:
                cuda.cudaGraphDestroy(captured)

    def _instantiated(self, captured: Any, used: tuple[object, ...]) -> "Graph":
        free_before = self._free_bytes()
        executable = self._call("cudaGraphInstantiate", captured, 0)
        owned = _Owned(self._cuda.cudaGraphExecDestroy, executable)
        # Now, and not when it is launched for the first time.
        self._call("cudaGraphUpload", executable, self.handle)
        self._call("cudaStreamSynchronize", self.handle)
        # Others may have used the device meanwhile, so this is no more than an estimate.
        return Graph(executable, max(0, free_before - self._free_bytes()), used, owned)

    def _free_bytes(self) -> int:
        return int(self._call("cudaMemGetInfo"))

    def launch(self, graph: "Graph") -> None:
        """Put the work of a graph on the stream."""
        self.keep(graph)
        self._call("cudaGraphLaunch", graph.executable, self.handle)

    def synchronize(self) -> None:
        """Wait for everything that was put on the stream, and let go of what was kept for it."""
        self._call("cudaStreamSynchronize", self.handle)
        self._kept.clear()
        for chunk in self._ring:
            chunk.used = 0

    def limit_run_ahead(self) -> None:
        """Wait until everything that was on the stream when this was last called has run."""
        if not self._paces:
            self._paces = (self._new_event(), self._new_event())
        before, now = self._paces
        self._call("cudaEventRecord", now.handle, self.handle)
        self._call("cudaEventSynchronize", before.handle)
        self._paces = (now, before)

    def _new_event(self) -> "_Event":
        event = self._call("cudaEventCreateWithFlags", self._cuda.cudaEventDisableTiming)
        return _Event(event, _Owned(self._cuda.cudaEventDestroy, event))

    def keep(self, used: object) -> None:
        """Keep what work on the stream uses alive until the stream has been waited for."""
        self._kept[id(used)] = used

    def _copy(self, to: int, source: int, size: int, kind: str) -> None:
        self._call("cudaMemcpyAsync", to, source, size, getattr(self._cuda.cudaMemcpyKind, kind), self.handle)

    def _call(self, name: str, *arguments: object, of: str = "") -> Any:
        """Call a function of CUDA by its name; the value it returns beside the error, if any."""
        try:
            error, *values = getattr(self._cuda, name)(*arguments)
        except RuntimeError as problem:  # of the package itself, where the driver is missing or lacks a function
            raise MomaError(f"{name}{of} failed: {one_line(problem)}") from None
        self._check(f"{name}{of}", error)
        return values[0] if values else None

    def _check(self, what: str, error: Any) -> None:
        if error != self._cuda.cudaError_t.cudaSuccess:
            advice = f"; {_ADVICE[error.name]}" if error.name in _ADVICE else ""
            kind = OutOfMemory if error == self._cuda.cudaError_t.cudaErrorMemoryAllocation else MomaError
            raise kind(f"{what} failed: {error.name}{advice}")


class _Chunk:
    """Page-locked memory of the host, of which the first `used` bytes may be used by the stream."""

    def __init__(self, address: int, event: "_Event", owned: "_Owned") -> None:
        self.event = event
        self.used = 0
        self._owned = owned
        self._bytes = np.ctypeslib.as_array((ctypes.c_ubyte * _CHUNK_BYTES).from_address(address))

    @property
    def room(self) -> int:
        return _CHUNK_BYTES - self.used

    def take(self, dtype: np.dtype[Any], count: int) -> Array:
        """As much of the room as `count` numbers need, and there is."""
        size = min(count, self.room // dtype.itemsize) * dtype.itemsize
        taken: Array = self._bytes[self.used : self.used + size].view(dtype)
        self.used += -(-size // ALIGNMENT) * ALIGNMENT
        return taken


@dataclass(frozen=True, eq=False)
class _Event:
    """A point of a stream that the host can wait for."""

    handle: Any
    _owned: "_Owned"


class _Owned:
    """What is freed with this object."""

    def __init__(self, free: Any, handle: Any) -> None:
        # Whatever is wrong with the device is said by the next call that can raise.
        _when_gone(self, free, handle)


@dataclass(frozen=True, eq=False)
class Graph:
    """Captured work, and about how many bytes of the device that takes. What it uses lives as long as this object."""

    executable: Any
    size: int
    _used: tuple[object, ...]
    _owned: _Owned


def _end(cuda: Any, stream: Any) -> None:
    # Before what was kept for it goes.
    cuda.cudaStreamSynchronize(stream)
    cuda.cudaStreamDestroy(stream)


def _wait(stream: Stream) -> None:
    with contextlib.suppress(MomaError):
        stream.synchronize()


def _when_gone(owner: object, call: Any, *arguments: object) -> None:
    finalizer = weakref.finalize(owner, call, *arguments)
    # At the process's end the driver takes back everything, and by then its runtime may not answer any more.
    finalizer.atexit = False
