"""The backend of PyTorch's inductor: packages compiled ahead of time (AOTInductor), on the first GPU or the CPU."""

import contextlib
import json
import platform
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from moma_rt.backends.base import OUT_OF_MEMORY_ADVICE, Array, Buffer, K, Size, check_shape, check_tensors, gc_disabled
from moma_rt.backends.package_weights import PACKAGE_ERRORS, LoadedWeights, Weight, not_a_package
from moma_rt.bundle.engines import Device
from moma_rt.bundle.specs import NetworkSpec
from moma_rt.errors import BundleError, MomaError, OutOfMemory, os_error_line
from moma_rt.messages import one_line

# Keys of a package's metadata: one of the build, the others of inductor.
TENSORS_NOTE = "MOMA_TENSORS"
_DEVICE_KEY, _MACHINE_KEY, _ISA_KEY = "AOTI_DEVICE_KEY", "AOTI_MACHINE", "AOTI_CPU_ISA"
_METADATA_SUFFIX, _CODE_SUFFIX = "_metadata.json", ".so"
# Texts of the out of memory errors that PyTorch has no exception class for.
_NO_MEMORY = ("out of memory", "can't allocate memory")
_CHUNK_BYTES = 1 << 22


def tensors_note(spec: NetworkSpec) -> str:
    """The names and dtypes of a package's tensors, for its metadata: the package itself has only their order."""
    kinds = {"inputs": spec.inputs, "outputs": spec.outputs}
    return json.dumps({kind: [f"{t.name} {t.dtype}" for t in tensors] for kind, tensors in kinds.items()})


@dataclass(frozen=True, eq=False)
class TorchBuffer:
    """A tensor and its NumPy dtype."""

    tensor: torch.Tensor
    dtype: np.dtype[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)


@dataclass(eq=False)
class _Queue:
    """The stream that work is enqueued on; None on the CPU, which runs work at once.

    `used` collects the objects that a capture in progress uses; None outside a capture.
    """

    device: torch.device
    stream: Any
    used: list[object] | None = None
    run_ahead_event: Any = field(default=None, init=False)
    # PyTorch's own count of out of memory errors, as last read.
    oom_count: int = field(default=0, init=False)

    @contextlib.contextmanager
    def on_stream(self, problem: str) -> Iterator[None]:
        """Enqueue work on the stream; errors of PyTorch become one line that begins with `problem`."""
        try:
            with torch.inference_mode(), torch.cuda.stream(self.stream):
                yield
        except RuntimeError as error:  # the base class of PyTorch's own errors
            raise self.as_moma_error(problem, error) from None

    def limit_run_ahead(self) -> None:
        """Wait until all work enqueued before the previous call has run; the first call returns at once."""
        with self.on_stream("the GPU failed"):
            previous, self.run_ahead_event = self.run_ahead_event, self.stream.record_event()
            if previous is not None:
                previous.synchronize()

    def keep_alive(self, *used: object) -> None:
        """Keep objects alive as long as the graph of the capture in progress, if there is one."""
        if self.used is not None:
            self.used += used

    def as_moma_error(self, problem: str, error: RuntimeError) -> MomaError:
        """Convert an error of PyTorch into one line that begins with `problem`."""
        reason = one_line(error)
        # A package hides that the allocator ran out of memory, so the allocator is asked as well.
        oom_count = 0 if self.stream is None else int(torch.cuda.memory_stats(self.device).get("num_ooms", 0))
        ran_out, self.oom_count = oom_count > self.oom_count, oom_count
        if ran_out or isinstance(error, torch.OutOfMemoryError) or any(text in reason for text in _NO_MEMORY):
            return OutOfMemory(f"{problem}: no memory left: {reason}; {OUT_OF_MEMORY_ADVICE}")
        return MomaError(f"{problem}: {reason}")


@dataclass(frozen=True, eq=False)
class TorchBound:
    """A package and the tensors it reads and writes, in the spec's order."""

    name: str
    network: "TorchNetwork"
    queue: _Queue
    inputs: tuple[torch.Tensor, ...]
    outputs: tuple[torch.Tensor, ...]

    def enqueue(self) -> None:
        self.queue.keep_alive(self)
        with self.queue.on_stream(f"{self.name}: PyTorch {torch.__version__} cannot run it"):
            # A package allocates the tensors that it returns and cannot write into others.
            for target, output in zip(self.outputs, self.network.runner.run(self.inputs), strict=True):
                target.copy_(output)


@dataclass(frozen=True, eq=False)
class TorchNetwork:
    """A loaded package, the spec of its network, and the weights that its code reads."""

    spec: NetworkSpec
    runner: Any
    queue: _Queue
    weights: Mapping[str, Weight]

    def bind(self, buffers: Mapping[str, Buffer]) -> TorchBound:
        inputs = tuple(_as_torch_buffer(buffers[tensor.name]).tensor for tensor in self.spec.inputs)
        outputs = tuple(_as_torch_buffer(buffers[tensor.name]).tensor for tensor in self.spec.outputs)
        return TorchBound(self.spec.name, self, self.queue, inputs, outputs)


