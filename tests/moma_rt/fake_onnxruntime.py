"""A stand-in for `onnxruntime` with a CUDA provider on a fake GPU: real CPU kernels on device memory, in stream order.

CPU sessions are real ones. A CUDA session allocates its weights on the device, and an arena that grows as runs need it;
the arena is freed when a run's options say so, or with the session. A run is enqueued on the stream, and reads and
writes device memory when the host waits for it. Like the real one, an input that a session wants in host memory is
copied when it is bound.
"""

import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime

import moma_rt.backends.onnxruntime
import moma_rt.backends.onnxruntime_cuda
from tests.moma_rt.fake_cuda import STREAM, CudaError, FakeCuda

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
NVIDIA = 0x10DE
NO_MEMORY = (
    "[ONNXRuntimeError] : 1 : FAIL : /onnxruntime_src/onnxruntime/core/framework/bfc_arena.cc:360 void* onnxruntime::"
    "BFCArena::AllocateRawInternal(size_t, bool, onnxruntime::Stream*) Failed to allocate memory for requested buffer "
    "of size {}\n"
)
# Allowed options of the CUDA provider, all known to ONNX Runtime 1.31, which refuses unknown ones.
OPTIONS = {"user_compute_stream", "arena_extend_strategy"}


# A file's path, or its content.
Graph = str | bytes
WEIGHTS_ROOT = "session.model_external_initializers_file_folder_path"


class FakeOnnxRuntime(ModuleType):
    """The module. Each run or load raises the next of `failures`."""

    __version__ = "1.31.1"
    RunOptions = onnxruntime.RunOptions
    SessionOptions = onnxruntime.SessionOptions
    OrtValue = onnxruntime.OrtValue

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__("onnxruntime")
        self.__spec__ = ModuleSpec("onnxruntime", None)
        self.cuda = cuda
        self.providers = [CUDA, CPU]
        # Whether the CUDA provider's shared libraries can be loaded.
        self.loads_provider = True
        # Inputs that sessions want in host memory, and operators that they run on the CPU.
        self.on_host: set[str] = set()
        self.on_cpu: Sequence[str] = ("Concat", "Squeeze")
        self.runs: list[str] = []
        self.failures: list[Exception] = []

    @classmethod
    def install(cls, monkeypatch: Any, cuda: FakeCuda) -> "FakeOnnxRuntime":
        """Install it and `cuda` as modules."""
        fake = cls(cuda)
        monkeypatch.setitem(sys.modules, cuda.__name__, cuda)
        monkeypatch.setitem(sys.modules, "onnxruntime", fake)
        for module in (moma_rt.backends.onnxruntime, moma_rt.backends.onnxruntime_cuda):
            monkeypatch.setattr(module, "ort", fake)
        return fake

    def get_available_providers(self) -> list[str]:
        return list(self.providers)

    def set_default_logger_severity(self, severity: int) -> None:
        assert severity == 4

    def preload_dlls(self) -> None:
        if not self.loads_provider:
            print("Failed to load libcublasLt.so.13: libcublasLt.so.13: cannot open shared object file\nPlease follow")

    def InferenceSession(
        self, graph: str | bytes, options: Any, *, providers: Sequence[Any], enable_fallback: int
    ) -> Any:
        assert enable_fallback == 0, "a fallback would run on the CPU and print that"
        if providers == [CPU]:
            return onnxruntime.InferenceSession(graph, options, providers=providers)
        ((name, given),) = providers
        assert name == CUDA
        assert given.keys() <= OPTIONS
        assert given["user_compute_stream"] == str(STREAM)
        assert not options.enable_mem_reuse, "with reuse, shapes are overwritten before they are read"
        self.fail()
        # A graph given as bytes has its weights in another file.
        return FakeSession(
            self, graph, options.get_session_config_entry(WEIGHTS_ROOT) if isinstance(graph, bytes) else ""
        )

    def fail(self) -> None:
        if self.failures:
            raise self.failures.pop(0)

    def take(self, size: int) -> int:
        error, address = self.cuda.cudaMalloc(max(size, 1))
        if error != CudaError.cudaSuccess:
            raise RuntimeError(NO_MEMORY.format(size))
        return address


@dataclass
class Arena:
    """A session's device memory: weights, and blocks to compute in. A finalizer frees it after the session."""

    cuda: FakeCuda
    weights: int
    blocks: list[int] = field(default_factory=list)
    size: int = 0

    def shrink(self) -> None:
        while self.blocks:
            self.cuda.cudaFree(self.blocks.pop())
        self.size = 0

    def end(self) -> None:
        self.shrink()
        self.cuda.cudaFree(self.weights)


