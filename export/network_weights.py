"""Write a network's weights to files, and make its graph refer to them.

A file holds a group of tensors under the names that the exported module gives them. Denoiser and subject encoder share
the UNet's group; every other group belongs to one network. A file's key depends on its checkpoints and tensors, not on
the network or backend that reads it, so equal content is stored once.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
from numpy.typing import NDArray
from onnx_ir.tensor_adapters import from_torch_dtype

from engines.store import WEIGHTS_FOLDER, Artifact
from export.checkpoints.model import ADAPTERS, NETWORK_ROLES, UNET, Checkpoint
from export.checkpoints.values import converted
from export.networks import Network
from export.quantize import BLOCK, Quantized, packed_int4, quantize
from export.safetensors_writer import Place, StoredTensor, as_bytes, places, write_safetensors
from export.streaming import Projection, WeightSource
from moma_rt.bundle.specs import Geometry, Precision

WEIGHTS_NAME = "weights.safetensors"
# Raise it when the same checkpoints and tensors would give other bytes.
_VERSION = 1
# In diffusers' path of a weight that MoMA adds to an attention of the UNet.
_ADAPTER_PART = ".processor."


@dataclass(frozen=True)
class WeightGroup:
    """The tensors of one file; `key` identifies their content."""

    name: str
    key: str
    tensors: tuple[StoredTensor, ...]

    @property
    def artifact(self) -> Artifact:
        """The folder of the file."""
        return Artifact(WEIGHTS_FOLDER, self.name, self.key)

    @property
    def location(self) -> str:
        """The file's path relative to the folder of all weights."""
        return f"{self.artifact.folder.removeprefix(f'{WEIGHTS_FOLDER}/')}/{WEIGHTS_NAME}"

    def write(self, folder: Path) -> None:
        """Write the file into a folder, reading the checkpoint."""
        write_safetensors(folder / WEIGHTS_NAME, self.tensors)


@dataclass(frozen=True)
class ExternalWeights:
    """A network's weights files: their common root and their locations relative to it."""

    root: Path
    locations: tuple[str, ...]

    @property
    def files(self) -> tuple[Path, ...]:
        """The files' paths."""
        return tuple(self.root / location for location in self.locations)

    def map_into(self, model: onnx_ir.Model) -> None:
        """Memory-map the files as a graph's initializers, so that constant folding can read them.

        onnx_ir's external tensors refuse files with several hard links, which the files of a store have.
        """
        for location, name, place, value in self._initializers(model):
            mapped = np.memmap(self.root / location, np.uint8, "r", place.offset, place.length)
            array = mapped.view(value.dtype.numpy()).reshape([int(size) for size in value.shape])
            value.const_value = onnx_ir.Tensor(array, value.dtype, name=name)

    def refer(self, model: onnx_ir.Model) -> None:
        """Make a graph's initializers refer to the files as external data."""
        for location, name, place, value in self._initializers(model):
            value.const_value = onnx_ir.ExternalTensor(
                location, place.offset, place.length, value.dtype, shape=value.shape, name=name, base_dir=self.root
            )

    def _initializers(self, model: onnx_ir.Model) -> Iterator[tuple[str, str, Place, Any]]:
        """Yield location, name, place and value of every initializer of a graph whose content is in the files."""
        for location in self.locations:
            for name, place in places(self.root / location).items():
                value = model.graph.initializers.get(name)
                if value is not None:
                    yield location, name, place, value


def weight_groups(
    network: Network, checkpoint: Checkpoint, geometry: Geometry, precision: Precision
) -> tuple[WeightGroup, ...]:
    """Return the groups of a network's weights. The checkpoint's weights are read only when a group is written."""
    stored = _stored_tensors(network, checkpoint, geometry, precision)
    groups: dict[str, list[StoredTensor]] = {}
    for tensor in stored:
        is_shared = tensor.name.startswith(f"{UNET}.") and _ADAPTER_PART not in tensor.name
        groups.setdefault(UNET if is_shared else network.name, []).append(tensor)
    return tuple(
        WeightGroup(name, _key(name, network, checkpoint, tensors), tuple(tensors)) for name, tensors in groups.items()
    )


