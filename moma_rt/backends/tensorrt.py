"""The backend of TensorRT and TensorRT-RTX: engines that run one after the other on one stream of a GPU."""

import mmap
import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moma_rt.backends.base import Array, Buffer, check_tensors
from moma_rt.backends.cuda import DeviceMemory, Graph, Stream
from moma_rt.backends.device_buffers import DeviceBackend, DeviceBuffer, as_device_buffer
from moma_rt.backends.jit import JitCache, is_capturable, load_jit_cache
from moma_rt.backends.libraries import library, library_log
from moma_rt.bundle.engines import Flavour
from moma_rt.bundle.footprint import GENERATION_NETWORKS
from moma_rt.bundle.specs import NetworkSpec
from moma_rt.errors import BundleError, MomaError, OutOfMemory

# In the out of memory errors of the libraries.
_OUT_OF_MEMORY = re.compile("out ?of ?memory", re.IGNORECASE)
# NumPy's names of TensorRT's dtypes.
_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT64": "int64",
    "INT32": "int32",
    "INT8": "int8",
    "UINT8": "uint8",
    "BOOL": "bool",
}


class Scratch:
    """Device memory for activations: one region for all networks, as large as the largest of them needs.

    They can share it because they run one after the other. It grows when a network needs more.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._memory: DeviceMemory | None = None

    @property
    def region(self) -> tuple[int, int] | None:
        """Its address and size; None before the first `reserve`."""
        return None if self._memory is None else (self._memory.address, self._memory.size)

    def release(self) -> None:
        """Free the region; the next `reserve` allocates as much as it needs."""
        self._stream.synchronize()
        self._memory = None

    def reserve(self, size: int) -> tuple[int, int]:
        """Return the address and size of at least `size` bytes; an earlier region may be freed.

        Raises:
            OutOfMemory: the device has too little memory left. The next call allocates again, for its own size.
        """
        if self._memory is None or self._memory.size < size:
            # Waits for work in the old region, and frees it before the new one is allocated.
            self.release()
            self._memory = self._stream.allocate(size)
        return self._memory.address, self._memory.size


@dataclass(frozen=True, eq=False)
class _Shared:
    """State that all networks of a backend share. `library` names the flavour and its version."""

    trt: Any
    flavour: Flavour
    library: str
    log: Any
    stream: Stream
    scratch: Scratch
    unsaved: list[JitCache]
    networks: "weakref.WeakSet[TrtNetwork]"

    def save(self) -> None:
        """Save the kernels that were compiled for finished runs; call it after the stream is synchronized."""
        while self.unsaved:
            self.unsaved.pop().save()

    def reason(self) -> str:
        """The library's first error since `log.begin()`."""
        return str(self.log.error) or "it did not say why"


class TrtBound:
    """An execution context with its shapes and addresses set. It keeps the buffers alive; the context does not."""

    def __init__(self, loaded: "TrtNetwork", context: Any, buffers: tuple[DeviceBuffer, ...]) -> None:
        self._loaded = loaded
        self._context = context
        self._buffers = buffers
        self._has_run = False
        self._is_capturable = True
        self._scratch_bytes = int(context.update_device_memory_size_for_shapes())
        self._scratch: tuple[int, int] | None = None
        # Here and not at the first run, so that a lack of memory is reported before a generation starts.
        loaded.shared.scratch.reserve(self._scratch_bytes)
        weakref.finalize(self, _return_context, loaded.idle, context)

    def enqueue(self) -> None:
        shared, context = self._loaded.shared, self._context
        scratch = shared.scratch.reserve(self._scratch_bytes)
        if scratch != self._scratch:
            context.set_device_memory(*scratch)
            self._scratch = scratch
        if shared.stream.is_capturing and not self._is_capturable:
            raise MomaError(f"{self._loaded.spec.name}: {shared.library} cannot capture it")
        shared.log.begin()
        shared.stream.keep_alive(self)
        if not context.execute_async_v3(shared.stream.handle):
            # The first run loads code, which needs memory.
            kind = OutOfMemory if _OUT_OF_MEMORY.search(shared.reason()) else MomaError
            raise kind(f"{self._loaded.spec.name}: {shared.library} cannot run it: {shared.reason()}")
        if self._has_run:
            return
        self._has_run = True
        self._is_capturable = is_capturable(shared.flavour, context, shared.stream.handle)
        if self._loaded.jit is not None:
            shared.unsaved.append(self._loaded.jit)


