"""Which networks of a VAE leave half precision's range, found by running it once in float32.

Some fine-tunes' VAEs do. In fp16 their pictures become NaN, which 8-bit pixels show as black.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from export.checkpoints.model import Checkpoint
from export.networks import NETWORKS
from moma_rt.bundle.specs import Geometry

VAE_NETWORKS = ("vae_encoder", "vae_decoder")
# Half of half precision's largest number: pictures differ from the probe's.
LIMIT = float(torch.finfo(torch.float16).max) / 2
# The largest side of the probe's picture. A VAE's values hardly depend on the size, and its time does.
_PROBE_SIZE = 256
_SEED = 0


def peaks(checkpoint: Checkpoint, geometry: Geometry, names: tuple[str, ...]) -> dict[str, float]:
    """Return the largest magnitude among each named VAE network's weights and its operations' results in float32.

    It is NaN if a result is. The encoder reads a synthetic photo with gradients, edges and noise; the decoder reads the
    encoder's latents and standard normal ones, so that the answer for one does not depend on the others that are named.

    Args:
        names: of `VAE_NETWORKS`.
    """
    generator = torch.Generator().manual_seed(_SEED)
    side = min(geometry.image_size, _PROBE_SIZE)
    latent_side = side * geometry.latent_size // geometry.image_size
    noise = torch.randn(1, geometry.latent_channels, latent_side, latent_side, generator=generator)

    def run(name: str, *inputs: Tensor) -> tuple[Any, float]:
        module, peak = NETWORKS[name].module(checkpoint, geometry), _Peak()
        for weight in module.state_dict().values():
            peak.record(weight)
        with torch.inference_mode(), peak:
            return module(*inputs), peak.value

    latents, peak = run("vae_encoder", _photo(side, generator), noise)
    found = {"vae_encoder": peak}
    if "vae_decoder" in names:
        # Latents that are not finite would say nothing about the decoder.
        _, found["vae_decoder"] = run("vae_decoder", torch.cat([noise, latents.nan_to_num(0.0, 0.0, 0.0)]))
    return {name: found[name] for name in names}


class _Peak(TorchDispatchMode):
    """Records the largest magnitude of all operations' results."""

    def __init__(self) -> None:
        super().__init__()
        self.value = 0.0

    def record(self, tensor: Tensor) -> None:
        if tensor.is_floating_point() and tensor.numel():
            low, high = (float(bound) for bound in torch.aminmax(tensor))
            # `max` ignores NaN if it comes second.
            self.value = low if math.isnan(low) else max(self.value, -low, high)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            for tensor in result if isinstance(result, list | tuple) else (result,):
                if isinstance(tensor, Tensor):
                    self.record(tensor)
        return result


def _photo(side: int, generator: torch.Generator) -> Tensor:
    """A picture in [-1, 1], float32 [1,3,side,side]: gradients, black and white squares, and noise."""
    ramp = torch.linspace(-1.0, 1.0, side)
    photo = torch.stack([ramp.expand(side, side), ramp[:, None].expand(side, side), -ramp.expand(side, side)])
    quarter = side // 4
    photo[:, :quarter, :quarter], photo[:, -quarter:, -quarter:] = 1.0, -1.0
    photo[:, :quarter, -quarter:] = torch.rand(3, quarter, quarter, generator=generator) * 2 - 1
    return photo[None]
