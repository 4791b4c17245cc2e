"""The inputs for tracing a network: example tensors, and which of their sizes may vary."""

from typing import Any

import torch

from export.networks import Network
from moma_rt.bundle.specs import Dim, Geometry, NetworkSpec, TensorSpec


def tracing_arguments(
    network: Network, spec: NetworkSpec, geometry: Geometry, device: str
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Return a network's positional arguments on a device, and their dynamic dimensions for `torch.export`."""
    dims: dict[str, Any] = {}
    arguments = network.arguments(tuple(t.to(device) for t in example_inputs(spec)), geometry)
    return arguments, network.arguments(tuple(_dynamic_shape(tensor, dims) for tensor in spec.inputs), geometry)


def example_inputs(spec: NetworkSpec, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Return inputs with small sizes for dynamic dimensions, never 0 or 1 where the spec allows more.

    Tracing takes a size of 0 or 1 for a constant, and equal sizes for one dimension, so the sizes here differ.
    """
    generator = torch.Generator().manual_seed(seed)
    return tuple(_example(tensor, generator) for tensor in spec.inputs)


def _example(tensor: TensorSpec, generator: torch.Generator) -> torch.Tensor:
    shape = tuple(_example_size(d) if isinstance(d, Dim) else d for d in tensor.shape)
    if tensor.dtype == "int32":
        return torch.arange(shape[-1], dtype=torch.int32).expand(shape).contiguous()
    return torch.rand(shape, generator=generator).to(getattr(torch, tensor.dtype))


def _example_size(dim: Dim) -> int:
    sizes = {"batch": 2, "guided_batch": 4, "sequence": 7, "past": 5, "image_sequence": 9}
    wanted = sizes.get(dim.name, dim.opt)
    return max(dim.min, min(dim.max, max(2, wanted)))


def _dynamic_shape(tensor: TensorSpec, dims: dict[str, Any]) -> dict[int, Any]:
    return {
        axis: dims.setdefault(d.name, torch.export.Dim(d.name, max=d.max)) for axis, d in tensor.dynamic_axes.items()
    }
