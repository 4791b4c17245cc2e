"""The CPU backend: ONNX Runtime sessions, each bound to its buffers once."""

import contextlib
import ctypes
import os
import re
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from moma_rt.backends.base import OUT_OF_MEMORY_ADVICE, Array, Buffer, K, Size, check_shape, check_tensors
from moma_rt.bundle.specs import NetworkSpec
from moma_rt.errors import BundleError, MomaError, OutOfMemory, os_error_line
from moma_rt.messages import first_line, one_line

LOG_FATAL = 4
_WEIGHTS_ROOT = "session.model_external_initializers_file_folder_path"
_GIVE_MAPPED = "add_external_initializers_from_files_in_memory"
_ORT_ERROR = "onnxruntime"
# Texts of the out of memory errors of its allocators and of the libraries that it calls.
_NO_MEMORY = re.compile(
    r"failed to allocate memory[\w ]*|out of memory|bad_?alloc|\w+_ALLOC_FAILED|pthread_create failed", re.IGNORECASE
)


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
    """A session and one of its bindings. It keeps the buffers alive, because ONNX Runtime's binding does not."""

    name: str
    session: ort.InferenceSession
    binding: ort.IOBinding
    buffers: tuple[OrtBuffer, ...]

    def enqueue(self) -> None:
        with run_errors(self.name):
            self.session.run_with_iobinding(self.binding)


@dataclass(frozen=True, eq=False)
class OrtNetwork:
    """A loaded session and the spec of its network."""

    spec: NetworkSpec
    session: ort.InferenceSession

    def bind(self, buffers: Mapping[str, Buffer]) -> OrtBound:
        binding = self.session.io_binding()
        kept = []
        for tensor in self.spec.inputs:
            buffer = _as_ort_buffer(buffers[tensor.name])
            binding.bind_ortvalue_input(tensor.name, buffer.value)
            kept.append(buffer)
        for tensor in self.spec.outputs:
            buffer = _as_ort_buffer(buffers[tensor.name])
            binding.bind_ortvalue_output(tensor.name, buffer.value)
            kept.append(buffer)
        return OrtBound(self.spec.name, self.session, binding, tuple(kept))


class OnnxRuntimeBackend:
    """ONNX Runtime on the CPU, with `threads` threads per network (None: one per physical core)."""

    name = "onnxruntime"
    supports_capture = False
    is_host = True
    survives_fork = True

    def __init__(self, threads: int | None = None) -> None:
        self._threads = threads
        self._sessions: weakref.WeakSet[ort.InferenceSession] = weakref.WeakSet()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=partial(_keep_for_ever, self._sessions))

    def load(self, spec: NetworkSpec, path: Path, weights: Sequence[Path] = ()) -> OrtNetwork:
        options = session_options()
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        # Eight sessions share the cores: the threads of one that has finished must not spin against the next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = open_session(spec, path, weights, options, ["CPUExecutionProvider"])
        self._sessions.add(session)
        return OrtNetwork(spec, session)

    def allocate(self, wanted: Mapping[K, Size]) -> dict[K, Buffer]:
        arrays = {key: np.zeros(shape, np.dtype(dtype)) for key, (shape, dtype) in wanted.items()}
        return {key: OrtBuffer(array, ort.OrtValue.ortvalue_from_numpy(array)) for key, array in arrays.items()}

    def upload(self, buffer: Buffer, array: Array, row: int | None = None) -> None:
        check_shape(buffer, array, row)
        target = _as_ort_buffer(buffer).array
        np.copyto(target if row is None else target[row, ...], array, casting="same_kind")

    def copy_row(self, table: Buffer, row: int, target: Buffer) -> None:
        np.copyto(_as_ort_buffer(target).array, _as_ort_buffer(table).array[row])

    def fill_row(self, target: Buffer, row: int, source: Buffer) -> None:
        to, array = _as_ort_buffer(target).array[row], _as_ort_buffer(source).array
        to[: len(array)] = array
        to[len(array) :] = 0

    def capture(self, enqueue: Callable[[], None]) -> None:
        """Return None: on a CPU, a replay would call each network anyway."""

    def download(self, buffer: Buffer) -> Array:
        return _as_ort_buffer(buffer).array.copy()

    def limit_run_ahead(self) -> None:
        """Do nothing: a run has finished when `enqueue` returns."""

    def trim(self) -> None:
        """Do nothing: ONNX Runtime frees a session's working memory only with the session."""

    def synchronize(self) -> None:
        """Do nothing: a run has finished when `enqueue` returns."""


