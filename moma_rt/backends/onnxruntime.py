"""The CPU backend: ONNX Runtime on buffers that are bound once."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from moma_rt.backends.base import OUT_OF_MEMORY_ADVICE, Array, Buffer, K, Size, check_shape, check_tensors
from moma_rt.bundle.specs import NetworkSpec
from moma_rt.errors import BundleError, OutOfMemory, os_error_line
from moma_rt.messages import first_line

LOG_FATAL = 4
_WEIGHTS_ROOT = "session.model_external_initializers_file_folder_path"
_ORT_ERROR = "onnxruntime"
# How its allocators, and those of the libraries that it calls, say that memory ran out.
_NO_MEMORY = re.compile(r"failed to allocate memory[\w ]*|out of memory|bad_?alloc|\w+_ALLOC_FAILED", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class OrtBuffer:
    """A NumPy array and ONNX Runtime's view of the same memory."""

    array: Array
    value: ort.OrtValue

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.array.dtype


@dataclass(frozen=True, eq=False)
class OrtBound:
    """A session and one binding of it. ONNX Runtime's binding does not own the memory, so the buffers are kept."""

    session: ort.InferenceSession
    binding: ort.IOBinding
    buffers: tuple[OrtBuffer, ...]

    def enqueue(self) -> None:
        self.session.run_with_iobinding(self.binding)


@dataclass(frozen=True, eq=False)
class OrtNetwork:
    """A loaded session and what the manifest says of it."""

    spec: NetworkSpec
    session: ort.InferenceSession

    def bind(self, buffers: Mapping[str, Buffer]) -> OrtBound:
        binding = self.session.io_binding()
        kept = []
        for tensor in self.spec.inputs:
            buffer = _own(buffers[tensor.name])
            binding.bind_ortvalue_input(tensor.name, buffer.value)
            kept.append(buffer)
        for tensor in self.spec.outputs:
            buffer = _own(buffers[tensor.name])
            binding.bind_ortvalue_output(tensor.name, buffer.value)
            kept.append(buffer)
        return OrtBound(self.session, binding, tuple(kept))


class OnnxRuntimeBackend:
    """ONNX Runtime on the CPU, with `threads` threads a network (None: one a physical core)."""

    name = "onnxruntime"
    supports_capture = False
    is_host = True

    def __init__(self, threads: int | None = None) -> None:
        self._threads = threads

    def load(self, spec: NetworkSpec, path: Path, weights: Sequence[Path] = ()) -> OrtNetwork:
        options = session_options()
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        # Eight sessions share the cores: the threads of one that has finished must not spin against the next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        return OrtNetwork(spec, open_session(spec, path, weights, options, ["CPUExecutionProvider"]))

    def allocate(self, wanted: Mapping[K, Size]) -> dict[K, Buffer]:
        arrays = {key: np.zeros(shape, np.dtype(dtype)) for key, (shape, dtype) in wanted.items()}
        return {key: OrtBuffer(array, ort.OrtValue.ortvalue_from_numpy(array)) for key, array in arrays.items()}

    def upload(self, buffer: Buffer, array: Array, row: int | None = None) -> None:
        check_shape(buffer, array, row)
        target = _own(buffer).array
        np.copyto(target if row is None else target[row, ...], array, casting="same_kind")

    def copy_row(self, table: Buffer, row: int, target: Buffer) -> None:
        np.copyto(_own(target).array, _own(table).array[row])

    def fill_row(self, target: Buffer, row: int, source: Buffer) -> None:
        to, array = _own(target).array[row], _own(source).array
        to[: len(array)] = array
        to[len(array) :] = 0

    def capture(self, enqueue: Callable[[], None]) -> None:
        """A CPU has nothing to replay: each network is called anyway."""

    def download(self, buffer: Buffer) -> Array:
        return _own(buffer).array.copy()

    def limit_run_ahead(self) -> None:
        """A run has ended when `enqueue` returns."""

    def trim(self) -> None:
        """ONNX Runtime gives back what it computes in when a session ends, and not before."""

    def synchronize(self) -> None:
        """Nothing to wait for: a run has ended when `enqueue` returns."""


def _own(buffer: Buffer) -> OrtBuffer:
    if not isinstance(buffer, OrtBuffer):
        raise TypeError(f"a {type(buffer).__name__} is not a buffer of the onnxruntime backend")
    return buffer


def session_options() -> ort.SessionOptions:
    """What sessions of every device have in common."""
    options = ort.SessionOptions()
    options.log_severity_level = LOG_FATAL
    # Memory patterns are kept for every shape ever run; prompts come in many lengths.
    options.enable_mem_pattern = False
    return options


def open_session(
    spec: NetworkSpec, path: Path, weights: Sequence[Path], options: ort.SessionOptions, providers: Sequence[object]
) -> ort.InferenceSession:
    """A session of a network's ONNX file, with tensors of the manifest's names.

    The graph names `weights` relative to the folder of their folders. They are mapped into memory, so sessions share
    what they do not rearrange.

    Raises:
        BundleError: the file is no such network, or the providers cannot run it.
        OutOfMemory: there is no room for it.
    """
    try:
        graph: str | bytes = str(path)
        if weights:
            # It looks for weights elsewhere than beside the graph only where it is given the graph's bytes.
            graph = path.read_bytes()
            options.add_session_config_entry(_WEIGHTS_ROOT, str(weights[0].parent.parent.resolve()))
        # Without those providers that it would try in place of the ones that failed.
        session = ort.InferenceSession(graph, options, providers=providers, enable_fallback=0)
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {os_error_line(error)}") from None
    except Exception as error:
        if not is_ort_error(error):
            raise
        problem = f"{path}: ONNX Runtime {ort.__version__} cannot load it"
        raise out_of_memory(problem, error) or BundleError(f"{problem}: {first_line(error)}") from None
    check_tensors(path, "inputs", [t.name for t in spec.inputs], [t.name for t in session.get_inputs()])
    check_tensors(path, "outputs", [t.name for t in spec.outputs], [t.name for t in session.get_outputs()])
    return session


def out_of_memory(problem: str, error: Exception) -> OutOfMemory | None:
    """An error of ONNX Runtime as this one, if that is what it says."""
    found = _NO_MEMORY.search(str(error))
    return None if found is None else OutOfMemory(f"{problem}: {found[0].strip()}; {OUT_OF_MEMORY_ADVICE}")


def is_ort_error(error: Exception) -> bool:
    """Whether ONNX Runtime raised it: a dozen unrelated classes of its extension module, and RuntimeError for some."""
    return isinstance(error, RuntimeError) or type(error).__module__.startswith(_ORT_ERROR)
