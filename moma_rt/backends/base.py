"""What a backend must do: hold buffers, move arrays in and out of them, and run networks on them.

A network is bound to its buffers once and then run as often as needed: addresses do not change between runs,
so a backend can capture a run and replay it, and nothing is allocated while pictures are made.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from moma_rt.errors import BundleError
from moma_rt.specs import NetworkSpec

# Networks have tensors of several dtypes; their names in a NetworkSpec say which.
Array = NDArray[Any]


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

    def load(self, spec: NetworkSpec, path: Path) -> Network:
        """Load a network from the file that this backend runs: an ONNX graph, or an engine.

        Raises:
            BundleError: the file is no such network, or this backend cannot run it.
        """

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        """A zeroed buffer. A dimension may be 0."""

    def upload(self, buffer: Buffer, array: Array) -> None:
        """Copy an array of the buffer's shape into it, converted to its dtype."""

    def download(self, buffer: Buffer) -> Array:
        """A new array with the buffer's content, once everything enqueued before has run."""

    def synchronize(self) -> None:
        """Wait until everything enqueued before has run."""


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
