"""The two networks made from the UNet: one denoising step, and the reference pass that reads the subject."""

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from export.models.attention import (
    DenoisingStep,
    ReferencePass,
    set_generation_processors,
    set_reference_processors,
)
from export.models.edges import at_edge
from moma_rt.bundle.specs import Geometry
from moma_rt.schedulers.tables import Column, reference_noising

# Saliency up to this value counts as background (the original's constant).
FOREGROUND_THRESHOLD = 0.2
# The original cuts the last tokens off the reference pass's text, as if they were context tokens.
REFERENCE_TEXT_TOKENS = 73


def load_unet(config: dict[str, Any], weights: dict[str, Tensor]) -> UNet2DConditionModel:
    """Return diffusers' UNet with the given tensors as its weights, without copying them."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    unet.load_state_dict(weights, assign=True)
    return unet.eval().requires_grad_(False)


class Denoiser(nn.Module):
    """One whole denoising step: the UNet with both adapters, guidance, the scheduler update and the foreground mask.

    Inputs and outputs are those of the denoiser's spec in `export.networks`; the update is the schedule row's linear
    form, see `moma_rt.schedulers.tables`. Guidance, the update and the foreground mask are always float32, since their
    errors would accumulate over the steps.
    """

    def __init__(self, unet: UNet2DConditionModel, adapters: dict[str, Tensor], geometry: Geometry) -> None:
        super().__init__()
        set_generation_processors(unet, adapters)
        self.unet = unet
        self.layers = geometry.self_attention
        self.grids = geometry.grids

    def forward(
        self,
        latents: Tensor,
        history: Tensor,
        noise: Tensor,
        schedule_row: Tensor,
        strength: Tensor,
        text_tokens: Tensor,
        context_tokens: Tensor,
        subject_weights: Tensor,
        foreground_mask: Tensor,
        object_masks: tuple[Tensor, ...],
        reference_k: tuple[Tensor, ...],
        reference_v: tuple[Tensor, ...],
    ) -> tuple[Tensor, Tensor, Tensor]:
        first, last, halves = _half_indices(latents.shape[0], text_tokens.shape[0], latents.device)
        foreground_bs = {grid * grid: _sampled(foreground_mask, grid) for grid in self.grids}
        paths = [layer.name for layer in self.layers]
        by_grid = dict(zip(self.grids, object_masks, strict=True))
        dtype = self.unet.dtype
        step = DenoisingStep(
            reference_k_bnc={path: k.to(dtype) for path, k in zip(paths, reference_k, strict=True)},
            reference_v_bnc={path: v.to(dtype) for path, v in zip(paths, reference_v, strict=True)},
            object_mask_bn={layer.name: by_grid[layer.grid].to(dtype) for layer in self.layers},
            foreground_bs={s: gate.to(dtype) for s, gate in foreground_bs.items()},
            injection_bs={s: (gate * strength[:, None]).to(dtype) for s, gate in foreground_bs.items()},
            injection_scale=schedule_row[Column.INJECTION : Column.INJECTION + 1].to(dtype),
            context_gmc=context_tokens.to(dtype),
            subject_weights_bt=subject_weights.to(dtype),
        )
        eps = self.unet(
            latents.index_select(0, halves).to(dtype),
            schedule_row[Column.TIMESTEP],
            encoder_hidden_states=text_tokens.to(dtype),
            cross_attention_kwargs={"step": step},
            return_dict=False,
        )[0].float()
        eps_unconditional, eps_conditional = eps.index_select(0, first), eps.index_select(0, last)
        guided = eps_unconditional + schedule_row[Column.GUIDANCE] * (eps_conditional - eps_unconditional)
        row = schedule_row
        next_latents = (
            row[Column.LATENTS] * latents
            + row[Column.EPS] * guided
            + row[Column.HISTORY] * history
            + row[Column.NOISE] * noise
        )
        next_history = (
            row[Column.HISTORY_LATENTS] * latents
            + row[Column.HISTORY_EPS] * guided
            + row[Column.HISTORY_HISTORY] * history
        )
        return next_latents, next_history, foreground(step.saliency_gs, latents.shape[-1], first, last)


class SubjectEncoder(nn.Module):
    """The UNet on the photo at t = 0, which yields keys and values of every self-attention layer for injection.

    latents, noise [1, 4, h, w] (scaled latents of the photo; standard normal), text_tokens [1, 77, width] of the bare
    subject → for each layer K and V [1, N, C], keys first. The graph ends at the last self-attention.
    """

    def __init__(self, unet: UNet2DConditionModel, adapters: dict[str, Tensor], geometry: Geometry) -> None:
        super().__init__()
        set_reference_processors(unet, adapters)
        self.unet = unet
        self.layers = geometry.self_attention
        self.signal, self.noise = reference_noising()

    def forward(self, latents: Tensor, noise: Tensor, text_tokens: Tensor) -> tuple[Tensor, ...]:
        reference, dtype = ReferencePass(), self.unet.dtype
        self.unet(
            (self.signal * latents + self.noise * noise).to(dtype),
            torch.zeros(1, dtype=latents.dtype, device=latents.device),
            encoder_hidden_states=text_tokens[:, :REFERENCE_TEXT_TOKENS].to(dtype),
            cross_attention_kwargs={"step": reference},
            return_dict=False,
        )
        keys = tuple(at_edge(reference.reference_k_bnc[layer.name]) for layer in self.layers)
        return keys + tuple(at_edge(reference.reference_v_bnc[layer.name]) for layer in self.layers)


def foreground(saliency_gs: list[Tensor], size: int, first: Tensor, last: Tensor) -> Tensor:
    """Compute the next step's foreground mask [B, 1, size, size] from all cross-attention saliencies [G·B, S].

    Each layer and half is scaled to [0, 1] and upsampled to the finest grid; the mean over layers is scaled to [0, 1]
    jointly over the halves of a sample; values up to the threshold become 0; the conditional half is returned.
    """
    maps = []
    for saliency in (saliency.float() for saliency in saliency_gs):
        side = round(saliency.shape[1] ** 0.5)
        scaled = _unit_range(saliency, saliency.amin(1, keepdim=True), saliency.amax(1, keepdim=True))
        grid = scaled.unflatten(1, (1, side, side))
        maps.append(nn.functional.interpolate(grid, scale_factor=size // side, mode="nearest"))
    mean_g1hw = torch.stack(maps).mean(0)
    unconditional, conditional = mean_g1hw.index_select(0, first), mean_g1hw.index_select(0, last)
    low = torch.minimum(unconditional, conditional).amin((2, 3), keepdim=True)
    high = torch.maximum(unconditional, conditional).amax((2, 3), keepdim=True)
    scaled = _unit_range(conditional, low, high)
    return torch.where(scaled > FOREGROUND_THRESHOLD, scaled, 0.0)


def _unit_range(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    # A constant map has no range: the floor gives zeros where the original has NaN, and changes nothing else.
    return (values - low) / (high - low).clamp_min(torch.finfo(torch.float32).tiny)


def _half_indices(batch: int, guided_batch: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows of the unconditional and the conditional half (equal if there is one), and each row's sample.

    Gathering by index relates the two batch sizes without a constraint between them, which tracing could not express.
    """
    first, rows = torch.arange(batch, device=device), torch.arange(guided_batch, device=device)
    return first, first + (guided_batch - batch), torch.where(rows < batch, rows, rows - batch)


def _sampled(mask_b1hw: Tensor, grid: int) -> Tensor:
    """Downsample the mask to a grid (nearest), as [B, S]."""
    stride = mask_b1hw.shape[-1] // grid
    return mask_b1hw[:, 0, ::stride, ::stride].flatten(1)
