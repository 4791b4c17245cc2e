"""Networks of a bundle: loaded on first use, evicted to stay within a memory budget; and single runs of them."""

import contextlib
import os
import weakref
from collections.abc import Callable, Collection, Mapping
from typing import TypeVar

import numpy as np

from moma_rt.backends.base import Array, Backend, Buffer, Network
from moma_rt.bundle.contents import state_of
from moma_rt.bundle.engines import EngineEntry
from moma_rt.bundle.footprint import Footprint, combined_bytes, footprint, format_bytes
from moma_rt.bundle.manifest import Bundle
from moma_rt.bundle.specs import Geometry, NetworkSpec, Precision
from moma_rt.errors import BundleError, MomaError, OutOfMemory, memory_errors
from moma_rt.finite import all_finite
from moma_rt.timing import LOADING, StageTimer

T = TypeVar("T")


class Networks:
    """Loads a bundle's networks on first use, after verifying the hashes of the files that are read.

    Args:
        engines: engine of each network, if the backend runs engines; None: the backend runs the ONNX files.
        budget: bytes that the loaded networks may need; the least recently used are evicted for another one. None: no
            limit.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        engines: Mapping[str, EngineEntry] | None = None,
        budget: int | None = None,
    ) -> None:
        self.bundle = bundle
        self.backend = backend
        self._engines = engines
        self._budget = budget
        self._loaded: dict[str, Network] = {}
        self._verified: dict[str, tuple[int, int, int]] = {}
        self._on_eviction: list[weakref.WeakMethod[Callable[[str], None]]] = []

    @property
    def geometry(self) -> Geometry:
        return self.bundle.manifest.geometry

    def on_eviction(self, call: Callable[[str], None]) -> None:
        """Register a method that takes a network's name and drops what its object caches for that network.

        It is called before a network is unloaded, and for all loaded networks when memory runs out. The object is
        referenced weakly, so that device memory is freed with the last reference to the runtime.
        """
        self._on_eviction.append(weakref.WeakMethod(call))

    def get(self, name: str, stages: StageTimer) -> Network:
        """Return a network, loaded if it is not yet.

        Raises:
            BundleError: the bundle has no such network, or its files were altered or cannot be loaded.
            OutOfMemory: it needs more than the budget, or than the device has left.
        """
        return self.get_all((name,), stages)[0]

    def get_all(self, names: tuple[str, ...], stages: StageTimer) -> tuple[Network, ...]:
        """Return networks that are needed at the same time. Raises what `get` raises."""
        if any(name not in self._loaded for name in names):
            self._evict_for(names)
        for name in names:
            network = self._loaded.pop(name, None)
            # Inserted anew: the dict is in order of last use.
            self._loaded[name] = self._load(name, stages) if network is None else network
        return tuple(self._loaded[name] for name in names)

    def _load(self, name: str, stages: StageTimer) -> Network:
        entry = self.bundle.network(name)
        engine = None if self._engines is None else self._engines[name]
        code = self.bundle.graph(name) if engine is None else engine.file
        weights = entry.weights if engine is None or engine.flavour.reads_weights else ()
        paths = tuple(map(self.bundle.path, weights))
        with stages.timed(LOADING):
            self._verify(code, weights)
            try:
                return self.retry_after_eviction(lambda: self.backend.load(entry.spec, self.bundle.path(code), paths))
            except OSError as error:
                raise BundleError(f"{self.bundle.path(code)} cannot be read: {error.strerror or error}") from None

    def _verify(self, code: str, weights: Collection[str]) -> None:
        """Verify the hashes of the files to load; weights files, which networks may share, again only if changed."""
        states = {file: _state(state_of(self.bundle.root, file)) for file in weights}
        changed = [file for file, state in states.items() if self._verified.get(file) != state]
        self.bundle.verify([code, *changed])
        self._verified |= states

    def _evict_for(self, names: tuple[str, ...]) -> None:
        if self._budget is None:
            return
        for name in names:
            # A missing network is a BundleError, not a matter of memory.
            self.bundle.network(name)
        need = combined_bytes(self._footprint(name) for name in names)
        if need > self._budget:
            raise OutOfMemory(
                f"{' and '.join(names)}: {format_bytes(need)} of memory needed, the memory budget is "
                f"{format_bytes(self._budget)}: raise it"
            )
        evictable = [name for name in self._loaded if name not in names]
        while evictable and combined_bytes(map(self._footprint, {*self._loaded, *names})) > self._budget:
            self._unload(evictable.pop(0))

    def _unload(self, name: str) -> None:
        self._drop_caches(name)
        # Enqueued work still refers to the network, and the workspace has the size that the largest network needed.
        self.backend.trim()
        del self._loaded[name]

    def renew(self) -> None:
        """Forget all loaded networks in a forked process, where they cannot run: they are loaded again when needed."""
        for name in self._loaded:
            self._drop_caches(name)
        self._loaded.clear()

    def _drop_caches(self, name: str) -> None:
        for call in self._on_eviction:
            if (method := call()) is not None:
                method(name)

    def retry_after_eviction(self, make: Callable[[], T]) -> T:
        """Call `make`; on out of memory, evict cached buffers, graphs and subjects, and call it once more.

        Raises:
            OutOfMemory: memory is too short even then.
        """
        with contextlib.suppress(OutOfMemory), memory_errors():
            return make()
        for name in self._loaded:
            self._drop_caches(name)
        self.backend.trim()
        try:
            with memory_errors():
                return make()
        except OutOfMemory:
            # Free what the failed attempt allocated, so that the next call has it.
            self.backend.trim()
            raise

    def _footprint(self, name: str) -> Footprint:
        return footprint(self.bundle.manifest, name, None if self._engines is None else self._engines[name])

    def run(
        self, name: str, inputs: Mapping[str, Array | Buffer], stages: StageTimer, wanted: Collection[str] | None = None
    ) -> dict[str, Array]:
        """Run a network once, on buffers allocated for this run: for results computed once per subject or prompt.

        Args:
            inputs: arrays, which are uploaded, or buffers, which are bound as they are.
            wanted: the outputs to download; None: all of them.

        Raises:
            MomaError: an output is NaN or infinity.
        """
        network = self.get(name, stages)
        with stages.timed(name):
            outputs = self.retry_after_eviction(lambda: run_once(self.backend, network, inputs, wanted))
            for output, array in outputs.items():
                if not all_finite(array):
                    arrays = (a for a in inputs.values() if isinstance(a, np.ndarray) and a.size)
                    given = [np.abs(a).max() for a in arrays if a.dtype.kind == "f"]
                    largest = f" from numbers of up to {max(given):.3g}" if given else ""
                    raise MomaError(
                        f"{name} computed NaN or infinity ({output}){largest}: {self.overflow_advice(name)}"
                    )
            return outputs

    def overflow_advice(self, name: str) -> str:
        """What to do about a network that makes NaN or infinity of finite inputs, as the end of a sentence."""
        precision = self.bundle.network(name).precision
        if precision.edge_dtype == "float16":
            option = "--mllm-precision" if name == "language_model" else "--precision"
            return (
                f"numbers beyond half precision are likely; build it with --only {name} {option} {Precision.FP32.value}"
            )
        return (
            f"it computes in {precision.value}, so another precision cannot help: check its checkpoint and its inputs"
        )


def _state(stat: os.stat_result) -> tuple[int, int, int]:
    """A file's inode, size and modification time, of which one changes when the file does."""
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def run_once(
    backend: Backend, network: Network, inputs: Mapping[str, Array | Buffer], wanted: Collection[str] | None = None
) -> dict[str, Array]:
    """Run a network once, as `Networks.run` does, and return its outputs.

    Raises:
        ValueError: the inputs' sizes do not fit each other or the network.
    """
    spec = network.spec
    sizes = sizes_of(spec, inputs)
    arrays = {t.name: array for t in spec.inputs if isinstance(array := inputs[t.name], np.ndarray)}
    tensors = (*(t for t in spec.inputs if t.name in arrays), *spec.outputs)
    buffers = backend.allocate({t.name: (t.resolve(**sizes), t.dtype) for t in tensors})
    for name, array in arrays.items():
        backend.upload(buffers[name], array)
    given = {name: buffer for name, buffer in inputs.items() if not isinstance(buffer, np.ndarray)}
    network.bind({**given, **buffers}).enqueue()
    return {t.name: backend.download(buffers[t.name]) for t in spec.outputs if wanted is None or t.name in wanted}


