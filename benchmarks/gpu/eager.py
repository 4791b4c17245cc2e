"""The denoiser that a bundle was exported from, in eager PyTorch: the expected result of a package."""

import argparse
import dataclasses
import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

import kernels.dispatch
from export.build import add_checkpoint_options
from export.checkpoints.model import Checkpoint, Component, StateDict
from export.compare import same_checkpoint
from export.networks import NETWORKS
from moma_rt.backends.base import Array
from moma_rt.bundle.manifest import Bundle
from moma_rt.bundle.specs import Geometry, Precision


def checkpoint_of_bundle(bundle: Bundle, names: tuple[str, ...]) -> Checkpoint:
    """Return the random checkpoint that the named networks of a bundle were built from. Its weights are cached.

    Raises:
        CheckpointError: the bundle was built from other weights.
    """
    parser = argparse.ArgumentParser()
    add_checkpoint_options(parser, base_required=False)
    return with_weights_kept(same_checkpoint(parser.parse_args([]), bundle, names))


def with_weights_kept(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint whose components cache their weights, which callers must not modify."""

    def kept(component: Component) -> Component:
        load = functools.cache(component.load)

        def copied(names: Iterable[str] | None = None) -> StateDict:
            return dict(load() if names is None else load(tuple(names)))

        return dataclasses.replace(component, load=copied)

    found = {field.name: getattr(checkpoint, field.name) for field in dataclasses.fields(checkpoint)}
    return dataclasses.replace(
        checkpoint, **{name: kept(value) for name, value in found.items() if isinstance(value, Component)}
    )


class EagerDenoiser:
    """A denoising step in one precision. Uses neither TF32 nor fused kernels."""

    def __init__(self, checkpoint: Checkpoint, geometry: Geometry, precision: Precision, device: str) -> None:
        self._network, self._geometry = NETWORKS["denoiser"], geometry
        self._spec = self._network.spec(geometry, precision)
        module = self._network.module(checkpoint, self._geometry, precision)
        # Meta buffers, which no forward reads, cannot be moved to a device.
        for part in module.modules():
            for name, buffer in list(part.named_buffers(recurse=False)):
                if buffer.is_meta:
                    delattr(part, name)
        self._module, self._device = module.to(device), device

    def outputs(self, inputs: dict[str, Array]) -> dict[str, Array]:
        """Return the outputs for these inputs, by name, in fp32."""
        flat = tuple(torch.from_numpy(inputs[t.name].astype(t.dtype)).to(self._device) for t in self._spec.inputs)
        with torch.inference_mode(), plain_operators():
            outputs: Any = self._module(*self._network.arguments(flat, self._geometry))
        return {t.name: o.float().cpu().numpy() for t, o in zip(self._spec.outputs, outputs, strict=True)}


@contextmanager
def plain_operators() -> Iterator[None]:
    """Make the custom operators run their PyTorch definition instead of a Triton kernel, and disable TF32."""
    had_triton, tf32 = kernels.dispatch.HAS_TRITON, torch.backends.cudnn.allow_tf32
    kernels.dispatch.HAS_TRITON = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        kernels.dispatch.HAS_TRITON, torch.backends.cudnn.allow_tf32 = had_triton, tf32
