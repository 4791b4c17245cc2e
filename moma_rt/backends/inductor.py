"""The backend of PyTorch's inductor: packages that were compiled ahead of time, on the first GPU or on the CPU."""

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
from moma_rt.backends.package_weights import NOT_A_PACKAGE, LoadedWeights, Weight, no_package
from moma_rt.bundle.engines import Device
from moma_rt.bundle.specs import NetworkSpec
from moma_rt.errors import BundleError, MomaError, OutOfMemory, os_error_line
from moma_rt.messages import one_line

# What the packager notes of a package: the build's own note, and those of inductor.
TENSORS_NOTE = "MOMA_TENSORS"
_DEVICE_NOTE, _MACHINE_NOTE, _ISA_NOTE = "AOTI_DEVICE_KEY", "AOTI_MACHINE", "AOTI_CPU_ISA"
_NOTES_SUFFIX, _CODE_SUFFIX = "_metadata.json", ".so"
# How PyTorch says that memory ran out where the error is of no class of its own.
_NO_MEMORY = ("out of memory", "can't allocate memory")
_CHUNK_BYTES = 1 << 22


def tensors_note(spec: NetworkSpec) -> str:
    """What a package of a network says of its tensors; its own inputs and outputs have an order and no names."""
    kinds = {"inputs": spec.inputs, "outputs": spec.outputs}
    return json.dumps({kind: [f"{t.name} {t.dtype}" for t in tensors] for kind, tensors in kinds.items()})


@dataclass(frozen=True, eq=False)
class TorchBuffer:
    """A tensor, and the NumPy dtype of what lies in it."""

    tensor: torch.Tensor
    dtype: np.dtype[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)


@dataclass(eq=False)
class _Queue:
    """Where work is put: one stream of a GPU (None: the CPU, which does it at once).

    `used` collects what a recording that is being made uses; None while there is none.
    """

    device: torch.device
    stream: Any
    used: list[object] | None = None
    paced: Any = field(default=None, init=False)
    # How often PyTorch's allocator has run out of memory, as far as that was looked at.
    shortages: int = field(default=0, init=False)

    @contextlib.contextmanager
    def working(self, what: str) -> Iterator[None]:
        """Put what is called inside on the stream, and say what PyTorch raises in one line that begins with `what`."""
        try:
            with torch.inference_mode(), torch.cuda.stream(self.stream):
                yield
        except RuntimeError as error:  # of which PyTorch's own classes are
            raise self.explained(what, error) from None

    def limit_run_ahead(self) -> None:
        """Wait until what was on the stream when this was last called has run."""
        with self.working("the GPU failed"):
            before, self.paced = self.paced, self.stream.record_event()
            if before is not None:
                before.synchronize()

    def keep(self, *used: object) -> None:
        """A recording that is being made lives no longer than what it uses."""
        if self.used is not None:
            self.used += used

    def explained(self, what: str, error: RuntimeError) -> MomaError:
        """What PyTorch raised, in one line that begins with `what`."""
        said = one_line(error)
        # A package passes an error of the allocator on as one that does not say what it was.
        counted = 0 if self.stream is None else int(torch.cuda.memory_stats(self.device).get("num_ooms", 0))
        ran_out, self.shortages = counted > self.shortages, counted
        if ran_out or isinstance(error, torch.OutOfMemoryError) or any(text in said for text in _NO_MEMORY):
            return OutOfMemory(f"{what}: no memory left: {said}; {OUT_OF_MEMORY_ADVICE}")
        return MomaError(f"{what}: {said}")


@dataclass(frozen=True, eq=False)
class TorchBound:
    """What runs a package's code, and the tensors it reads and writes, in the spec's order."""

    name: str
    network: "TorchNetwork"
    queue: _Queue
    inputs: tuple[torch.Tensor, ...]
    outputs: tuple[torch.Tensor, ...]

    def enqueue(self) -> None:
        self.queue.keep(self)
        with self.queue.working(f"{self.name}: PyTorch {torch.__version__} cannot run it"):
            # A package returns tensors of its own, into which nothing else can write.
            for target, output in zip(self.outputs, self.network.runner.run(self.inputs), strict=True):
                target.copy_(output)