def _keep_for_ever(sessions: "weakref.WeakSet[ort.InferenceSession]") -> None:
    """Never delete a session in a forked process: it would wait for its threads, which are not there, or crash."""
    for session in sessions:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(session))


def _as_ort_buffer(buffer: Buffer) -> OrtBuffer:
    if not isinstance(buffer, OrtBuffer):
        raise TypeError(f"a {type(buffer).__name__} is not a buffer of the onnxruntime backend")
    return buffer


def session_options() -> ort.SessionOptions:
    """Session options for every device."""
    options = ort.SessionOptions()
    options.log_severity_level = LOG_FATAL
    # A memory pattern is cached for every shape ever run, and prompts come in many lengths.
    options.enable_mem_pattern = False
    return options


def open_session(
    spec: NetworkSpec, path: Path, weights: Sequence[Path], options: ort.SessionOptions, providers: Sequence[object]
) -> ort.InferenceSession:
    """Open a session of a network's ONNX file, and check its tensors' names against the spec.

    The graph names `weights` relative to the parent of their folders. They are memory-mapped, so sessions share the
    weights that they use unchanged.

    Raises:
        BundleError: the file is not this network, or the providers cannot run it.
        OutOfMemory: there is too little memory for it.
    """
    try:
        graph: str | bytes = str(path)
        mapped: list[Array] = []
        if weights:
            # Only a graph that is given as bytes can have its weights in another folder.
            graph = path.read_bytes()
            mapped += _give_weights(options, weights)
        # Without a fallback to other providers.
        session = ort.InferenceSession(graph, options, providers=providers, enable_fallback=0)
        mapped.clear()
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {os_error_line(error)}") from None
    except Exception as error:
        if not is_ort_error(error):
            raise
        problem = f"{path}: ONNX Runtime {ort.__version__} cannot load it"
        raise as_out_of_memory(problem, error) or BundleError(f"{problem}: {first_line(error)}") from None
    check_tensors(path, "inputs", [t.name for t in spec.inputs], [t.name for t in session.get_inputs()])
    check_tensors(path, "outputs", [t.name for t in spec.outputs], [t.name for t in session.get_outputs()])
    return session


def _give_weights(options: ort.SessionOptions, weights: Sequence[Path]) -> list[Array]:
    """Let a session find weights files by their paths relative to the parent of their folders.

    Versions since 1.24 refuse links that lead out of that folder, as in a cache of Hugging Face's hub. Those files are
    given as mapped memory, of which the session copies what it needs, so such sessions share no weights.

    Returns:
        The mapped files, to keep until the session exists.
    """
    root = weights[0].parent.parent.resolve()
    if all(file.resolve().is_relative_to(root) for file in weights) or not hasattr(options, _GIVE_MAPPED):
        options.add_session_config_entry(_WEIGHTS_ROOT, str(root))
        return []
    mapped: list[Array] = [np.memmap(file, np.uint8, "r") for file in weights]
    names = [file.relative_to(file.parent.parent).as_posix() for file in weights]
    getattr(options, _GIVE_MAPPED)(names, mapped, [len(content) for content in mapped])
    return mapped


@contextlib.contextmanager
def run_errors(name: str) -> Iterator[None]:
    """Convert the errors that ONNX Runtime raises while it runs a network.

    Raises:
        OutOfMemory: there is too little memory to run.
        MomaError: the session cannot run.
    """
    try:
        yield
    except Exception as error:
        if not is_ort_error(error):
            raise
        problem = f"{name}: ONNX Runtime {ort.__version__} cannot run it"
        raise as_out_of_memory(problem, error) or MomaError(f"{problem}: {one_line(error)}") from None


def as_out_of_memory(problem: str, error: Exception) -> OutOfMemory | None:
    """Convert an error of ONNX Runtime that reports a lack of memory; None if it is another error."""
    found = _NO_MEMORY.search(str(error))
    return None if found is None else OutOfMemory(f"{problem}: {found[0].strip()}; {OUT_OF_MEMORY_ADVICE}")


def is_ort_error(error: Exception) -> bool:
    """Whether ONNX Runtime raised it: as one of a dozen unrelated classes of its extension module, or RuntimeError."""
    return isinstance(error, RuntimeError) or type(error).__module__.startswith(_ORT_ERROR)
