"""The networks of a bundle, loaded when first needed, and single runs of them."""

import contextlib
import weakref
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np

from moma_rt.backends.base import Array, Backend, Buffer, Network
from moma_rt.bundle.engines import EngineEntry
from moma_rt.bundle.footprint import Footprint, combined_bytes, footprint, format_bytes
from moma_rt.bundle.manifest import Bundle
from moma_rt.bundle.specs import Geometry, NetworkSpec
from moma_rt.errors import BundleError, OutOfMemory, os_error_line
from moma_rt.timing import LOADING, StageTimer

T = TypeVar("T")


class Networks:
    """Loads each network of a bundle when it is needed, after checking the hashes of the files that this reads.

    engines: what is loaded for each network, where the backend runs engines; None where it runs the ONNX files.
    budget: bytes that loaded networks may need together. Those that were used longest ago go where another one needs
        the room; None keeps all of them.
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
        self._on_unload: list[weakref.WeakMethod[Callable[[str], None]]] = []

    @property
    def geometry(self) -> Geometry:
        return self.bundle.manifest.geometry

    def on_unload(self, call: Callable[[str], None]) -> None:
        """Have `call`, a method, told of each network that is to be unloaded: what it holds on to has to be let go.

        Its object is not kept alive, so that a runtime goes, and with it what it holds of a device, when nobody has it.
        """
        self._on_unload.append(weakref.WeakMethod(call))

    def get(self, name: str, stages: StageTimer) -> Network:
        """The network, loaded now if it was not.

        Raises:
            BundleError: the bundle has no such network, or its files were altered or cannot be loaded.
            OutOfMemory: it needs more than the budget.
        """
        return self.get_all((name,), stages)[0]

    def get_all(self, names: tuple[str, ...], stages: StageTimer) -> tuple[Network, ...]:
        """Networks that are needed at the same time. Raises what `get` raises."""
        if any(name not in self._loaded for name in names):
            self._evict_for(names)
        for name in names:
            network = self._loaded.pop(name, None)
            # Last is what was used last.
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
            return self.retry_after_eviction(lambda: self.backend.load(entry.spec, self.bundle.path(code), paths))

    def _verify(self, code: str, weights: Collection[str]) -> None:
        """Hash what is to be loaded; a weights file, which several networks may read, once until it changes."""
        states = {file: _state(self.bundle.path(file)) for file in weights}
        changed = [file for file, state in states.items() if self._verified.get(file) != state]
        self.bundle.verified([code, *changed])
        self._verified |= states

    def _evict_for(self, names: tuple[str, ...]) -> None:
        if self._budget is None:
            return
        for name in names:
            # What is not there is no question of room.
            self.bundle.network(name)
        need = combined_bytes(self._footprint(name) for name in names)
        if need > self._budget:
            raise OutOfMemory(
                f"{' and '.join(names)}: {format_bytes(need)} of memory needed, the memory budget is "
                f"{format_bytes(self._budget)}"
            )
        leaving = [name for name in self._loaded if name not in names]
        while leaving and combined_bytes(map(self._footprint, {*self._loaded, *names})) > self._budget:
            self._unload(leaving.pop(0))

    def _unload(self, name: str) -> None:
        self._before_unload(name)
        # What still runs keeps its network, and a region to compute in that is as large as the largest needed.
        self.backend.trim()
        del self._loaded[name]

    def _before_unload(self, name: str) -> None:
        for call in self._on_unload:
            if (method := call()) is not None:
                method(name)

    def retry_after_eviction(self, make: Callable[[], T]) -> T:
        """What `make` makes; where there is no room, once more without what is only kept for the next picture.

        Raises:
            OutOfMemory: there is no room even so.
        """
        with contextlib.suppress(OutOfMemory):
            return make()
        for name in self._loaded:
            self._before_unload(name)
        self.backend.trim()
        try:
            return make()
        except OutOfMemory:
            # What this call made room for is not held against the next one.
            self.backend.trim()
            raise

    def _footprint(self, name: str) -> Footprint:
        return footprint(self.bundle.manifest, name, None if self._engines is None else self._engines[name])

    def run(
        self, name: str, inputs: Mapping[str, Array | Buffer], stages: StageTimer, wanted: Collection[str] | None = None
    ) -> dict[str, Array]:
        """Run a network once on buffers made for this run: for what is computed once a subject or a prompt.

        Args:
            inputs: arrays, which are uploaded, or buffers, which are read where they are.
            wanted: the outputs to download; None: all of them.
        """
        network = self.get(name, stages)
        with stages.timed(name):
            return self.retry_after_eviction(lambda: run_once(self.backend, network, inputs, wanted))


def _state(path: Path) -> tuple[int, int, int]:
    """What changes when a file does."""
    try:
        stat = path.stat()
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {os_error_line(error)}; build the bundle again") from None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def run_once(
    backend: Backend, network: Network, inputs: Mapping[str, Array | Buffer], wanted: Collection[str] | None = None
) -> dict[str, Array]:
    """A network's outputs for these inputs, on buffers of their sizes: see `Networks.run`.

    Raises:
        ValueError: inputs whose sizes do not fit each other or the network.
    """
    spec = network.spec
    sizes = sizes_of(spec, inputs)
    arrays = {t.name: array for t in spec.inputs if isinstance(array := inputs[t.name], np.ndarray)}
    made = (*(t for t in spec.inputs if t.name in arrays), *spec.outputs)
    buffers = backend.allocate({t.name: (t.resolve(**sizes), t.dtype) for t in made})
    for name, array in arrays.items():
        backend.upload(buffers[name], array)
    given = {name: buffer for name, buffer in inputs.items() if not isinstance(buffer, np.ndarray)}
    network.bind({**given, **buffers}).enqueue()
    return {t.name: backend.download(buffers[t.name]) for t in spec.outputs if wanted is None or t.name in wanted}


def sizes_of(spec: NetworkSpec, inputs: Mapping[str, Array | Buffer]) -> dict[str, int]:
    """The size of each dynamic dimension, read off the inputs' shapes.

    Raises:
        ValueError: an input of another rank, two sizes for one dimension, or a size outside its bounds.
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
    """The most that dimension `dim_name` of a network may be; 1 if it has no such dimension."""
    sizes = [d.max for t in spec.inputs for d in t.dynamic_axes.values() if d.name == dim_name]
    return min(sizes, default=1)
