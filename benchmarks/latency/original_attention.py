"""The original MoMA's attention layers, as diffusers attention processors in plain PyTorch.

They do not use this project's operators: the injected attention runs over all reference tokens with an additive mask,
and the cross-attention materializes its probabilities, because the foreground mask is computed from them.
"""

from dataclasses import dataclass, field

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn.functional import interpolate, linear, scaled_dot_product_attention


@dataclass(frozen=True)
class ReferencePass:
    """State of the UNet pass on the photo: self-attention layers store keys and values here, layer → [1, N, C]."""

    keys: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class GenerationStep:
    """State of a UNet step on the new picture, with G guidance halves, the unconditional one first.

    Attributes:
        reference: keys and values of the photo.
        object_mask: [1, 1, H, W] of the photo, above 0 on the subject.
        foreground: [1, 1, H, W] of the new picture, in 0..1.
        strength: factor of the injected attention.
        injects: whether the reference is injected in this step; or a tensor of 0 or 1 that the injected attention is
            multiplied by, so that all steps share one compiled graph.
        context_gmc: [G, M, C], the context tokens.
        subject_tokens: int64 [I], indices of the subject's tokens in the prompt.
        saliency: filled by the cross-attention layers, one [G, S] each.
    """

    reference: ReferencePass
    object_mask: Tensor
    foreground: Tensor
    strength: float
    injects: bool | Tensor
    context_gmc: Tensor
    subject_tokens: Tensor
    saliency: list[Tensor] = field(default_factory=list)


Step = ReferencePass | GenerationStep


class SelfAttention(nn.Module):
    """Self-attention; while generating, plus attention to the photo's keys and values inside the foreground."""

    def __init__(self, layer: str, adapters: dict[str, Tensor]) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("to_k_ip", adapters[f"attention.{layer}.to_k_ip.weight"])
        self.register_buffer("to_v_ip", adapters[f"attention.{layer}.to_v_ip.weight"])
        self.register_buffer("scale_learnable", adapters[f"attention.{layer}.scale_learnable"])

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        step: Step,
    ) -> Tensor:
        k_gsc, v_gsc = attn.to_k(hidden_states), attn.to_v(hidden_states)
        q = _split(attn.to_q(hidden_states), attn.heads)
        out_gsc = _join(scaled_dot_product_attention(q, _split(k_gsc, attn.heads), _split(v_gsc, attn.heads)))
        if isinstance(step, ReferencePass):
            step.keys[self.layer] = linear(k_gsc, self.to_k_ip)
            step.values[self.layer] = linear(v_gsc, self.to_v_ip)
        elif isinstance(step.injects, Tensor) or step.injects:
            side = round(hidden_states.shape[1] ** 0.5)
            k, v = (
                _split(reference[self.layer].expand(len(q), -1, -1), attn.heads)
                for reference in (step.reference.keys, step.reference.values)
            )
            outside = _on_grid(step.object_mask, side) <= 0
            mask = torch.zeros_like(outside, dtype=q.dtype).masked_fill(outside, torch.finfo(q.dtype).min)
            injected_gsc = _join(scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :]))
            gate = _on_grid(step.foreground, side)[..., None].to(q.dtype)
            out_gsc = out_gsc + step.injects * step.strength * self.scale_learnable * injected_gsc * gate
        return attn.to_out[0](out_gsc)


class CrossAttention(nn.Module):
    """Cross-attention to the text; while generating, also to context tokens, and stores the subject's saliency."""

    def __init__(self, layer: str, adapters: dict[str, Tensor]) -> None:
        super().__init__()
        self.register_buffer("to_k_ip", adapters[f"attention.{layer}.to_k_ip.weight"])
        self.register_buffer("to_v_ip", adapters[f"attention.{layer}.to_v_ip.weight"])

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        step: Step,
    ) -> Tensor:
        q = _split(attn.to_q(hidden_states), attn.heads)
        k, v = (_split(project(encoder_hidden_states), attn.heads) for project in (attn.to_k, attn.to_v))
        probabilities = (q @ k.transpose(-1, -2) * attn.scale).softmax(-1)
        out_gsc = _join(probabilities @ v)
        if isinstance(step, GenerationStep):
            step.saliency.append(probabilities[..., step.subject_tokens].sum(-1).mean(1))
            k, v = (_split(linear(step.context_gmc, weight), attn.heads) for weight in (self.to_k_ip, self.to_v_ip))
            context_gsc = _join((q @ k.transpose(-1, -2) * attn.scale).softmax(-1) @ v)
            side = round(hidden_states.shape[1] ** 0.5)
            out_gsc = out_gsc + context_gsc * _on_grid(step.foreground, side)[..., None].to(q.dtype)
        return attn.to_out[0](out_gsc)


def set_processors(unet: UNet2DConditionModel, adapters: dict[str, Tensor]) -> None:
    """Set the processor of every attention layer of a UNet; both passes use the same ones.

    Args:
        adapters: tensors by their names in `export.checkpoints.model.Component`.
    """
    processors: dict[str, nn.Module] = {}
    for name in unet.attn_processors:
        layer = name.removesuffix(".processor")
        processors[name] = (SelfAttention if layer.endswith("attn1") else CrossAttention)(layer, adapters)
    unet.set_attn_processor(processors)


def next_foreground(saliency: list[Tensor], grid: int, image_size: int) -> Tensor:
    """Compute the next step's mask [1, 1, H, W] from every cross-attention layer's saliency [G, S].

    Each saliency is scaled to [0, 1] and enlarged to `grid`; their mean is scaled to [0, 1] over both halves; values
    not above 0.2 become 0; only the conditional half is kept.
    """
    maps = []
    for map_gs in saliency:
        low, high = map_gs.amin(1, keepdim=True), map_gs.amax(1, keepdim=True)
        side = round(map_gs.shape[1] ** 0.5)
        scaled = ((map_gs - low) / (high - low)).float().unflatten(1, (1, side, side))
        maps.append(interpolate(scaled, size=(grid, grid), mode="nearest"))
    mean = torch.stack(maps).mean(0)
    mean = (mean - mean.min()) / (mean.max() - mean.min())
    mean = torch.where(mean > 0.2, mean, 0.0)
    return interpolate(mean[-1:], size=(image_size, image_size), mode="nearest")


def _split(tensor: Tensor, heads: int) -> Tensor:
    """Split heads: [B, S, C] → [B, heads, S, head width]."""
    return tensor.unflatten(-1, (heads, -1)).transpose(1, 2)


def _join(tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2).flatten(2)


def _on_grid(mask: Tensor, side: int) -> Tensor:
    """Resize a mask [1, 1, H, W] to a layer's grid by nearest neighbor: [1, side * side]."""
    return interpolate(mask, size=(side, side), mode="nearest").flatten(1)
