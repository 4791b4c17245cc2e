"""The networks of a bundle, loaded when first needed, and single runs of them."""

from collections.abc import Mapping

from moma_rt.backends.base import Array, Backend, Network
from moma_rt.bundle import Bundle
from moma_rt.engines import EngineEntry
from moma_rt.specs import Geometry, NetworkSpec
from moma_rt.stages import LOADING, Stages


class Networks:
    """Loads each network of a bundle at most once, after checking the hashes of the files that this reads.

    engines: what is loaded for each network, where the backend runs engines; None where it runs the ONNX files.
    """

    def __init__(self, bundle: Bundle, backend: Backend, engines: Mapping[str, EngineEntry] | None = None) -> None:
        self.bundle = bundle
        self.backend = backend
        self._engines = engines
        self._loaded: dict[str, Network] = {}

    @property
    def geometry(self) -> Geometry:
        return self.bundle.manifest.geometry

    def get(self, name: str, stages: Stages) -> Network:
        """The network, loaded now if it was not.

        Raises:
            BundleError: the bundle has no such network, or its files were altered or cannot be loaded.
        """
        if name not in self._loaded:
            entry = self.bundle.network(name)
            file, read = entry.onnx, entry.onnx_files
            if self._engines is not None:
                file = self._engines[name].file
                read = (file,)
            with stages.timed(LOADING):
                self.bundle.verified(read)
                self._loaded[name] = self.backend.load(entry.spec, self.bundle.path(file))
        return self._loaded[name]

    def run(self, name: str, inputs: Mapping[str, Array], stages: Stages) -> dict[str, Array]:
        """Run a network once on buffers made for this run: for what is computed once a subject or a prompt."""
        network = self.get(name, stages)
        with stages.timed(name):
            return run_once(self.backend, network, inputs)


def run_once(backend: Backend, network: Network, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """A network's outputs for these inputs, on buffers of their sizes.

    Raises:
        ValueError: inputs whose sizes do not fit each other or the network.
    """
    spec = network.spec
    sizes = sizes_of(spec, inputs)
    buffers = {t.name: backend.allocate(t.resolve(**sizes), t.dtype) for t in (*spec.inputs, *spec.outputs)}
    for tensor in spec.inputs:
        backend.upload(buffers[tensor.name], inputs[tensor.name])
    network.bind(buffers).enqueue()
    return {tensor.name: backend.download(buffers[tensor.name]) for tensor in spec.outputs}


def sizes_of(spec: NetworkSpec, inputs: Mapping[str, Array]) -> dict[str, int]:
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
