"""Which parts of a network a lower precision changes most."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from export.checkpoints.model import Checkpoint
from export.networks import NETWORKS
from moma_rt.backends.base import Array
from moma_rt.bundle import Bundle, NetworkEntry
from moma_rt.specs import Precision


def module_differences(
    checkpoint: Checkpoint, bundle: Bundle, entry: NetworkEntry, inputs: dict[str, Array]
) -> list[tuple[str, float]]:
    """Each module's path and the relative L2 error of its output, worst first.

    Both runs are PyTorch's, the second in the bundle's precision, where every operation rounds. Errors add up along
    the network: a module's own part is the step from those before it.
    """
    exact = _outputs(checkpoint, bundle, Precision.FP32, entry, inputs)
    rounded = _outputs(checkpoint, bundle, entry.precision, entry, inputs)
    # A module that is called twice is two rows, in the order of the calls.
    pairs = ((path, _relative(found, wanted)) for (path, found), (_, wanted) in zip(rounded, exact, strict=True))
    return sorted(pairs, key=lambda pair: -pair[1])


def _outputs(
    checkpoint: Checkpoint, bundle: Bundle, precision: Precision, entry: NetworkEntry, inputs: dict[str, Array]
) -> list[tuple[str, Tensor]]:
    network, geometry = NETWORKS[entry.spec.name], bundle.manifest.geometry
    spec = network.spec(geometry, precision)
    module = network.module(checkpoint, geometry, precision)
    flat = tuple(torch.from_numpy(inputs[t.name].astype(t.dtype, copy=False)) for t in spec.inputs)
    recorded: list[tuple[str, Tensor]] = []
    with torch.inference_mode(), _recording(module, recorded):
        module(*network.arguments(flat, geometry))
    return recorded


@contextmanager
def _recording(module: nn.Module, recorded: list[tuple[str, Tensor]]) -> Iterator[None]:
    """Record what every innermost module returns."""

    def hook(path: str) -> Any:
        def record(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                recorded.append((path, output.float()))

        return record

    leaves = [(path, m) for path, m in module.named_modules() if path and not any(True for _ in m.children())]
    handles = [leaf.register_forward_hook(hook(path)) for path, leaf in leaves]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp_min(torch.finfo(torch.float32).tiny))