@dataclass(frozen=True, eq=False)
class TorchNetwork:
    """A loaded package, what the manifest says of its network, and the weights that its code reads."""

    spec: NetworkSpec
    runner: Any
    queue: _Queue
    weights: Mapping[str, Weight]

    def bind(self, buffers: Mapping[str, Buffer]) -> TorchBound:
        inputs = tuple(_own(buffers[tensor.name]).tensor for tensor in self.spec.inputs)
        outputs = tuple(_own(buffers[tensor.name]).tensor for tensor in self.spec.outputs)
        return TorchBound(self.spec.name, self, self.queue, inputs, outputs)


@dataclass(frozen=True, eq=False)
class TorchGraph:
    """A CUDA graph, whose memory pool is its own, and what its work uses beside that."""

    graph: Any
    queue: _Queue
    used: tuple[object, ...]
    size: int
    is_valid = True

    def replay(self) -> None:
        with self.queue.working("a recorded generation cannot be run"):
            self.graph.replay()


class InductorBackend:
    """Packages of inductor on a GPU, or on the CPU where `device` is None.

    Args:
        threads: of the CPU, for this whole process: PyTorch has one number of them.

    Raises:
        MomaError: PyTorch cannot use the GPU.
    """

    name = "inductor"

    def __init__(self, device: Device | None, threads: int | None = None) -> None:
        if device is not None and not torch.cuda.is_available():
            raise MomaError(f"PyTorch {torch.__version__} cannot use {device.name}: install one for its CUDA version")
        self.supports_capture = device is not None
        self.is_host = device is None
        if threads is not None:
            torch.set_num_threads(threads)
        new_stream: Any = torch.cuda.Stream  # which has no types
        on = torch.device("cpu" if device is None else "cuda:0")
        self._queue = _Queue(on, None if device is None else new_stream(on))
        self._weights = LoadedWeights(on)
        if device is not None:
            # cuDNN measures its convolutions for each shape when it first runs, which is before a capture.
            torch.backends.cudnn.benchmark = True

    def load(self, spec: NetworkSpec, path: Path, weights: Sequence[Path] = ()) -> TorchNetwork:
        notes = _notes(path)
        self._check_machine(path, notes)
        self._check_tensors(spec, path, notes)
        try:
            with self._queue.working(f"{path}: PyTorch {torch.__version__} cannot load it"), _unpacked(path) as code:
                runner = self._runner(str(code))
                read = self._weights.of(path, runner.get_constant_names_to_original_fqns(), weights)
                # They are not copied: the code reads them where they are.
                runner.update_constant_buffer({name: weight.tensor for name, weight in read.items()}, False, True, True)
        except OutOfMemory:
            raise
        except MomaError as error:
            raise BundleError(str(error)) from None
        return TorchNetwork(spec, runner, self._queue, read)

    def _runner(self, code: str) -> Any:
        """PyTorch's own loader of packages is not used: it unpacks them to /tmp, and leaves that there where loading
        fails, or this process is killed. What that loader makes is made here.
        """
        runners: Any = torch._C._aoti
        if self.is_host:
            return runners.AOTIModelContainerRunnerCpu(code, 1)
        # Without locks and events of its own: networks run one after the other here, and a graph that is being
        # recorded could not hold those events. The kernels are part of the code, so there is no folder of them.
        return runners.AOTIModelContainerRunnerCuda(code, 1, "cuda", "", True)

    def _check_machine(self, path: Path, notes: Mapping[str, str]) -> None:
        """Refuse a package for another kind of device, and instructions that this CPU may not have."""
        kind = self._queue.device.type
        if notes.get(_DEVICE_NOTE) != kind:
            raise BundleError(f"{path} was compiled for {notes.get(_DEVICE_NOTE)}, and this backend runs on {kind}")
        machine = notes.get(_MACHINE_NOTE, platform.machine())
        if machine != platform.machine():
            raise BundleError(f"{path} was compiled for hosts of {machine}, and this one is {platform.machine()}")
        # Such as "AVX512 AVX512_VNNI"; the first one is what the others add to. A GPU's package computes nothing on the
        # CPU but sizes.
        needed = notes.get(_ISA_NOTE, "").split()[:1] if self.is_host else []
        if needed and needed != [cpu_instructions()]:
            raise BundleError(
                f"{path} was compiled for a CPU with {needed[0]}, and PyTorch uses {cpu_instructions()} on this one: "
                "build it here"
            )

    def _check_tensors(self, spec: NetworkSpec, path: Path, notes: Mapping[str, str]) -> None:
        wanted = json.loads(tensors_note(spec))
        try:
            found = json.loads(notes[TENSORS_NOTE])
            for what in wanted:
                check_tensors(path, what, wanted[what], found[what])
        except (ValueError, KeyError, TypeError):
            raise BundleError(f"{path} does not say what its inputs and outputs are; build it again") from None

    def allocate(self, wanted: Mapping[K, Size]) -> dict[K, Buffer]:
        return {key: self._buffer(shape, np.dtype(dtype)) for key, (shape, dtype) in wanted.items()}

    def _buffer(self, shape: tuple[int, ...], kind: np.dtype[Any]) -> TorchBuffer:
        with self._queue.working(f"a buffer of {kind.name} {list(shape)}"):
            tensor = torch.zeros(shape, dtype=getattr(torch, kind.name), device=self._queue.device)
        return TorchBuffer(tensor, kind)

    def upload(self, buffer: Buffer, array: Array, row: int | None = None) -> None:
        check_shape(buffer, array, row)
        target = _own(buffer)
        host = np.empty(array.shape, target.dtype)
        np.copyto(host, array, casting="same_kind")
        with self._queue.working("an upload failed"):
            # Returns when the array has been read.
            (target.tensor if row is None else target.tensor[row]).copy_(torch.from_numpy(host))

    def copy_row(self, table: Buffer, row: int, target: Buffer) -> None:
        source, to = _own(table).tensor, _own(target).tensor
        self._queue.keep(source, to)
        with self._queue.working("a copy failed"):
            to.copy_(source[row])

    def fill_row(self, target: Buffer, row: int, source: Buffer) -> None:
        to, tensor = _own(target).tensor[row], _own(source).tensor
        with self._queue.working("a copy failed"):
            to[: len(tensor)].copy_(tensor)
            to[len(tensor) :].zero_()

    def download(self, buffer: Buffer) -> Array:
        with self._queue.working("a download failed"):
            array: Array = _own(buffer).tensor.to("cpu", copy=True).numpy()
        return array

    def capture(self, enqueue: Callable[[], None]) -> TorchGraph | None:
        if not self.supports_capture:
            return None
        queue, graph, used = self._queue, torch.cuda.CUDAGraph(), list[object]()
        # A recording begins with this; what it gives back would hide what the recording takes.
        torch.cuda.empty_cache()
        free_before, _ = torch.cuda.mem_get_info(queue.device)
        queue.used = used
        try:
            # The stream, once more: a recording that fails to end leaves it this thread's own. Other threads of this
            # process may use the GPU meanwhile.
            with (
                torch.cuda.stream(queue.stream),
                torch.cuda.graph(graph, stream=queue.stream, capture_error_mode="thread_local"),
                gc_disabled(),
            ):
                enqueue()
        except (RuntimeError, MomaError) as error:
            # After an error inside, the end of a recording may fail as well, and say nothing of the first.
            for said in (error, error.__context__):
                reason = queue.explained("a recording", said) if isinstance(said, RuntimeError) else said
                if isinstance(reason, OutOfMemory):
                    raise reason from None
            # Work that cannot be recorded runs all the same when it is enqueued, or says then what is wrong with it.
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
            with self._queue.working("the GPU failed"):
                self._queue.stream.synchronize()


def cpu_instructions() -> str:
    """What PyTorch computes with on this CPU, such as AVX512, AVX2 or DEFAULT."""
    return str(torch.backends.cpu.get_cpu_capability())


@contextlib.contextmanager
def _unpacked(path: Path) -> Iterator[Path]:
    """A package's code, as a file whose name is not needed once it was loaded.

    Raises:
        BundleError: there is none in it, or no room for it.
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
        except NOT_A_PACKAGE as error:
            raise no_package(path, error) from None
        yield code


def _notes(path: Path) -> dict[str, str]:
    """What a package says of itself, read before any of its code is loaded.

    Raises:
        BundleError: it is no package.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(n for n in archive.namelist() if n.endswith(_NOTES_SUFFIX))
            notes: dict[str, str] = json.loads(archive.read(name))
        return {str(key): str(value) for key, value in notes.items()}
    except (OSError, *NOT_A_PACKAGE) as error:
        raise no_package(path, error) from None


def _own(buffer: Buffer) -> TorchBuffer:
    if not isinstance(buffer, TorchBuffer):
        raise TypeError(f"a {type(buffer).__name__} is not a buffer of the inductor backend")
    return buffer
