"""One stream of the first GPU, and memory of that GPU: what running engines needs of the CUDA runtime."""

import weakref
from collections.abc import Callable
from typing import Any

from moma_rt.backends.base import Array
from moma_rt.errors import MomaError, OutOfMemory
from moma_rt.libraries import CUDA_PIP_NAME, cuda_runtime
from moma_rt.messages import one_line

# What TensorRT asks of every address, and no more than cudaMalloc promises of all its own.
_ALIGNMENT = 256
# Keeping the host's copy alive costs its memory, waiting costs time: below this size a copy is kept, from it on waited
# for. The rows and noise that are uploaded between steps, where waiting would leave the device idle, are smaller.
_KEPT_BYTES = 1 << 20
_ADVICE = {
    "cudaErrorMemoryAllocation": "end what else runs on the GPU, or make fewer pictures at a time",
    "cudaErrorInsufficientDriver": f"{CUDA_PIP_NAME} is newer than the driver: update that, or install an older one",
}


class DeviceMemory:
    """`size` bytes at `address`, freed with this object."""

    def __init__(self, cuda: Any, address: int, size: int) -> None:
        self.address = address
        self.size = size
        # Whatever is wrong with the device is said by the next call that can raise.
        _when_gone(self, cuda.cudaFree, address)


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
        _when_gone(self, _end, self._cuda, stream)

    def allocate(self, size: int) -> DeviceMemory:
        """Memory of at least `size` bytes, aligned to 256, of unknown content; even of 0 bytes it has an address.

        Raises:
            OutOfMemory: there is not so much left. Nothing else changed.
        """
        size = max(size, _ALIGNMENT)
        return DeviceMemory(self._cuda, int(self._call("cudaMalloc", size, of=f" of {size} bytes")), size)

    def clear(self, memory: DeviceMemory) -> None:
        """Fill memory with zeros."""
        self.keep(memory)
        self._call("cudaMemsetAsync", memory.address, 0, memory.size, self.handle)

    def copy_in(self, memory: DeviceMemory, host: Array, offset: int = 0) -> None:
        """Copy a contiguous array, which must not change any more, into `memory` from byte `offset` on."""
        self.keep(memory)
        self.keep(host)
        self._copy(memory.address + offset, host.ctypes.data, host.nbytes, "cudaMemcpyHostToDevice")
        if host.nbytes >= _KEPT_BYTES:
            self.synchronize()

    def copy_within(self, to: DeviceMemory, source: DeviceMemory, size: int, offset: int) -> None:
        """Copy `size` bytes of `source`, from byte `offset` on, to the beginning of `to`."""
        self.keep(to)
        self.keep(source)
        self._copy(to.address, source.address + offset, size, "cudaMemcpyDeviceToDevice")

    def copy_out(self, host: Array, memory: DeviceMemory) -> None:
        """Fill a contiguous array from the beginning of `memory`; returns when that is done."""
        self.keep(memory)
        self._copy(host.ctypes.data, memory.address, host.nbytes, "cudaMemcpyDeviceToHost")
        self.synchronize()

    def capture(self, enqueue: Callable[[], None]) -> "Graph":
        """What `enqueue` puts on the stream, which is not run, as a graph. Host memory must have no part in it.

        Raises:
            MomaError: something in it cannot be captured, or `enqueue` raised it. The stream is as before.
        """
        cuda, captured = self._cuda, None
        mode = cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        kept_before, self._kept = self._kept, {}
        try:
            try:
                self._call("cudaStreamBeginCapture", self.handle, mode)
                enqueue()
            finally:
                # Whatever happened: until then the stream runs nothing.
                error, captured = cuda.cudaStreamEndCapture(self.handle)
            self._check("cudaStreamEndCapture", error)
            executable = self._call("cudaGraphInstantiate", captured, 0)
            return Graph(cuda, executable, tuple(self._kept.values()))
        finally:
            self._kept = kept_before
            if captured:
                cuda.cudaGraphDestroy(captured)

    def launch(self, graph: "Graph") -> None:
        """Put the work of a graph on the stream."""
        self.keep(graph)
        self._call("cudaGraphLaunch", graph.executable, self.handle)

    def synchronize(self) -> None:
        """Wait for everything that was put on the stream, and let go of what was kept for it."""
        self._call("cudaStreamSynchronize", self.handle)
        self._kept.clear()

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


class Graph:
    """Work that was captured from a stream. What it uses lives as long as this object."""

    def __init__(self, cuda: Any, executable: Any, used: tuple[object, ...]) -> None:
        self.executable = executable
        self._used = used
        _when_gone(self, cuda.cudaGraphExecDestroy, executable)


def _end(cuda: Any, stream: Any) -> None:
    # Before what was kept for it goes.
    cuda.cudaStreamSynchronize(stream)
    cuda.cudaStreamDestroy(stream)


def _when_gone(owner: object, call: Any, *arguments: object) -> None:
    finalizer = weakref.finalize(owner, call, *arguments)
    # At the process's end the driver takes back everything, and by then its runtime may not answer any more.
    finalizer.atexit = False
