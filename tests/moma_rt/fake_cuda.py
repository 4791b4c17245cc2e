"""The device of `fake_gpu`: a stand-in for the module of the CUDA runtime."""

import ctypes
import enum
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import numpy as np

ALIGNMENT = 256
STREAM = 0x5EED
POISON = 0xFF
GRAPH_NODE_BYTES = 64
# Truthy, like any other handle.
NULL_GRAPH = object()


class CudaError(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorIllegalState = 401
    cudaErrorIllegalAddress = 700


@dataclass
class Work:
    """Work enqueued on the stream, and the allocations it uses."""

    run: Callable[[], None]
    uses: set[int]


class FakeCuda(ModuleType):
    """`cuda.bindings.runtime`: one stream, and `capacity` bytes of memory.

    A function named in `failures` fails once, with that error. `wrong` lists misuse found where an exception would be
    swallowed.
    """

    cudaError_t = CudaError
    cudaMemcpyKind = enum.IntEnum(
        "cudaMemcpyKind",
        {"cudaMemcpyHostToDevice": 1, "cudaMemcpyDeviceToHost": 2, "cudaMemcpyDeviceToDevice": 3},
    )
    cudaStreamCaptureMode = enum.IntEnum("cudaStreamCaptureMode", {"cudaStreamCaptureModeThreadLocal": 1})
    cudaStreamNonBlocking = 1
    cudaHostAllocDefault = 0
    cudaEventDisableTiming = 2

    def __init__(self, capacity: int) -> None:
        super().__init__("cuda.bindings.runtime")
        self.__spec__ = ModuleSpec(self.__name__, None)
        self.capacity = capacity
        self.memory: dict[int, np.ndarray] = {}
        self.queue: list[Work] = []
        self.streams = 0
        self.wrong: list[str] = []
        self.failures: dict[str, CudaError] = {}
        # Work enqueued during a capture. `graphs` holds captured and executable graphs.
        self.captured: list[Work] | None = None
        self.capturing_thread = 0
        self.graphs: dict[int, list[Work]] = {}
        self.uploaded: set[int] = set()
        self.launches = 0
        # Page-locked host memory; and events, each with the work that was on the stream when it was recorded.
        self.pinned: dict[int, np.ndarray] = {}
        self.events: dict[int, list[Work]] = {}
        self.calls = self.waits = self.event_records = self.allocations = 0
        # Bytes copied, by kind.
        self.copied: Counter[str] = Counter()
        self._next = 0x7F00_0000_0000

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if not name.startswith("cuda") or isinstance(value, type | int):
            return value
        self.calls += 1
        if name == "cudaStreamEndCapture":
            return value
        return lambda *arguments: (self.failures.pop(name), None) if name in self.failures else value(*arguments)

    @property
    def used(self) -> int:
        graphs = sum(len(work) for graph, work in self.graphs.items() if graph in self.uploaded)
        return sum(len(memory) for memory in self.memory.values()) + GRAPH_NODE_BYTES * graphs

    def cudaMemGetInfo(self) -> tuple:
        return CudaError.cudaSuccess, self.capacity - self.used, self.capacity

    def cudaHostAlloc(self, size: int, flags: int) -> tuple:
        assert flags == self.cudaHostAllocDefault
        memory = np.full(size, POISON, np.uint8)
        self.pinned[memory.ctypes.data] = memory
        return CudaError.cudaSuccess, memory.ctypes.data

    def cudaFreeHost(self, address: int) -> tuple:
        self.check_not_capturing()
        if self.queue:
            self.wrong.append("page-locked memory was freed while work on the stream may use it")
        del self.pinned[address]
        return (CudaError.cudaSuccess,)

    def cudaEventCreateWithFlags(self, flags: int) -> tuple:
        assert flags == self.cudaEventDisableTiming
        self._next += ALIGNMENT
        self.events[self._next] = []
        return CudaError.cudaSuccess, self._next

    def cudaEventRecord(self, event: int, stream: int) -> tuple:
        assert stream == STREAM
        assert self.captured is None
        self.event_records += 1
        self.events[event] = list(self.queue)
        return (CudaError.cudaSuccess,)

    def cudaEventSynchronize(self, event: int) -> tuple:
        while any(work in self.queue for work in self.events[event]):
            self.queue.pop(0).run()
        return (CudaError.cudaSuccess,)

    def cudaEventDestroy(self, event: int) -> tuple:
        del self.events[event]
        return (CudaError.cudaSuccess,)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple:
        assert flags == self.cudaStreamNonBlocking
        self.streams += 1
        return CudaError.cudaSuccess, STREAM

    def cudaStreamDestroy(self, stream: int) -> tuple:
        self.streams -= 1
        if self.queue:
            self.wrong.append("a stream was destroyed with work on it, whose memory may be freed")
        return (CudaError.cudaSuccess,)

    def cudaStreamSynchronize(self, stream: int) -> tuple:
        assert stream == STREAM
        assert self.captured is None, "a stream may not be synchronized while it is captured"
        self.waits += 1
        while self.queue:
            self.queue.pop(0).run()
        return (CudaError.cudaSuccess,)

    def cudaStreamBeginCapture(self, stream: int, mode: enum.IntEnum) -> tuple:
        assert (stream, mode) == (STREAM, self.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        assert self.captured is None
        self.captured = []
        self.capturing_thread = threading.get_ident()
        return (CudaError.cudaSuccess,)

    def cudaStreamEndCapture(self, stream: int) -> tuple:
        assert stream == STREAM
        captured, self.captured = self.captured, None
        if captured is None:
            return CudaError.cudaErrorIllegalState, NULL_GRAPH
        if "cudaStreamEndCapture" in self.failures:
            # An invalidated capture still ends, without a graph.
            return self.failures.pop("cudaStreamEndCapture"), NULL_GRAPH
        return CudaError.cudaSuccess, self._new_graph(captured)

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple:
        assert flags == 0
        return CudaError.cudaSuccess, self._new_graph(self.graphs[graph])

    def cudaGraphUpload(self, graph: int, stream: int) -> tuple:
        assert stream == STREAM
        if self.used + GRAPH_NODE_BYTES * len(self.graphs[graph]) > self.capacity:
            return (CudaError.cudaErrorMemoryAllocation,)
        self.put(stream, lambda: self.uploaded.add(graph))
        return (CudaError.cudaSuccess,)

    def cudaGraphDestroy(self, graph: int) -> tuple:
        assert graph is not NULL_GRAPH, "a null graph may not be destroyed"
        del self.graphs[graph]
        return (CudaError.cudaSuccess,)

    def cudaGraphExecDestroy(self, graph: int) -> tuple:
        self.uploaded.discard(graph)
        if any(work in self.queue for work in self.graphs.pop(graph)):
            self.wrong.append("a graph was destroyed while it ran")
        return (CudaError.cudaSuccess,)

    def cudaGraphLaunch(self, graph: int, stream: int) -> tuple:
        assert stream == STREAM
        assert self.captured is None
        for work in self.graphs[graph]:
            assert work.uses <= self.memory.keys(), "a graph uses memory that was freed"
        self.queue += self.graphs[graph]
        self.launches += 1
        return (CudaError.cudaSuccess,)

    def _new_graph(self, work: list[Work]) -> int:
        self._next += ALIGNMENT
        self.graphs[self._next] = work
        return self._next

    def cudaMalloc(self, size: int) -> tuple:
        assert self.captured is None, "memory may not be allocated while a stream is captured"
        assert size > 0, "cudaMalloc(0) returns no address"
        self.allocations += 1
        if self.used + size > self.capacity:
            return CudaError.cudaErrorMemoryAllocation, 0
        address = self._next
        self._next += (size // ALIGNMENT + 1) * ALIGNMENT
        self.memory[address] = np.full(size, POISON, np.uint8)
        return CudaError.cudaSuccess, address

    def cudaFree(self, address: int) -> tuple:
        self.check_not_capturing()
        if any(address in work.uses for work in self.queue):
            self.wrong.append("memory was freed while work on the stream uses it")
        if self.memory.pop(address, None) is None:
            self.wrong.append("memory was freed that is not allocated")
        return (CudaError.cudaSuccess,)

    def cudaMemsetAsync(self, address: int, value: int, size: int, stream: int) -> tuple:
        base, view = self.inside(address, size)
        self.put(stream, lambda: view.fill(value), base)
        return (CudaError.cudaSuccess,)

    def cudaMemcpyAsync(self, to: int, source: int, size: int, kind: enum.IntEnum, stream: int) -> tuple:
        self.copied[kind.name] += size
        if kind == self.cudaMemcpyKind.cudaMemcpyHostToDevice:
            assert self.captured is None, "a graph would read host memory that is gone"
            self.check_pinned(source, size)
            base, view = self.inside(to, size)
            self.put(stream, lambda: ctypes.memmove(view.ctypes.data, source, size), base)
        elif kind == self.cudaMemcpyKind.cudaMemcpyDeviceToHost:
            assert self.captured is None, "a graph would write to host memory that is gone"
            self.check_pinned(to, size)
            base, view = self.inside(source, size)
            self.put(stream, lambda: ctypes.memmove(to, view.ctypes.data, size), base)
        else:
            (base, view), (target, written) = self.inside(source, size), self.inside(to, size)
            self.put(stream, lambda: np.copyto(written, view), base, target)
        return (CudaError.cudaSuccess,)

    def check_not_capturing(self) -> None:
        if self.captured is not None and self.capturing_thread == threading.get_ident():
            self.wrong.append("memory was freed by a thread while it captures a stream, which ends the capture")

    def check_pinned(self, address: int, size: int) -> None:
        bases = [at for at, memory in self.pinned.items() if at <= address and address + size <= at + len(memory)]
        assert bases, "the host would wait for a copy from or to memory that is not page-locked"
        assert (address - bases[0]) % ALIGNMENT == 0, "copies from and to odd addresses are slower"

    def put(self, stream: int, run: Callable[[], object], *addresses: int) -> None:
        assert stream == STREAM, "work belongs on the backend's own stream"
        work = Work(run, set(addresses))
        (self.queue if self.captured is None else self.captured).append(work)

    def inside(self, address: int, size: int) -> tuple[int, np.ndarray]:
        """The base address of the allocation with `size` bytes at `address`, and a view of those bytes."""
        for base, memory in self.memory.items():
            if base <= address and address + size <= base + len(memory):
                return base, memory[address - base : address - base + size]
        raise AssertionError(f"{size} bytes at {address} are not within memory of the device")

    def place(self, address: int, size: int) -> tuple[int, np.ndarray]:
        """Like `inside`, for memory given to a network, which must be aligned."""
        assert address % ALIGNMENT == 0
        return self.inside(address, size)
