"""What a backend must do: hold buffers, move arrays in and out of them, and run networks on them.

A network is bound to its buffers once and then run as often as needed: addresses do not change between runs,
so a backend can capture a run and replay it, and nothing is allocated while pictures are made.
"""

import contextlib
import gc
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from moma_rt.bundle.specs import NetworkSpec
from moma_rt.errors import BundleError

# Networks have tensors of several dtypes; their names in a NetworkSpec say which.
Array = NDArray[Any]
# What helps where memory ran out.
OUT_OF_MEMORY_ADVICE = "end what else runs on the device, or make fewer pictures at a time"
# Shape and dtype.
Size = tuple[tuple[int, ...], str]
K = TypeVar("K")


class Buffer(Protocol):
    """Memory of fixed address, shape and NumPy dtype that networks read and write."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...


class Bound(Protocol):
    """A network together with the buffers of all its inputs and outputs; it keeps both alive."""

    def enqueue(self) -> None:
        """Run once, after everything enqueued or uploaded before; may return before the run has ended."""


class CapturedGraph(Protocol):
    """Work that was enqueued once and can be enqueued again as a whole; it keeps alive what the work uses."""

    @property
    def is_valid(self) -> bool:
        """False once something that it was recorded with has moved."""

    @property
    def size(self) -> int:
        """About how many bytes of the device it takes, beside what it uses."""

    def replay(self) -> None:
        """Enqueue all of it; it must be usable."""


class Network(Protocol):
    """A loaded network."""

    @property
    def spec(self) -> NetworkSpec: ...

    def bind(self, buffers: Mapping[str, Buffer]) -> Bound:
        """Bind a buffer to every input and output by name; further names are ignored. No two may overlap."""


class Backend(Protocol):
    """Runs networks on one device. Everything it returns works only with itself."""

    @property
    def name(self) -> str: ...

    @property
    def supports_capture(self) -> bool:
        """Whether work can be recorded. It pays then to have few sizes, since a recording is of one."""

    @property
    def is_host(self) -> bool:
        """Whether buffers lie in the host's own memory: another copy of what is there already is of no use then."""

    def load(self, spec: NetworkSpec, path: Path, weights: Sequence[Path] = ()) -> Network:
        """Load a network from the file that this backend runs: an ONNX graph, or an engine.

        Args:
            weights: the safetensors files that hold its weights, where the file itself does not. A tensor that two
                networks read is in memory once, as far as the library lets it.

        Raises:
            BundleError: the file is no such network, this backend cannot run it, or the weights are not the network's.
            OutOfMemory: there is no room for it.
        """

    def allocate(self, wanted: Mapping[K, Size]) -> dict[K, Buffer]:
        """Zeroed buffers that are needed as long as each other, together. A dimension may be 0.

        Raises:
            OutOfMemory: there is no room for all of them.
        """

    def upload(self, buffer: Buffer, array: Array, row: int | None = None) -> None:
        """Copy an array of the buffer's shape, or of that of a row of it, into it, converted to its dtype."""

    def copy_row(self, table: Buffer, row: int, target: Buffer) -> None:
        """Enqueue a copy of a row of `table` to `target`, which has a row's shape and the table's dtype."""

    def fill_row(self, target: Buffer, row: int, source: Buffer) -> None:
        """Enqueue a copy of `source`, [n,...], to the beginning of a row of `target`, [B,N,...], and zeros after it.

        n is N at most; both are of one dtype.
        """

    def download(self, buffer: Buffer) -> Array:
        """A new array with the buffer's content, once everything enqueued before has run."""

    def capture(self, enqueue: Callable[[], None]) -> CapturedGraph | None:
        """Record what `enqueue` enqueues, without running it: networks and copies of rows, all of which ran before.

        None where this cannot be recorded.

        Raises:
            OutOfMemory: there is no room for the recording.
        """

    def limit_run_ahead(self) -> None:
        """Wait until everything enqueued before the last call of this has run; returns when the first one is made.

        So whoever calls it after each piece of work is one piece ahead of the device, which never waits for him.
        """

    def trim(self) -> None:
        """Give back memory that is only kept to be there for the next run."""

    def synchronize(self) -> None:
        """Wait until everything enqueued before has run."""


def check_shape(buffer: Buffer, array: Array, row: int | None) -> None:
    """Refuse an array that is neither of the buffer's shape nor, with `row`, of that of its rows.

    Raises:
        ValueError: another shape.
    """
    shape = buffer.shape if row is None else buffer.shape[1:]
    if array.shape != shape:
        raise ValueError(f"an array of shape {array.shape} does not fit a buffer of shape {shape}")


def nbytes(buffer: Buffer) -> int:
    """How much memory a buffer's content takes."""
    return buffer.dtype.itemsize * math.prod(buffer.shape)


def check_tensors(path: Path, what: str, expected: Iterable[str], found: Iterable[str]) -> None:
    """Refuse a file whose inputs or outputs are not those of the manifest.

    Raises:
        BundleError: some are missing, or there are further ones.
    """
    want, have = set(expected), set(found)
    if want != have:
        raise BundleError(
            f"{path}: its {what} are not the manifest's: missing {sorted(want - have)}, further {sorted(have - want)}"
        )


@contextlib.contextmanager
def gc_disabled() -> Iterator[None]:
    """Without the garbage collector, which may find memory of a device: a thread that captures must not free any."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
