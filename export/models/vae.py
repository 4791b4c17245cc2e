"""The autoencoder's two halves, from pixels to scaled latents and back to a picture."""

from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn


def load_vae(config: dict[str, Any], weights: dict[str, Tensor]) -> AutoencoderKL:
    """diffusers' autoencoder around the given tensors, which are not copied."""
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(config)
    vae.load_state_dict(weights, assign=True)
    return vae.eval().requires_grad_(False)


class VaeEncoder(nn.Module):
    """image [1, 3, H, W] in [-1, 1] and standard normal noise [1, 4, h, w] → a sample of the scaled latents."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.encoder, self.quant_conv = vae.encoder, vae.quant_conv
        self.scaling_factor = float(vae.config.scaling_factor)

    def forward(self, image: Tensor, noise: Tensor) -> Tensor:
        mean, log_variance = self.quant_conv(self.encoder(image)).chunk(2, dim=1)
        # The bounds of diffusers' DiagonalGaussianDistribution.
        deviation = torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))
        return (mean + deviation * noise) * self.scaling_factor


class VaeDecoder(nn.Module):
    """Scaled latents [B, 4, h, w] → RGB uint8 [B, H, W, 3], clipped and rounded to nearest."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.decoder, self.post_quant_conv = vae.decoder, vae.post_quant_conv
        self.scaling_factor = float(vae.config.scaling_factor)

    def forward(self, latents: Tensor) -> Tensor:
        image = self.decoder(self.post_quant_conv(latents / self.scaling_factor))
        unit = (image * 0.5 + 0.5).clamp(0.0, 1.0)
        # The conversion comes last: TensorRT knows uint8 only for a network's own inputs and outputs.
        return (unit * 255.0).round().permute(0, 2, 3, 1).to(torch.uint8)
