"""A GPU of NumPy: stand-ins for the modules of the CUDA runtime and of TensorRT, as far as running engines needs them.

They are as unforgiving as the real ones may be. What is put on the stream runs when somebody waits for it, and not
before; new memory is full of NaN, and so is what a network leaves in its scratch region. Whatever would be undefined
behaviour is an error: memory or a context that goes while work uses it, an address that is none, a scratch region that
is too small.
"""

import ctypes
import enum
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from moma_rt.networks import sizes_of
from moma_rt.specs import NetworkSpec
from tests.moma_rt.fake_jit import RuntimeCache, RuntimeConfig

ALIGNMENT = 256
STREAM = 0x5EED
POISON = 0xFF
Function = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


class CudaError(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorIllegalState = 401
    cudaErrorIllegalAddress = 700


@dataclass
class Work:
    """Something on the stream, and the allocations it uses."""

    run: Callable[[], None]
    uses: set[int]


class FakeCuda(ModuleType):
    """`cuda.bindings.runtime`: one stream, and `capacity` bytes of memory.

    A function that is in `failures` fails once, with that error. `wrong` collects what was wrong where an exception
    would be swallowed.
    """

    cudaError_t = CudaError
    cudaMemcpyKind = enum.IntEnum(
        "cudaMemcpyKind",
        {"cudaMemcpyHostToDevice": 1, "cudaMemcpyDeviceToHost": 2, "cudaMemcpyDeviceToDevice": 3},
    )
    cudaStreamCaptureMode = enum.IntEnum("cudaStreamCaptureMode", {"cudaStreamCaptureModeThreadLocal": 1})
    cudaStreamNonBlocking = 1

    def __init__(self, capacity: int) -> None:
        super().__init__("cuda.bindings.runtime")
        self.__spec__ = ModuleSpec(self.__name__, None)
        self.capacity = capacity
        self.memory: dict[int, np.ndarray] = {}
        self.queue: list[Work] = []
        self.streams = 0
        self.wrong: list[str] = []
        self.failures: dict[str, CudaError] = {}
        # What is put on the stream goes here while it is captured. Graphs are captured ones, or executable ones.
        self.captured: list[Work] | None = None
        self.graphs: dict[int, list[Work]] = {}
        self.launches = 0
        self._next = 0x7F00_0000_0000

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if not name.startswith("cuda") or isinstance(value, type | int) or name == "cudaStreamEndCapture":
            return value
        return lambda *arguments: (self.failures.pop(name), None) if name in self.failures else value(*arguments)

    @property
    def used(self) -> int:
        return sum(len(memory) for memory in self.memory.values())

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple:
        assert flags == self.cudaStreamNonBlocking
        self.streams += 1
        return CudaError.cudaSuccess, STREAM

    def cudaStreamDestroy(self, stream: int) -> tuple:
        self.streams -= 1
        if self.queue:
            self.wrong.append("a stream was destroyed with work on it, and what this used may be gone")
        return (CudaError.cudaSuccess,)

    def cudaStreamSynchronize(self, stream: int) -> tuple:
        assert stream == STREAM
        assert self.captured is None, "nobody may wait for a stream while it is captured"
        while self.queue:
            self.queue.pop(0).run()
        return (CudaError.cudaSuccess,)

    def cudaStreamBeginCapture(self, stream: int, mode: enum.IntEnum) -> tuple:
        assert (stream, mode) == (STREAM, self.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        assert self.captured is None
        self.captured = []
        return (CudaError.cudaSuccess,)

    def cudaStreamEndCapture(self, stream: int) -> tuple:
        assert stream == STREAM
        captured, self.captured = self.captured, None
        if captured is None:
            return CudaError.cudaErrorIllegalState, 0
        if "cudaStreamEndCapture" in self.failures:
            # A capture that was invalidated ends all the same, without a graph.
            return self.failures.pop("cudaStreamEndCapture"), 0
        return CudaError.cudaSuccess, self._new_graph(captured)

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple:
        assert flags == 0
        return CudaError.cudaSuccess, self._new_graph(self.graphs[graph])

    def cudaGraphDestroy(self, graph: int) -> tuple:
        del self.graphs[graph]
        return (CudaError.cudaSuccess,)

    def cudaGraphExecDestroy(self, graph: int) -> tuple:
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
        if self.used + size > self.capacity:
            return CudaError.cudaErrorMemoryAllocation, 0
        address = self._next
        self._next += (size // ALIGNMENT + 1) * ALIGNMENT
        self.memory[address] = np.full(size, POISON, np.uint8)
        return CudaError.cudaSuccess, address

    def cudaFree(self, address: int) -> tuple:
        if any(address in work.uses for work in self.queue):
            self.wrong.append("memory was freed while work on the stream uses it")
        if self.memory.pop(address, None) is None:
            self.wrong.append("memory was freed that is not allocated")
        return (CudaError.cudaSuccess,)

    def cudaMemsetAsync(self, address: int, value: int, size: int, stream: int) -> tuple:
        view = self.view(address, size)
        self.put(stream, lambda: view.fill(value), address)
        return (CudaError.cudaSuccess,)

    def cudaMemcpyAsync(self, to: int, source: int, size: int, kind: int, stream: int) -> tuple:
        if kind == self.cudaMemcpyKind.cudaMemcpyHostToDevice:
            assert self.captured is None, "a graph would read host memory that is gone"
            base, view = self.inside(to, size)
            self.put(stream, lambda: ctypes.memmove(view.ctypes.data, source, size), base)
        elif kind == self.cudaMemcpyKind.cudaMemcpyDeviceToHost:
            assert self.captured is None, "a graph would write to host memory that is gone"
            base, view = self.inside(source, size)
            self.put(stream, lambda: ctypes.memmove(to, view.ctypes.data, size), base)
        else:
            (base, view), (target, written) = self.inside(source, size), self.inside(to, size)
            self.put(stream, lambda: np.copyto(written, view), base, target)
        return (CudaError.cudaSuccess,)

    def put(self, stream: int, run: Callable[[], object], *addresses: int) -> None:
        assert stream == STREAM, "work belongs on the backend's own stream"
        work = Work(run, set(addresses))
        (self.queue if self.captured is None else self.captured).append(work)

    def inside(self, address: int, size: int) -> tuple[int, np.ndarray]:
        """The allocation that holds so many bytes from an address on, and those bytes."""
        for base, memory in self.memory.items():
            if base <= address and address + size <= base + len(memory):
                return base, memory[address - base : address - base + size]
        raise AssertionError(f"{size} bytes at {address} are not within memory of the device")

    def view(self, address: int, size: int) -> np.ndarray:
        assert address % ALIGNMENT == 0
        assert address in self.memory, f"{address} is not the address of memory of the device"
        assert size <= len(self.memory[address]), "the memory is too small"
        return self.memory[address][:size]


class Logger:
    """`ILogger`."""

    Severity = enum.IntEnum("Severity", ["ERROR", "WARNING", "INFO", "VERBOSE"])


class FakeTensorRt(ModuleType):
    """The module of a flavour. `networks` says, by a file's content, of which network that is an engine.

    A method that is in `refusals` fails once, as such methods do: it logs and returns None or False.
    """

    ILogger = Logger
    ExecutionContextAllocationStrategy = enum.Enum("ExecutionContextAllocationStrategy", ["STATIC", "USER_MANAGED"])
    TensorIOMode = enum.Enum("TensorIOMode", ["NONE", "INPUT", "OUTPUT"])
    DynamicShapesKernelSpecializationStrategy = enum.Enum(
        "DynamicShapesKernelSpecializationStrategy", ["LAZY", "EAGER", "NONE"]
    )

    def __init__(self, name: str, version: str, cuda: FakeCuda, networks: Mapping[bytes, tuple]) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)
        self.__version__ = version
        self.cuda = cuda
        self.networks = networks
        self.refusals: set[str] = set()
        self.contexts: list[weakref.ref[Context]] = []
        self.logger: Logger | None = None

    def Runtime(self, logger: Logger) -> SimpleNamespace:
        assert isinstance(logger, Logger)
        self.logger = logger
        if self.refuses("Runtime"):
            raise TypeError("pybind11::init(): factory function returned nullptr")
        return SimpleNamespace(deserialize_cuda_engine=self.deserialize)

    def deserialize(self, content: object) -> "Engine | None":
        # As the real one, which takes any buffer and keeps none.
        found = self.networks.get(bytes(memoryview(content)))
        if found is None:
            self.logger.log(Logger.Severity.INFO, "Loaded engine size: 0 MiB")
            self.logger.log(
                Logger.Severity.ERROR, "IRuntime::deserializeCudaEngine: Error Code 1: Serialization\n(magic)"
            )
            self.logger.log(Logger.Severity.ERROR, "a consequence of it")
            return None
        return Engine(self, *found)

    def refuses(self, method: str) -> bool:
        if method not in self.refusals:
            return False
        self.refusals.remove(method)
        self.logger.log(Logger.Severity.ERROR, f"{method}: Error Code 3\n(no reason)")
        return True


class Engine:
    """`ICudaEngine`."""

    DTYPES = dict(
        float32="FLOAT", float16="HALF", int64="INT64", int32="INT32", int8="INT8", uint8="UINT8", bool="BOOL"
    )

    def __init__(self, trt: FakeTensorRt, spec: NetworkSpec, function: Function) -> None:
        self.trt, self.spec, self.function = trt, spec, function
        self.num_io_tensors = len(spec.inputs) + len(spec.outputs)

    def get_tensor_name(self, index: int) -> str:
        return (*self.spec.inputs, *self.spec.outputs)[index].name

    def get_tensor_mode(self, name: str) -> enum.Enum:
        is_input = name in {tensor.name for tensor in self.spec.inputs}
        return self.trt.TensorIOMode.INPUT if is_input else self.trt.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name=self.DTYPES[self.spec.tensor(name).dtype])

    def create_runtime_config(self) -> RuntimeConfig:
        assert self.trt.__name__ == "tensorrt_rtx", "TensorRT itself compiles ahead of time"
        return RuntimeConfig()

    def create_execution_context(self, strategy: enum.Enum | RuntimeConfig) -> "Context | None":
        user_managed = self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if isinstance(strategy, RuntimeConfig):
            assert strategy.strategy is user_managed
            assert strategy.dynamic_shapes_kernel_specialization_strategy.name == "EAGER"
        else:
            assert strategy is user_managed
        if self.trt.refuses("create_execution_context"):
            return None
        context = Context(self, strategy.cache if isinstance(strategy, RuntimeConfig) else None)
        self.trt.contexts.append(weakref.ref(context))
        return context


class Context:
    """`IExecutionContext`."""

    def __init__(self, engine: Engine, cache: RuntimeCache | None) -> None:
        self.engine = engine
        self.cache = cache
        inputs = engine.spec.inputs
        self.shapes = {t.name: t.resolve() for t in inputs if not t.dynamic_axes}
        self.addresses: dict[str, int] = {}
        self.scratch: tuple[int, int] | None = None
        self.has_run = False
        self.destroyed = threading.Event()

    def __del__(self) -> None:
        self.destroyed.set()

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        spec = self.engine.spec.tensor(name)
        assert spec.dynamic_axes
        within = all(dim.min <= shape[axis] <= dim.max for axis, dim in spec.dynamic_axes.items())
        self.shapes[name] = shape
        return within and not self.engine.trt.refuses("set_input_shape")

    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert memory, "an address may not be null, even that of an empty tensor"
        self.addresses[name] = memory
        return not self.engine.trt.refuses("set_tensor_address")

    def update_device_memory_size_for_shapes(self) -> int:
        """Twice the inputs' elements; 0 if not all shapes are set."""
        if self.shapes.keys() != {tensor.name for tensor in self.engine.spec.inputs}:
            return 0
        return 2 * sum(int(np.prod(shape)) for shape in self.shapes.values())

    def set_device_memory(self, memory: int, size: int) -> None:
        assert self.engine.trt.cuda.captured is None, "what a graph computes in is not to change while it is captured"
        assert size >= self.update_device_memory_size_for_shapes()
        self.scratch = memory, size

    def execute_async_v3(self, stream_handle: int) -> bool:
        trt, spec = self.engine.trt, self.engine.spec
        if trt.refuses("execute_async_v3"):
            return False
        assert self.scratch is not None, "no memory to compute in"
        assert self.has_run or trt.cuda.captured is None, "what runs for the first time cannot be captured"
        self.has_run = True
        inputs = {t.name: np.empty(self.shapes[t.name], t.dtype) for t in spec.inputs}
        sizes = sizes_of(spec, inputs)
        tensors = {t.name: np.empty(t.resolve(**sizes), t.dtype) for t in (*spec.inputs, *spec.outputs)}
        views = {name: trt.cuda.view(self.addresses[name], tensor.nbytes) for name, tensor in tensors.items()}
        scratch = trt.cuda.view(*self.scratch)
        destroyed, function = self.destroyed, self.engine.function
        if self.cache is not None:
            self.cache.compile(repr(sorted(self.shapes.items())))

        def run() -> None:
            if destroyed.is_set():
                trt.cuda.wrong.append("a context was destroyed while it ran")
            for tensor in spec.inputs:
                tensors[tensor.name].reshape(-1).view(np.uint8)[:] = views[tensor.name]
            found = function({tensor.name: tensors[tensor.name] for tensor in spec.inputs})
            scratch.fill(POISON)
            for tensor in spec.outputs:
                assert found[tensor.name].shape == tensors[tensor.name].shape
                tensors[tensor.name][...] = found[tensor.name]
                views[tensor.name][:] = tensors[tensor.name].reshape(-1).view(np.uint8)

        trt.cuda.put(stream_handle, run, *self.addresses.values(), self.scratch[0])
        return True


@dataclass
class FakeGpu:
    cuda: FakeCuda
    trt: FakeTensorRt

    @classmethod
    def install(cls, monkeypatch, networks: Mapping[bytes, tuple], flavour: str = "tensorrt") -> "FakeGpu":
        """Make the stand-ins what is imported, with 64 MiB of device memory."""
        cuda = FakeCuda(1 << 26)
        trt = FakeTensorRt(flavour, "11.4.0", cuda, networks)
        monkeypatch.setitem(sys.modules, cuda.__name__, cuda)
        monkeypatch.setitem(sys.modules, flavour, trt)
        return cls(cuda, trt)