def _key(group: str, network: Network, checkpoint: Checkpoint, tensors: Sequence[StoredTensor]) -> str:
    roles = NETWORK_ROLES[network.name]
    if UNET in roles:
        roles = frozenset({UNET}) if group == UNET else frozenset({ADAPTERS})
    identity = {
        "version": _VERSION,
        "sources": {c.role: c.sha256 for c in checkpoint.components if c.role in roles},
        "tensors": {tensor.name: tensor.described for tensor in tensors},
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _stored_tensors(
    network: Network, checkpoint: Checkpoint, geometry: Geometry, precision: Precision
) -> list[StoredTensor]:
    structure = network.structure(checkpoint, geometry, precision)
    source = None if network.source is None else network.source(checkpoint)
    transposed = {f"{name}.weight" for name, part in structure.named_modules() if isinstance(part, Projection)}
    state = _LazyState(network, checkpoint, geometry, precision)
    found = []
    for name, tensor in structure.state_dict().items():
        if source is not None and precision.is_weight_only and name in source.quantized:
            found += _quantized(name, tuple(tensor.shape), source, precision)
            continue
        read = state.reader(name) if source is None else _single_reader(source, name, tensor.dtype, name in transposed)
        found.append(StoredTensor(name, from_torch_dtype(tensor.dtype), tuple(tensor.shape), read))
    return found


class _LazyState:
    """The state dict of a network's module, loaded when its first tensor is read."""

    def __init__(self, network: Network, checkpoint: Checkpoint, geometry: Geometry, precision: Precision) -> None:
        self._load = lambda: network.module(checkpoint, geometry, precision).state_dict()
        self._state: dict[str, Any] | None = None

    def reader(self, name: str) -> Callable[[], NDArray[Any]]:
        def read() -> NDArray[Any]:
            if self._state is None:
                self._state = self._load()
            return as_bytes(self._state[name])

        return read


def _single_reader(source: WeightSource, name: str, dtype: Any, is_transposed: bool) -> Callable[[], NDArray[Any]]:
    def read() -> NDArray[Any]:
        tensor = converted(source.read(name), dtype, f"the language model: {name}")
        return as_bytes(tensor.t() if is_transposed else tensor)

    return read


def _quantized(
    name: str, shape_kn: tuple[int, ...], source: WeightSource, precision: Precision
) -> tuple[StoredTensor, StoredTensor]:
    """Return the integers and scales of a matrix, named as by `export.streaming.quantize_weights`."""
    inputs, outputs = shape_kn
    is_int4 = precision is Precision.INT4
    dtype = onnx_ir.DataType.INT4 if is_int4 else onnx_ir.DataType.INT8
    scale_shape = (inputs // BLOCK, outputs) if is_int4 else (outputs,)
    matrix = _QuantizedMatrix(name, source, precision)
    return (
        StoredTensor(f"{name}.values", dtype, shape_kn, matrix.values),
        StoredTensor(f"{name}.scales", onnx_ir.DataType.FLOAT16, scale_shape, matrix.scales),
    )


class _QuantizedMatrix:
    """A matrix's integers and scales. Reading the integers keeps the scales, which are usually read next."""

    def __init__(self, name: str, source: WeightSource, precision: Precision) -> None:
        self._name, self._source, self._precision = name, source, precision
        self._kept: NDArray[Any] | None = None

    def values(self) -> NDArray[Any]:
        quantized = self._quantize()
        self._kept = quantized.scales
        is_int4 = self._precision is Precision.INT4
        return packed_int4(quantized.values_kn) if is_int4 else quantized.values_kn

    def scales(self) -> NDArray[Any]:
        kept, self._kept = self._kept, None
        return kept if kept is not None else self._quantize().scales

    def _quantize(self) -> Quantized:
        return quantize(self._source.read(self._name), self._precision, self._name)
