"""The original MoMA's attention layers, as diffusers attention processors in plain PyTorch.

Nothing of this project's operators is in them: the injected attention goes over all reference tokens with an additive
mask, and the cross-attention forms its probabilities, because the foreground mask is made of them.
"""

from dataclasses import dataclass, field

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn.functional import interpolate, linear, scaled_dot_product_attention


@dataclass(frozen=True)
class ReferencePass:
    """The UNet on the photo. Its self-attention layers leave keys and values here: layer → [1, N, C]."""

    keys: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class GenerationStep:
    """The UNet on the new picture, G guidance halves of it, the unconditional one first.

    Attributes:
        reference: of the photo.
        object_mask: [1, 1, H, W] of the photo, above 0 on the subject.
        foreground: [1, 1, H, W] of the new picture, in 0..1.
        strength: of the injection.
        injects: False where the step is so early that nothing is injected; or a tensor of 0 or 1, a factor of what is
            injected, so that one graph of a compiler is every step's.
        context_gmc: [G, M, C], the context tokens.
        subject_tokens: int64 [I], where the subject stands in the prompt.
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
    """Self-attention, and in the generation that to the photo's keys and values, where the new subject is."""

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
    """Cross-attention to the text, and in the generation to the context tokens; leaves the subject's saliency."""

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
    """Give every attention layer of a UNet its processor; both passes use the same ones.

    adapters: tensors as `export.checkpoints.model.Component` names them.
    """
    processors: dict[str, nn.Module] = {}
    for name in unet.attn_processors:
        layer = name.removesuffix(".processor")
        processors[name] = (SelfAttention if layer.endswith("attn1") else CrossAttention)(layer, adapters)
    unet.set_attn_processor(processors)


def next_foreground(saliency: list[Tensor], grid: int, image_size: int) -> Tensor:
    """The mask [1, 1, H, W] of the next step, of every cross-attention layer's saliency [G, S].

    Each is scaled to [0, 1] and enlarged to `grid`; their mean is scaled over both halves; what is not above 0.2 is no
    foreground; the conditional half is kept.
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
    """[B, S, C] → [B, heads, S, head width]."""
    return tensor.unflatten(-1, (heads, -1)).transpose(1, 2)


def _join(tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2).flatten(2)


def _on_grid(mask: Tensor, side: int) -> Tensor:
    """A mask [1, 1, H, W] sampled nearest on a layer's grid: [1, side * side]."""
    return interpolate(mask, size=(side, side), mode="nearest").flatten(1)