@dataclass(frozen=True, eq=False)
class TrtNetwork:
    """A loaded engine and the spec of its network.

    Creating a context takes milliseconds, so one that is no longer bound is kept in `idle` and reused.
    """

    spec: NetworkSpec
    engine: Any
    shared: _Shared
    jit: JitCache | None
    idle: list[Any] = field(default_factory=list)

    def bind(self, buffers: Mapping[str, Buffer]) -> TrtBound:
        """Bind a buffer to every input and output by name; extra names are ignored. No two may overlap.

        Raises:
            BundleError: the engine does not accept buffers of these shapes.
            OutOfMemory: the device has too little memory left.
        """
        shared, spec, trt = self.shared, self.spec, self.shared.trt
        own = {tensor.name: as_device_buffer(buffers[tensor.name]) for tensor in (*spec.inputs, *spec.outputs)}
        shared.log.begin()
        user_managed = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self.idle:
            context = self.idle.pop()
        else:
            context = self.engine.create_execution_context(
                user_managed if self.jit is None else self.jit.runtime_config
            )
        if context is None:
            raise OutOfMemory(f"{spec.name}: {shared.library} has too little memory to run it: {shared.reason()}")
        for tensor in spec.inputs:
            shape = own[tensor.name].shape
            if tensor.dynamic_axes and not context.set_input_shape(tensor.name, shape):
                raise BundleError(
                    f"{spec.name}: its engine does not accept {tensor.name} of shape {list(shape)}: {shared.reason()}"
                )
        for name, buffer in own.items():
            if not context.set_tensor_address(name, buffer.memory.address):
                raise BundleError(f"{spec.name}: its engine does not accept the address of {name}: {shared.reason()}")
        return TrtBound(self, context, tuple(own.values()))


@dataclass(frozen=True, eq=False)
class TrtGraph:
    """A CUDA graph, and the scratch region whose address it contains."""

    stream: Stream
    graph: Graph
    scratch: Scratch
    region: tuple[int, int] | None

    @property
    def is_valid(self) -> bool:
        return self.scratch.region == self.region

    @property
    def size(self) -> int:
        return self.graph.size

    def replay(self) -> None:
        self.stream.launch(self.graph)


class TensorRtBackend(DeviceBackend):
    """Runs the engines of one flavour on the first GPU.

    Raises:
        InputError: the flavour's package or cuda-bindings is not installed, or cannot be loaded.
        MomaError: CUDA or the library cannot use the device.
    """

    supports_capture = True

    def __init__(self, flavour: Flavour) -> None:
        trt, log = library(flavour), library_log(flavour)
        self.name = flavour.value
        stream = Stream()
        super().__init__(stream)
        self._shared = _Shared(
            trt, flavour, f"{flavour.value} {trt.__version__}", log, stream, Scratch(stream), [], weakref.WeakSet()
        )
        log.begin()
        try:
            self._runtime = trt.Runtime(log)
        except (TypeError, RuntimeError):  # raised by the bindings if the library returns null
            raise MomaError(f"{self._shared.library} cannot use this GPU: {self._shared.reason()}") from None

    def load(self, spec: NetworkSpec, path: Path, weights: Sequence[Path] = ()) -> TrtNetwork:
        """Load an engine. `weights` is not used, because an engine contains its weights."""
        shared = self._shared
        shared.log.begin()
        with path.open("rb") as file:
            try:
                content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except ValueError:
                raise BundleError(f"{path} is not an engine: it is empty") from None
        # Memory-mapped: an engine may be as large as the memory that a Jetson's CPU and GPU share.
        with content:
            engine = self._runtime.deserialize_cuda_engine(content)
        if engine is None:
            kind = OutOfMemory if _OUT_OF_MEMORY.search(shared.reason()) else BundleError
            raise kind(f"{path}: {shared.library} cannot load it: {shared.reason()}")
        found = _tensors(shared.trt, engine)
        for what, specs in (("inputs", spec.inputs), ("outputs", spec.outputs)):
            check_tensors(path, what, [f"{t.name} {t.dtype}" for t in specs], found[what])
        jit = load_jit_cache(shared.flavour, shared.trt, engine, path, is_captured=spec.name in GENERATION_NETWORKS)
        loaded = TrtNetwork(spec, engine, shared, jit)
        shared.networks.add(loaded)
        return loaded

    def download(self, buffer: Buffer) -> Array:
        found = super().download(buffer)
        self._shared.save()
        return found

    def capture(self, enqueue: Callable[[], None]) -> TrtGraph | None:
        shared = self._shared
        try:
            graph = shared.stream.capture(enqueue)
        except OutOfMemory:
            raise
        except MomaError:
            # The caller enqueues the work instead, which runs it or raises its error.
            return None
        return TrtGraph(shared.stream, graph, shared.scratch, shared.scratch.region)

    def trim(self) -> None:
        self._shared.scratch.release()
        for loaded in self._shared.networks:
            loaded.idle.clear()
        self._shared.save()

    def synchronize(self) -> None:
        super().synchronize()
        self._shared.save()


def _return_context(idle: list[Any], context: Any) -> None:
    """Keep a context for the next `bind`, unless another one is kept already."""
    if not idle:
        idle.append(context)


def _tensors(trt: Any, engine: Any) -> dict[str, list[str]]:
    """Names and dtypes of an engine's inputs and outputs."""
    found: dict[str, list[str]] = {"inputs": [], "outputs": []}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        dtype = engine.get_tensor_dtype(name).name
        what = "inputs" if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT else "outputs"
        found[what].append(f"{name} {_DTYPES.get(dtype, dtype)}")
    return found
