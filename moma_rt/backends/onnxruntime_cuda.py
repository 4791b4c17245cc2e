"""ONNX Runtime on a GPU, through its CUDA provider: what runs there without engines.

A session works on our stream, on memory of ours, and returns before its work has ended.
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
from moma_rt.backends.device_buffers import DeviceBuffer, OnDevice, on_device
from moma_rt.backends.libraries import CUDA_PROVIDER, CUDA_PROVIDER_INSTALLATION
from moma_rt.backends.onnxruntime import LOG_FATAL, is_ort_error, open_session, out_of_memory, session_options
from moma_rt.bundle.specs import NetworkSpec
from moma_rt.errors import BundleError, InputError, MomaError, OutOfMemory
from moma_rt.messages import one_line

# PCI's number of NVIDIA, by which ONNX Runtime tells memory of its devices from the host's.
_NVIDIA = 0x10DE
# What takes a GPU's time. Arithmetic on shapes runs on the CPU, and is better off there.
_FOR_THE_GPU = frozenset({"Attention", "Conv", "Gemm", "MatMul"})


@dataclass(frozen=True, eq=False)
class _Shared:
    """What all networks of a backend have in common. `said` is why its provider may be missing."""

    library: str
    said: str
    stream: Stream
    networks: "weakref.WeakSet[OrtCudaNetwork]" = field(default_factory=weakref.WeakSet)

    def trim(self) -> None:
        self.stream.synchronize()
        for network in tuple(self.networks):
            network.shrink()


class _Binding:
    """A session, and the buffers that it is bound to and does not own."""

    def __init__(self, spec: NetworkSpec, session: Any, shared: _Shared, buffers: Mapping[str, DeviceBuffer]) -> None:
        self._name = spec.name
        self._session = session
        self._shared = shared
        self._buffers = buffers
        self._binding = session.io_binding()
        infos = zip(session.get_inputs(), session.get_input_memory_infos(), strict=True)
        self._on_host = [tensor.name for tensor, info in infos if info.device_vendor_id != _NVIDIA]
        for tensor in spec.inputs:
            if tensor.name not in self._on_host:
                self._bind(self._binding.bind_input, tensor.name)
        for tensor in spec.outputs:
            self._bind(self._binding.bind_output, tensor.name)

    def run(self, options: Any) -> None:
        """Put a run on the stream.

        Raises:
            OutOfMemory: there is no room to compute in.
            MomaError: the session cannot run.
        """
        stream = self._shared.stream
        if self._on_host:
            # It copies what it wants in the host's memory when that is bound, and not when it runs.
            stream.synchronize()
            for name in self._on_host:
                self._bind(self._binding.bind_input, name)
        stream.keep(self)
        try:
            self._session.run_with_iobinding(self._binding, options)
        except Exception as error:
            if not is_ort_error(error):
                raise
            problem = f"{self._name}: {self._shared.library} cannot run it"
            raise out_of_memory(problem, error) or MomaError(f"{problem}: {one_line(error)}") from None

    def _bind(self, bind: Callable[..., None], name: str) -> None:
        buffer = self._buffers[name]
        bind(name, "cuda", 0, buffer.dtype, buffer.shape, buffer.memory.address)


@dataclass(frozen=True, eq=False)
class OrtCudaBound:
    """A binding of a network that does not wait for its runs."""

    loaded: "OrtCudaNetwork"
    binding: _Binding
    options: Any

    def enqueue(self) -> None:
        try:
            self.binding.run(self.options)
        except OutOfMemory:
            # All networks may keep more to compute in than this one lacks.
            self.loaded.shared.trim()
            self.binding.run(self.options)


@dataclass(frozen=True, eq=False)
class OrtCudaNetwork:
    """A loaded session and what the manifest says of it. `smallest` is bound to its smallest shapes."""

    spec: NetworkSpec
    session: Any
    shared: _Shared
    smallest: _Binding

    def bind(self, buffers: Mapping[str, Buffer]) -> OrtCudaBound:
        own = {tensor.name: on_device(buffers[tensor.name]) for tensor in (*self.spec.inputs, *self.spec.outputs)}
        options = ort.RunOptions()
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        return OrtCudaBound(self, _Binding(self.spec, self.session, self.shared, own), options)

    def shrink(self) -> None:
        """Have it give back the memory that it computes in.

        That is done at the end of a run, and this run ends before its first operator.
        """
        options = ort.RunOptions()
        options.terminate = True
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "gpu:0")
        with contextlib.suppress(MomaError):
            self.smallest.run(options)


class OnnxRuntimeCudaBackend(OnDevice):
    """ONNX Runtime on the first GPU. Its own log is silenced in this process: what it says is in the errors.

    Raises:
        InputError: cuda-bindings is not installed.
        MomaError: CUDA cannot use the device.
    """

    name = "onnxruntime_cuda"
    # A session copies some sizes from memory of the host that it uses again afterwards, and a recording would read that
    # when it is replayed. A denoiser has ten of these copies, and ONNX Runtime's own recordings refuse it as well.
    supports_capture = False

    def __init__(self) -> None:
        stream = Stream()
        super().__init__(stream)
        ort.set_default_logger_severity(LOG_FATAL)
        said = io.StringIO()
        # Those libraries that pip installed, which the system's linker does not find.
        with contextlib.redirect_stdout(said):
            ort.preload_dlls()
        reason = next(iter(said.getvalue().splitlines()), "")
        self._shared = _Shared(f"ONNX Runtime {ort.__version__}", reason, stream)

    def load(self, spec: NetworkSpec, path: Path, weights: Sequence[Path] = ()) -> OrtCudaNetwork:
        shared = self._shared
        session = open_session(spec, path, weights, _options(), [(CUDA_PROVIDER, _provider_options(shared.stream))])
        if CUDA_PROVIDER not in session.get_providers():
            raise InputError(
                f"backend {self.name}: {shared.library} would run {spec.name} on the CPU, because its CUDA provider "
                f"cannot be loaded{f' ({shared.said})' if shared.said else ''}: {CUDA_PROVIDER_INSTALLATION}"
            )
        _check_operators(path, shared.library, session)
        wanted = {tensor.name: (tensor.min_shape, tensor.dtype) for tensor in (*spec.inputs, *spec.outputs)}
        smallest = {name: on_device(buffer) for name, buffer in self.allocate(wanted).items()}
        network = OrtCudaNetwork(spec, session, shared, _Binding(spec, session, shared, smallest))
        shared.networks.add(network)
        return network

    def capture(self, enqueue: Callable[[], None]) -> None:
        """See `supports_capture`."""

    def trim(self) -> None:
        self._shared.trim()


def _options() -> ort.SessionOptions:
    options = session_options()
    # It would let a shape's memory be used again while the GPU's half of the graph has yet to read it: a denoiser's
    # outputs come out empty then (microsoft/onnxruntime issue 32083).
    options.enable_mem_reuse = False
    # The few operators on the CPU are about single numbers.
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    return options


def _provider_options(stream: Stream) -> dict[str, str]:
    return {
        "user_compute_stream": str(stream.handle),
        # The default doubles what it takes from the device each time.
        "arena_extend_strategy": "kSameAsRequested",
    }


def _check_operators(path: Path, library: str, session: Any) -> None:
    """Refuse a session that does a GPU's work on the CPU.

    Raises:
        BundleError: it does.
    """
    elsewhere = [s for s in session.get_provider_graph_assignment_info() if s.ep_name != CUDA_PROVIDER]
    found = sorted({node.op_type for subgraph in elsewhere for node in subgraph.get_nodes()} & _FOR_THE_GPU)
    if found:
        raise BundleError(f"{path}: {library} has no {', '.join(found)} for this network's types on a GPU")
