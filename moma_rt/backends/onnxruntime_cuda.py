"""ONNX Runtime on a GPU, through its CUDA provider: runs bundles without engines.

A session runs on the backend's stream and buffers, asynchronously to the host.
"""

import contextlib
import io
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnxruntime as ort

from moma_rt.backends.base import Buffer
from moma_rt.backends.cuda import Stream
from moma_rt.backends.device_buffers import DeviceBackend, DeviceBuffer, as_device_buffer
from moma_rt.backends.libraries import CUDA_PROVIDER, CUDA_PROVIDER_INSTALLATION
from moma_rt.backends.onnxruntime import LOG_FATAL, open_session, run_errors, session_options
from moma_rt.bundle.specs import NetworkSpec
from moma_rt.errors import BundleError, InputError, MomaError, OutOfMemory

# NVIDIA's PCI vendor id, by which ONNX Runtime distinguishes device memory from host memory.
_NVIDIA = 0x10DE
# Operators that must run on the GPU. Arithmetic on shapes is better left to the CPU.
_GPU_OPERATORS = frozenset({"Attention", "Conv", "Gemm", "MatMul"})


@dataclass(frozen=True, eq=False)
class _Shared:
    """State that all networks of a backend share. `preload_error` says why the provider may be missing."""

    library: str
    preload_error: str
    stream: Stream
    networks: "weakref.WeakSet[OrtCudaNetwork]" = field(default_factory=weakref.WeakSet)

    def trim(self) -> None:
        self.stream.synchronize()
        for network in tuple(self.networks):
            network.shrink()


class _Binding:
    """A session bound to buffers. It keeps them alive, because ONNX Runtime's binding does not."""

    def __init__(self, spec: NetworkSpec, session: Any, shared: _Shared, buffers: Mapping[str, DeviceBuffer]) -> None:
        self._name = spec.name
        self._session = session
        self._shared = shared
        self._buffers = buffers
        self._binding = session.io_binding()
        infos = zip(session.get_inputs(), session.get_input_memory_infos(), strict=True)
        self._host_inputs = [tensor.name for tensor, info in infos if info.device_vendor_id != _NVIDIA]
        for tensor in spec.inputs:
            if tensor.name not in self._host_inputs:
                self._bind(self._binding.bind_input, tensor.name)
        for tensor in spec.outputs:
            self._bind(self._binding.bind_output, tensor.name)

    def run(self, options: Any) -> None:
        """Enqueue a run on the stream.

        Raises:
            OutOfMemory: there is too little memory to run.
            MomaError: the session cannot run.
        """
        stream = self._shared.stream
        if self._host_inputs:
            # ONNX Runtime copies an input that it needs in host memory when that is bound, not when it runs.
            stream.synchronize()
            for name in self._host_inputs:
                self._bind(self._binding.bind_input, name)
        stream.keep_alive(self)
        with run_errors(self._name):
            self._session.run_with_iobinding(self._binding, options)

    def _bind(self, bind: Callable[..., None], name: str) -> None:
        buffer = self._buffers[name]
        bind(name, "cuda", 0, buffer.dtype, buffer.shape, buffer.memory.address)


@dataclass(frozen=True, eq=False)
class OrtCudaBound:
    """A bound network whose runs are asynchronous."""

    loaded: "OrtCudaNetwork"
    binding: _Binding
    options: Any

    def enqueue(self) -> None:
        try:
            self.binding.run(self.options)
        except OutOfMemory:
            # Other networks may cache more working memory than this one lacks.
            self.loaded.shared.trim()
            self.binding.run(self.options)


