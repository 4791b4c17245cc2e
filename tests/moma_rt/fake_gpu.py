"""A fake GPU in NumPy: stand-ins for the Python modules of the CUDA runtime and TensorRT, enough to run engines.

They are as unforgiving as the real ones can be. Enqueued work runs only when the host waits for it. New memory is full
of NaN, and a network leaves NaN in its scratch memory. Undefined behavior is an error: memory or a context that is
freed while work uses it, an invalid address, scratch memory that is too small.
"""

import enum
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import numpy as np

from moma_rt.bundle.footprint import GENERATION_NETWORKS
from moma_rt.bundle.specs import NetworkSpec
from moma_rt.memory.networks import sizes_of
from tests.moma_rt.fake_cuda import POISON, STREAM, FakeCuda
from tests.moma_rt.fake_jit import RuntimeCache, RuntimeConfig

Function = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


class Logger:
    """`ILogger`."""

    Severity = enum.IntEnum("Severity", ["ERROR", "WARNING", "INFO", "VERBOSE"])


class FakeTensorRt(ModuleType):
    """A TensorRT module of one flavour. `networks` maps an engine file's content to its spec and NumPy function.

    A method named in `refusals` fails once, as TensorRT's methods do: it logs `reason` and returns None or False.
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
        self.reason = "no reason"
        self.contexts: list[weakref.ref[Context]] = []
        self.logger: Logger | None = None

    def Runtime(self, logger: Logger) -> SimpleNamespace:
        assert isinstance(logger, Logger)
        self.logger = logger
        if self.refuses("Runtime"):
            raise TypeError("pybind11::init(): factory function returned nullptr")
        return SimpleNamespace(deserialize_cuda_engine=self.deserialize)

    def deserialize(self, content: object) -> "Engine | None":
        if self.refuses("deserialize_cuda_engine"):
            return None
        # Like the real one, it takes any buffer and keeps no reference to it.
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
        self.logger.log(Logger.Severity.ERROR, f"{method}: Error Code 3\n({self.reason})")
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
            wanted = "EAGER" if self.spec.name in GENERATION_NETWORKS else "LAZY"
            assert strategy.dynamic_shapes_kernel_specialization_strategy.name == wanted
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
        self.ended, self.destroyed = threading.Event(), threading.Event()

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
        assert self.engine.trt.cuda.captured is None, "scratch memory may not change during a capture"
        assert size >= self.update_device_memory_size_for_shapes()
        self.scratch = memory, size

    def is_stream_capturable(self, stream_handle: int) -> bool:
        assert stream_handle == STREAM
        assert self.has_run, "it is not known before the first run"
        assert self.engine.trt.__name__ == "tensorrt_rtx"
        return not self.engine.trt.refuses("is_stream_capturable")

    def execute_async_v3(self, stream_handle: int) -> bool:
        trt, spec = self.engine.trt, self.engine.spec
        if trt.refuses("execute_async_v3"):
            return False
        assert self.scratch is not None, "no scratch memory was set"
        assert self.ended.is_set() or trt.cuda.captured is None, (
            "a context must have finished a run before it is captured"
        )
        self.has_run = True
        inputs = {t.name: np.empty(self.shapes[t.name], t.dtype) for t in spec.inputs}
        sizes = sizes_of(spec, inputs)
        tensors = {t.name: np.empty(t.resolve(**sizes), t.dtype) for t in (*spec.inputs, *spec.outputs)}
        places = {name: trt.cuda.place(self.addresses[name], tensor.nbytes) for name, tensor in tensors.items()}
        views = {name: view for name, (_, view) in places.items()}
        scratch_base, scratch = trt.cuda.place(*self.scratch)
        ended, destroyed, function = self.ended, self.destroyed, self.engine.function
        if self.cache is not None:
            self.cache.compile(repr(sorted(self.shapes.items())))

        def run() -> None:
            if destroyed.is_set():
                trt.cuda.wrong.append("a context was destroyed while it ran")
            ended.set()
            for tensor in spec.inputs:
                tensors[tensor.name].reshape(-1).view(np.uint8)[:] = views[tensor.name]
            found = function({tensor.name: tensors[tensor.name] for tensor in spec.inputs})
            scratch.fill(POISON)
            for tensor in spec.outputs:
                assert found[tensor.name].shape == tensors[tensor.name].shape
                tensors[tensor.name][...] = found[tensor.name]
                views[tensor.name][:] = tensors[tensor.name].reshape(-1).view(np.uint8)

        trt.cuda.put(stream_handle, run, *(base for base, _ in places.values()), scratch_base)
        return True


@dataclass
class FakeGpu:
    cuda: FakeCuda
    trt: FakeTensorRt

    @classmethod
    def install(cls, monkeypatch, networks: Mapping[bytes, tuple], flavour: str = "tensorrt") -> "FakeGpu":
        """Install the stand-ins as modules, with 64 MiB of device memory."""
        cuda = FakeCuda(1 << 26)
        trt = FakeTensorRt(flavour, "11.4.0", cuda, networks)
        monkeypatch.setitem(sys.modules, cuda.__name__, cuda)
        monkeypatch.setitem(sys.modules, flavour, trt)
        return cls(cuda, trt)