class FakeSession:
    """A session of the CUDA provider."""

    def __init__(self, module: FakeOnnxRuntime, graph: Graph, weights_root: str) -> None:
        options = onnxruntime.SessionOptions()
        if weights_root:
            options.add_session_config_entry(WEIGHTS_ROOT, weights_root)
        options.log_severity_level, options.intra_op_num_threads = 4, 1
        self.real = onnxruntime.InferenceSession(graph, options, providers=[CPU])
        self.module = module
        self.name = self.real.get_modelmeta().graph_name
        self.arena = Arena(
            module.cuda, module.take(len(graph) if isinstance(graph, bytes) else Path(graph).stat().st_size)
        )
        weakref.finalize(self, self.arena.end)

    def get_providers(self) -> list[str]:
        return [CUDA, CPU] if self.module.loads_provider else [CPU]

    def get_inputs(self) -> list[Any]:
        return self.real.get_inputs()

    def get_outputs(self) -> list[Any]:
        return self.real.get_outputs()

    def get_input_memory_infos(self) -> list[SimpleNamespace]:
        vendors = [0 if tensor.name in self.module.on_host else NVIDIA for tensor in self.get_inputs()]
        return [SimpleNamespace(device_vendor_id=vendor) for vendor in vendors]

    def get_provider_graph_assignment_info(self) -> list[SimpleNamespace]:
        nodes = {CUDA: ("Conv", "MatMul"), CPU: self.module.on_cpu}

        def subgraph(name: str) -> SimpleNamespace:
            return SimpleNamespace(ep_name=name, get_nodes=lambda: [SimpleNamespace(op_type=op) for op in nodes[name]])

        return [subgraph(name) for name in nodes]

    def io_binding(self) -> "FakeBinding":
        return FakeBinding(self)

    def run_with_iobinding(self, binding: "FakeBinding", options: Any) -> None:
        assert binding.session is self
        cuda, arena = self.module.cuda, self.arena
        try:
            if options.terminate:
                raise RuntimeError("Error in execution: Exiting due to terminate flag being set to true.")
            assert options.get_run_config_entry("disable_synchronize_execution_providers") == "1"
            self.module.fail()
            self._reserve(sum(view.nbytes for _, view in binding.places.values()))
            self.module.runs.append(self.name)
            # The work does not reference the session or its binding: the caller must keep them alive.
            uses = [base for base, _ in binding.places.values()]
            cuda.put(STREAM, binding.work(self.real), *uses, *arena.blocks, arena.weights)
        finally:
            if "gpu:0" in _entry(options, "memory.enable_memory_arena_shrinkage"):
                arena.shrink()

    def _reserve(self, size: int) -> None:
        if size > self.arena.size:
            self.arena.blocks.append(self.module.take(size - self.arena.size))
            self.arena.size = size


class FakeBinding:
    """An `IOBinding`: each tensor's allocation, bytes, dtype and shape."""

    def __init__(self, session: FakeSession) -> None:
        self.session = session
        self.places: dict[str, tuple[int, np.ndarray]] = {}
        self.kinds: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {}
        self.copies: dict[str, np.ndarray] = {}

    def bind_input(self, name: str, device: str, device_id: int, dtype: Any, shape: Any, address: int) -> None:
        self._bind(name, device, device_id, dtype, shape, address)
        if name in self.session.module.on_host:
            # Copied now, before work that was enqueued earlier has run.
            self.copies[name] = self.places[name][1].copy()

    def bind_output(self, name: str, device: str, device_id: int, dtype: Any, shape: Any, address: int) -> None:
        self._bind(name, device, device_id, dtype, shape, address)

    def _bind(self, name: str, device: str, device_id: int, dtype: Any, shape: Any, address: int) -> None:
        assert (device, device_id) == ("cuda", 0)
        assert address, "Pointer to data memory is not valid"
        kind = np.dtype(dtype)
        size = kind.itemsize * int(np.prod(shape))
        self.places[name] = self.session.module.cuda.place(address, size)
        self.kinds[name] = kind, tuple(shape)

    def work(self, real: onnxruntime.InferenceSession) -> Callable[[], None]:
        places, kinds, copies = dict(self.places), dict(self.kinds), dict(self.copies)
        inputs, outputs = ([t.name for t in tensors] for tensors in (real.get_inputs(), real.get_outputs()))
        assert places.keys() == {*inputs, *outputs}

        def run() -> None:
            feeds = {n: copies.get(n, places[n][1]).copy().view(kinds[n][0]).reshape(kinds[n][1]) for n in inputs}
            for name, found in zip(outputs, real.run(outputs, feeds), strict=True):
                assert (found.dtype, found.shape) == kinds[name], name
                places[name][1][:] = found.reshape(-1).view(np.uint8)

        return run


def _entry(options: Any, key: str) -> str:
    try:
        return str(options.get_run_config_entry(key))
    except RuntimeError:  # it has no such entry
        return ""