def sizes_of(spec: NetworkSpec, inputs: Mapping[str, Array | Buffer]) -> dict[str, int]:
    """Size of each dynamic dimension, from the inputs' shapes.

    Raises:
        ValueError: an input has another rank, a dimension has two sizes, or a size is out of bounds.
    """
    sizes: dict[str, int] = {}
    for tensor in spec.inputs:
        shape = inputs[tensor.name].shape
        if len(shape) != len(tensor.shape):
            raise ValueError(f"{spec.name}: {tensor.name} has shape {shape}, its rank must be {len(tensor.shape)}")
        for axis, dim in tensor.dynamic_axes.items():
            size = sizes.setdefault(dim.name, shape[axis])
            if size != shape[axis] or not dim.min <= size <= dim.max:
                raise ValueError(
                    f"{spec.name}: {dim.name} of {tensor.name} is {shape[axis]}; "
                    f"elsewhere it is {size}, and it may be {dim.min} to {dim.max}"
                )
    return sizes


def largest(spec: NetworkSpec, dim_name: str) -> int:
    """Upper bound of a network's dimension `dim_name`; 1 if it has no such dimension."""
    sizes = [d.max for t in spec.inputs for d in t.dynamic_axes.values() if d.name == dim_name]
    return min(sizes, default=1)