@dataclass(frozen=True, eq=False)
class OrtCudaNetwork:
    """A loaded session and the spec of its network. `smallest` is a binding of its smallest shapes."""

    spec: NetworkSpec
    session: Any
    shared: _Shared
    smallest: _Binding

    def bind(self, buffers: Mapping[str, Buffer]) -> OrtCudaBound:
        tensors = (*self.spec.inputs, *self.spec.outputs)
        own = {tensor.name: as_device_buffer(buffers[tensor.name]) for tensor in tensors}
        options = ort.RunOptions()
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        return OrtCudaBound(self, _Binding(self.spec, self.session, self.shared, own), options)

    def shrink(self) -> None:
        """Free the session's working memory.

        ONNX Runtime does so at the end of a run; this run ends before its first operator.
        """
        options = ort.RunOptions()
        options.terminate = True
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "gpu:0")
        with contextlib.suppress(MomaError):
            self.smallest.run(options)


class OnnxRuntimeCudaBackend(DeviceBackend):
    """ONNX Runtime on the first GPU. Its log is silenced in this process, because the errors contain its messages.

    Raises:
        InputError: cuda-bindings is not installed.
        MomaError: CUDA cannot use the device.
    """

    name = "onnxruntime_cuda"
    # A session copies some sizes from host memory that it reuses afterwards, and a replayed graph would read that
    # memory again. A denoiser has ten of these copies, and ONNX Runtime's own graph capture rejects it too.
    supports_capture = False

    def __init__(self) -> None:
        stream = Stream()
        super().__init__(stream)
        ort.set_default_logger_severity(LOG_FATAL)
        output = io.StringIO()
        # Loads the libraries that pip installed, which the system's linker does not find.
        with contextlib.redirect_stdout(output):
            ort.preload_dlls()
        reason = next(iter(output.getvalue().splitlines()), "")
        self._shared = _Shared(f"ONNX Runtime {ort.__version__}", reason, stream)

    def load(self, spec: NetworkSpec, path: Path, weights: Sequence[Path] = ()) -> OrtCudaNetwork:
        shared = self._shared
        session = open_session(spec, path, weights, _options(), [(CUDA_PROVIDER, _provider_options(shared.stream))])
        if CUDA_PROVIDER not in session.get_providers():
            reason = f" ({shared.preload_error})" if shared.preload_error else ""
            raise InputError(
                f"backend {self.name}: {shared.library} would run {spec.name} on the CPU, because its CUDA provider "
                f"cannot be loaded{reason}: {CUDA_PROVIDER_INSTALLATION}"
            )
        _check_operators(path, shared.library, session)
        wanted = {tensor.name: (tensor.min_shape, tensor.dtype) for tensor in (*spec.inputs, *spec.outputs)}
        smallest = {name: as_device_buffer(buffer) for name, buffer in self.allocate(wanted).items()}
        network = OrtCudaNetwork(spec, session, shared, _Binding(spec, session, shared, smallest))
        shared.networks.add(network)
        return network

    def capture(self, enqueue: Callable[[], None]) -> None:
        """See `supports_capture`."""

    def trim(self) -> None:
        self._shared.trim()


def _options() -> ort.SessionOptions:
    options = session_options()
    # With reuse, the CPU overwrites shapes that the GPU's part of the graph has yet to read, and a denoiser's outputs
    # are empty (microsoft/onnxruntime issue 32083).
    options.enable_mem_reuse = False
    # The few operators on the CPU compute single numbers.
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    return options


def _provider_options(stream: Stream) -> dict[str, str]:
    return {
        "user_compute_stream": str(stream.handle),
        # The default doubles each further allocation.
        "arena_extend_strategy": "kSameAsRequested",
    }


def _check_operators(path: Path, library: str, session: Any) -> None:
    """Check that a session runs no expensive operators on the CPU.

    Raises:
        BundleError: it does.
    """
    elsewhere = [s for s in session.get_provider_graph_assignment_info() if s.ep_name != CUDA_PROVIDER]
    found = sorted({node.op_type for subgraph in elsewhere for node in subgraph.get_nodes()} & _GPU_OPERATORS)
    if found:
        raise BundleError(f"{path}: {library} has no GPU kernels of {', '.join(found)} for this network's dtypes")