@dataclass(frozen=True, eq=False)
class TorchGraph:
    """A CUDA graph with its own memory pool, and the other objects that its work uses."""

    graph: Any
    queue: _Queue
    used: tuple[object, ...]
    size: int
    is_valid = True

    def replay(self) -> None:
        with self.queue.on_stream("a captured graph cannot be replayed"):
            self.graph.replay()


class InductorBackend:
    """Runs packages of inductor on a GPU, or on the CPU if `device` is None.

    Args:
        threads: CPU threads of the whole process, since PyTorch has one setting.

    Raises:
        MomaError: PyTorch cannot use the GPU.
    """

    name = "inductor"
    survives_fork = False  # OpenMP would wait for threads that are gone, and CUDA cannot be used

    def __init__(self, device: Device | None, threads: int | None = None) -> None:
        if device is not None and not torch.cuda.is_available():
            raise MomaError(f"PyTorch {torch.__version__} cannot use {device.name}: install a build that supports it")
        self.supports_capture = device is not None
        self.is_host = device is None
        if threads is not None:
            torch.set_num_threads(threads)
        new_stream: Any = torch.cuda.Stream  # untyped
        torch_device = torch.device("cpu" if device is None else "cuda:0")
        self._queue = _Queue(torch_device, None if device is None else new_stream(torch_device))
        self._weights = LoadedWeights(torch_device)
        if device is not None:
            # cuDNN times its kernels for each shape when that first runs, which is before a capture.
            torch.backends.cudnn.benchmark = True

    def load(self, spec: NetworkSpec, path: Path, weights: Sequence[Path] = ()) -> TorchNetwork:
        metadata = _read_metadata(path)
        self._check_machine(path, metadata)
        self._check_tensors(spec, path, metadata)
        try:
            with self._queue.on_stream(f"{path}: PyTorch {torch.__version__} cannot load it"), _unpacked(path) as code:
                runner = self._runner(str(code))
                loaded = self._weights.load(path, runner.get_constant_names_to_original_fqns(), weights)
                # The code reads the weights in place, without a copy.
                tensors = {name: weight.tensor for name, weight in loaded.items()}
                runner.update_constant_buffer(tensors, False, True, True)
        except OutOfMemory:
            raise
        except MomaError as error:
            raise BundleError(str(error)) from None
        return TorchNetwork(spec, runner, self._queue, loaded)

    def _runner(self, code: str) -> Any:
        """Create what PyTorch's own package loader would create.

        That loader unpacks a package to /tmp and leaves it there if loading fails or the process is killed.
        """
        runners: Any = torch._C._aoti
        if self.is_host:
            return runners.AOTIModelContainerRunnerCpu(code, 1)
        # Single-threaded (True), without locks and events: networks run one after the other here, and a capture cannot
        # contain those events. The kernels are part of the code, not in a folder.
        return runners.AOTIModelContainerRunnerCuda(code, 1, "cuda", "", True)

    def _check_machine(self, path: Path, metadata: Mapping[str, str]) -> None:
        """Refuse a package for another kind of device, or for instructions that this CPU may lack."""
        kind = self._queue.device.type
        if metadata.get(_DEVICE_KEY) != kind:
            raise BundleError(f"{path} was compiled for {metadata.get(_DEVICE_KEY)}, and this backend runs on {kind}")
        machine = metadata.get(_MACHINE_KEY, platform.machine())
        if machine != platform.machine():
            raise BundleError(f"{path} was compiled for hosts of {machine}, and this one is {platform.machine()}")
        # Such as "AVX512 AVX512_VNNI", extensions of the first. A package for a GPU computes only sizes on the CPU.
        needed = metadata.get(_ISA_KEY, "").split()[:1] if self.is_host else []
        if needed and needed != [cpu_instructions()]:
            raise BundleError(
                f"{path} was compiled for a CPU with {needed[0]}, and PyTorch uses {cpu_instructions()} on this one: "
                "build it on this machine"
            )

    def _check_tensors(self, spec: NetworkSpec, path: Path, metadata: Mapping[str, str]) -> None:
        wanted = json.loads(tensors_note(spec))
        try:
            found = json.loads(metadata[TENSORS_NOTE])
            for what in wanted:
                check_tensors(path, what, wanted[what], found[what])
        except (ValueError, KeyError, TypeError):
            raise BundleError(f"{path} does not say what its inputs and outputs are; build it again") from None

    def allocate(self, wanted: Mapping[K, Size]) -> dict[K, Buffer]:
        return {key: self._buffer(shape, np.dtype(dtype)) for key, (shape, dtype) in wanted.items()}

    def _buffer(self, shape: tuple[int, ...], kind: np.dtype[Any]) -> TorchBuffer:
        with self._queue.on_stream(f"cannot allocate a buffer of {kind.name} {list(shape)}"):
            tensor = torch.zeros(shape, dtype=getattr(torch, kind.name), device=self._queue.device)
        return TorchBuffer(tensor, kind)

    def upload(self, buffer: Buffer, array: Array, row: int | None = None) -> None:
        check_shape(buffer, array, row)
        target = _as_torch_buffer(buffer)
        host = np.empty(array.shape, target.dtype)
        np.copyto(host, array, casting="same_kind")
        with self._queue.on_stream("an upload failed"):
            # Blocks until the array has been read.
            (target.tensor if row is None else target.tensor[row]).copy_(torch.from_numpy(host))

    def copy_row(self, table: Buffer, row: int, target: Buffer) -> None:
        source, to = _as_torch_buffer(table).tensor, _as_torch_buffer(target).tensor
        self._queue.keep_alive(source, to)
        with self._queue.on_stream("a copy failed"):
            to.copy_(source[row])

    def fill_row(self, target: Buffer, row: int, source: Buffer) -> None:
        to, tensor = _as_torch_buffer(target).tensor[row], _as_torch_buffer(source).tensor
        with self._queue.on_stream("a copy failed"):
            to[: len(tensor)].copy_(tensor)
            to[len(tensor) :].zero_()

    def download(self, buffer: Buffer) -> Array:
        with self._queue.on_stream("a download failed"):
            array: Array = _as_torch_buffer(buffer).tensor.to("cpu", copy=True).numpy()
        return array

    def capture(self, enqueue: Callable[[], None]) -> TorchGraph | None:
        if not self.supports_capture:
            return None
        queue, graph, used = self._queue, torch.cuda.CUDAGraph(), list[object]()
        # A capture begins with this too: done first, the graph's memory can be measured.
        torch.cuda.empty_cache()
        free_before, _ = torch.cuda.mem_get_info(queue.device)
        queue.used = used
        try:
            # The outer context restores the thread's stream if the capture fails; other threads may use the GPU.
            with (
                torch.cuda.stream(queue.stream),
                torch.cuda.graph(graph, stream=queue.stream, capture_error_mode="thread_local"),
                gc_disabled(),
            ):
                enqueue()
        except (RuntimeError, MomaError) as error:
            # After an error inside, ending the capture may fail too, with an error that hides the first.
            for found in (error, error.__context__):
                reason = queue.as_moma_error("capture failed", found) if isinstance(found, RuntimeError) else found
                if isinstance(reason, OutOfMemory):
                    raise reason from None
            # The caller enqueues the work instead, which runs it or raises its error.
            return None
        finally:
            queue.used = None
        free_after, _ = torch.cuda.mem_get_info(queue.device)
        return TorchGraph(graph, queue, tuple(used), max(0, free_before - free_after))

    def limit_run_ahead(self) -> None:
        if not self.is_host:
            self._queue.limit_run_ahead()

    def trim(self) -> None:
        if self.supports_capture:
            self.synchronize()
            torch.cuda.empty_cache()

    def synchronize(self) -> None:
        if self.supports_capture:
            with self._queue.on_stream("the GPU failed"):
                self._queue.stream.synchronize()


