"""A bundle's networks in PyTorch: what their outputs should be, and which of their parts a precision changes most."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from export.checkpoints.model import Checkpoint
from export.networks import Network
from export.quantize import dequantize, quantize
from export.streaming import WeightSource
from moma_rt.backends.base import Array
from moma_rt.bundle.specs import Geometry, Precision

Arrays = dict[str, Array]


class TorchRuns:
    """Runs one network of a checkpoint in any precision, on the same inputs (float32 where they are not integers)."""

    def __init__(self, checkpoint: Checkpoint, network: Network, geometry: Geometry, inputs: Arrays) -> None:
        self._checkpoint, self._network, self._geometry, self._inputs = checkpoint, network, geometry, inputs

    def outputs(self) -> Arrays:
        """The outputs in fp32."""
        outputs = self._run(self._module(Precision.FP32), Precision.FP32)
        tensors = self._network.spec(self._geometry).outputs
        return {tensor.name: output.numpy() for tensor, output in zip(tensors, outputs, strict=True)}

    def module_differences(self, precision: Precision) -> list[tuple[str, float]]:
        """Each module's path and the relative L2 error of its output in a precision, worst first.

        Every operation rounds. Errors add up along the network: a module's own part is the step from those before it.
        A module that is called twice is two rows.
        """
        exact, rounded = self._recorded(Precision.FP32), self._recorded(precision)
        pairs = ((path, _relative(found, wanted)) for (path, found), (_, wanted) in zip(rounded, exact, strict=True))
        return sorted(pairs, key=lambda pair: -pair[1])

    def _recorded(self, precision: Precision) -> list[tuple[str, Tensor]]:
        """What every innermost module returned, in the order of the calls; all of it is held at once."""
        module, recorded = self._module(precision), list[tuple[str, Tensor]]()
        with _recording(module, recorded):
            self._run(module, precision)
        return recorded

    def _module(self, precision: Precision) -> nn.Module:
        module = self._network.module(self._checkpoint, self._geometry, precision)
        if precision.is_weight_only and self._network.source is not None:
            _round_weights(module, self._network.source(self._checkpoint), precision)
        return module

    def _run(self, module: nn.Module, precision: Precision) -> tuple[Tensor, ...]:
        tensors = self._network.spec(self._geometry, precision).inputs
        flat = tuple(torch.from_numpy(self._inputs[t.name].astype(t.dtype, copy=False)) for t in tensors)
        with torch.inference_mode():
            outputs = module(*self._network.arguments(flat, self._geometry))
        return outputs if isinstance(outputs, tuple) else (outputs,)


def _round_weights(module: nn.Module, source: WeightSource, precision: Precision) -> None:
    """Give projections the weights that a bundle's integers stand for."""
    for name in source.quantized:
        module.get_parameter(name).copy_(dequantize(quantize(source.read(name), precision, name)))


@contextmanager
def _recording(module: nn.Module, recorded: list[tuple[str, Tensor]]) -> Iterator[None]:
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
