"""Run a bundle's networks in PyTorch, for reference outputs and for each module's error in a lower precision."""

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
        """Return the network's outputs in fp32."""
        outputs = self._run(self._module(Precision.FP32), Precision.FP32)
        tensors = self._network.spec(self._geometry).outputs
        return {tensor.name: output.numpy() for tensor, output in zip(tensors, outputs, strict=True)}

    def module_differences(self, precision: Precision) -> list[tuple[str, float]]:
        """Return each module's path and the relative L2 error of its output in a precision, worst first.

        Every operation rounds, and errors accumulate along the network: a module's own share is the increase over the
        modules before it. A module that is called twice has two rows.
        """
        exact, rounded = self._module_outputs(Precision.FP32), self._module_outputs(precision)
        pairs = ((path, _relative(found, wanted)) for (path, found), (_, wanted) in zip(rounded, exact, strict=True))
        return sorted(pairs, key=lambda pair: -pair[1])

    def _module_outputs(self, precision: Precision) -> list[tuple[str, Tensor]]:
        """Return the output of every innermost module call, in order; all are in memory at once."""
        module, outputs = self._module(precision), list[tuple[str, Tensor]]()
        with _collecting(module, outputs):
            self._run(module, precision)
        return outputs

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
    """Replace the projections' weights by the values that a bundle's integers stand for."""
    for name in source.quantized:
        module.get_parameter(name).copy_(dequantize(quantize(source.read(name), precision, name)))


@contextmanager
def _collecting(module: nn.Module, outputs: list[tuple[str, Tensor]]) -> Iterator[None]:
    def hook(path: str) -> Any:
        def collect(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                outputs.append((path, output.float()))

        return collect

    leaves = [(path, m) for path, m in module.named_modules() if path and not any(True for _ in m.children())]
    handles = [leaf.register_forward_hook(hook(path)) for path, leaf in leaves]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp_min(torch.finfo(torch.float32).tiny))