def cpu_instructions() -> str:
    """The instruction set that PyTorch uses on this CPU, such as AVX512, AVX2 or DEFAULT."""
    return str(torch.backends.cpu.get_cpu_capability())


@contextlib.contextmanager
def _unpacked(path: Path) -> Iterator[Path]:
    """Unpack a package's code into a temporary file, which may be deleted once the code is loaded.

    Raises:
        BundleError: the package has no code, or the file cannot be written.
    """
    with contextlib.ExitStack() as stack:
        try:
            archive = stack.enter_context(zipfile.ZipFile(path))
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="moma-rt-")))
            name = next(n for n in archive.namelist() if n.endswith(_CODE_SUFFIX))
            code = folder / PurePosixPath(name).name
            with archive.open(name) as source, code.open("wb") as target:
                shutil.copyfileobj(source, target, _CHUNK_BYTES)
        except OSError as error:
            raise BundleError(f"{path} cannot be unpacked: {os_error_line(error)}") from None
        except PACKAGE_ERRORS as error:
            raise not_a_package(path, error) from None
        yield code


def _read_metadata(path: Path) -> dict[str, str]:
    """Read a package's metadata without loading its code.

    Raises:
        BundleError: the file is not a package.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(n for n in archive.namelist() if n.endswith(_METADATA_SUFFIX))
            metadata: dict[str, str] = json.loads(archive.read(name))
        return {str(key): str(value) for key, value in metadata.items()}
    except (OSError, *PACKAGE_ERRORS) as error:
        raise not_a_package(path, error) from None


def _as_torch_buffer(buffer: Buffer) -> TorchBuffer:
    if not isinstance(buffer, TorchBuffer):
        raise TypeError(f"a {type(buffer).__name__} is not a buffer of the inductor backend")
    return buffer
