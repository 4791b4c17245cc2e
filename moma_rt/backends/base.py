"""The interface of a backend: allocate buffers, copy arrays in and out of them, and run networks on them.

A network is bound to its buffers once and then run any number of times. Addresses do not change between runs, so a
backend can capture a run and replay it, and generating pictures allocates nothing.
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

# Tensors have several dtypes, which their NetworkSpec names.
Array = NDArray[Any]
OUT_OF_MEMORY_ADVICE = "close other programs on the device, or generate fewer pictures at a time"
# A buffer's shape and dtype.
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
        """Enqueue one run, after all earlier work and uploads; may return before it has finished."""


class CapturedGraph(Protocol):
    """Work that was captured once and can be replayed as a whole; it keeps the networks and buffers in it alive."""

    @property
    def is_valid(self) -> bool:
        """False once an address in the captured work is out of date."""

    @property
    def size(self) -> int:
        """Approximate device memory of the graph in bytes, without the networks and buffers in it."""

    def replay(self) -> None:
        """Enqueue the captured work; the graph must be valid."""


class Network(Protocol):
    """A loaded network."""

    @property
    def spec(self) -> NetworkSpec: ...

    def bind(self, buffers: Mapping[str, Buffer]) -> Bound:
        """Bind a buffer to every input and output by name; extra names are ignored. No two may overlap."""


class Backend(Protocol):
    """Runs networks on one device. The networks and buffers it returns work only with this backend."""

    @property
    def name(self) -> str: ...

    @property
    def supports_capture(self) -> bool:
        """Whether work can be captured. A graph has fixed shapes, so a caller should then use few different ones."""

    @property
    def is_host(self) -> bool:
        """Whether buffers are in host memory, where caching a copy of host data is useless."""

    @property
    def survives_fork(self) -> bool:
        """Whether networks can be loaded in a process that was forked while none of them ran."""

    def load(self, spec: NetworkSpec, path: Path, weights: Sequence[Path] = ()) -> Network:
        """Load a network from the file that this backend runs: an ONNX graph, or an engine.

        Args:
            weights: the safetensors files with its weights, if the file itself does not contain them. A tensor that
                several networks read is loaded once, if the library allows it.

        Raises:
            BundleError: the file is not this network, this backend cannot run it, or the weights do not match.
            OutOfMemory: there is too little memory for it.
        """

    def allocate(self, wanted: Mapping[K, Size]) -> dict[K, Buffer]:
        """Allocate zeroed buffers that are used and freed together. A dimension may be 0.

        Raises:
            OutOfMemory: there is too little memory for all of them.
        """

    def upload(self, buffer: Buffer, array: Array, row: int | None = None) -> None:
        """Copy an array of the buffer's shape, or of one row's shape to `row`, converted to the buffer's dtype."""

    def copy_row(self, table: Buffer, row: int, target: Buffer) -> None:
        """Enqueue a copy of a row of `table` to `target`, which has a row's shape and the table's dtype."""

    def fill_row(self, target: Buffer, row: int, source: Buffer) -> None:
        """Enqueue a copy of `source`, [n,...], to the start of a row of `target`, [B,N,...], and zero the rest of it.

        n <= N, and both have the same dtype.
        """

    def download(self, buffer: Buffer) -> Array:
        """Wait for all work enqueued before and return the buffer's content as a new array."""

    def capture(self, enqueue: Callable[[], None]) -> CapturedGraph | None:
        """Capture the work that `enqueue` enqueues, without running it; None if it cannot be captured.

        The work may be runs of networks and copies of rows, each of which has run before.

        Raises:
            OutOfMemory: there is too little memory for the graph.
        """

    def limit_run_ahead(self) -> None:
        """Wait until all work enqueued before the previous call has run; the first call returns at once.

        A caller that does so after each step stays one step ahead, so the device never waits for the host.
        """

    def trim(self) -> None:
        """Free memory that is only cached for the next run."""

    def synchronize(self) -> None:
        """Wait until all work enqueued before has run."""


def check_shape(buffer: Buffer, array: Array, row: int | None) -> None:
    """Check that an array has the buffer's shape or, if `row` is given, the shape of one row.

    Raises:
        ValueError: it has another shape.
    """
    shape = buffer.shape if row is None else buffer.shape[1:]
    if array.shape != shape:
        raise ValueError(f"an array of shape {array.shape} does not fit a buffer of shape {shape}")


def nbytes(buffer: Buffer) -> int:
    """Size of a buffer's content in bytes."""
    return buffer.dtype.itemsize * math.prod(buffer.shape)


def check_tensors(path: Path, what: str, expected: Iterable[str], found: Iterable[str]) -> None:
    """Check a file's inputs or outputs against those of the manifest.

    Raises:
        BundleError: some are missing or unexpected.
    """
    want, have = set(expected), set(found)
    if want != have:
        raise BundleError(
            f"{path}: its {what} differ from the manifest's: missing {sorted(want - have)}, "
            f"unexpected {sorted(have - want)}; build the bundle again"
        )


@contextlib.contextmanager
def gc_disabled() -> Iterator[None]:
    """Disable the garbage collector: it may free device memory, which a thread must not do during a capture."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
