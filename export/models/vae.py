"""The autoencoder's two halves, from pixels to scaled latents and back to a picture."""

from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn


def load_vae(config: dict[str, Any], weights: dict[str, Tensor]) -> AutoencoderKL:
    """Return diffusers' autoencoder with the given tensors as its weights, without copying them."""
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(config)
    vae.load_state_dict(weights, assign=True)
    vae.set_attn_processor(WideHeadAttention())
    return vae.eval().requires_grad_(False)


class WideHeadAttention:
    """The autoencoder's attention as matrix products and a softmax: no fused kernel takes its head width of 512.

    The queries are scaled before the product, which could overflow float16 otherwise, and the softmax is float32, as
    are the statistics of a fused one.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: None = None,
        attention_mask: None = None,
        temb: None = None,
    ) -> Tensor:
        normed_bsc = attn.group_norm(hidden_states.flatten(2)).transpose(1, 2)
        q, k, v = (
            project(normed_bsc).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        scores_bhss = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        out_bsc = (scores_bhss.float().softmax(-1).to(v.dtype) @ v).transpose(1, 2).flatten(2)
        return hidden_states + attn.to_out[0](out_bsc).transpose(1, 2).unflatten(2, hidden_states.shape[2:])


class VaeEncoder(nn.Module):
    """image [1, 3, H, W] in [-1, 1] and standard normal noise [1, 4, h, w] → a sample of the scaled latents."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.encoder, self.quant_conv = vae.encoder, vae.quant_conv
        self.scaling_factor = float(vae.config.scaling_factor)

    def forward(self, image: Tensor, noise: Tensor) -> Tensor:
        moments = self.quant_conv(self.encoder(image.to(self.quant_conv.weight.dtype)))
        mean, log_variance = moments.float().chunk(2, dim=1)
        # The bounds of diffusers' DiagonalGaussianDistribution.
        deviation = torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))
        return (mean + deviation * noise) * self.scaling_factor


class VaeDecoder(nn.Module):
    """Scaled latents [B, 4, h, w] → RGB uint8 [B, H, W, 3], and the mean of each picture before clipping, float32 [B].

    The picture is clipped and rounded to nearest, so it cannot show NaN or infinity; the mean does.
    """

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.decoder, self.post_quant_conv = vae.decoder, vae.post_quant_conv
        self.scaling_factor = float(vae.config.scaling_factor)

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        unscaled = (latents / self.scaling_factor).to(self.post_quant_conv.weight.dtype)
        image = self.decoder(self.post_quant_conv(unscaled)).float()
        unit = (image * 0.5 + 0.5).clamp(0.0, 1.0)
        # The conversion comes last, because TensorRT supports uint8 only for a network's inputs and outputs.
        return (unit * 255.0).round().permute(0, 2, 3, 1).to(torch.uint8), image.mean((1, 2, 3))
