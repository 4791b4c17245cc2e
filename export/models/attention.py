"""MoMA's attention layers, as diffusers attention processors around this project's two operators.

A processor receives the data that all layers share as one `DenoisingStep` (or `ReferencePass`) through diffusers'
`cross_attention_kwargs`, so no state is kept between calls and diffusers' UNet is used unchanged.
"""

from dataclasses import dataclass, field

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

import kernels.context_cross_attention.operator
import kernels.injected_self_attention.operator  # noqa: F401  (both register the torch operators)


@dataclass(frozen=True)
class DenoisingStep:
    """The data that all attention layers of one denoising step share, keyed by layer path or by number of tokens.

    Attributes:
        reference_k_bnc, reference_v_bnc: layer path → [B, N, C].
        object_mask_bn: layer path → [B, N].
        foreground_bs: tokens S → [B, S], the gate of the context branch.
        injection_bs: tokens S → [B, S], the gate of the reference branch (strength · foreground).
        injection_scale: [1], 0 outside the injection window.
        context_gmc: [G·B, M, C], the context tokens.
        subject_weights_bt: [B, T].
        saliency_gs: filled by the cross-attention layers, one [G·B, S] each.
    """

    reference_k_bnc: dict[str, Tensor]
    reference_v_bnc: dict[str, Tensor]
    object_mask_bn: dict[str, Tensor]
    foreground_bs: dict[int, Tensor]
    injection_bs: dict[int, Tensor]
    injection_scale: Tensor
    context_gmc: Tensor
    subject_weights_bt: Tensor
    saliency_gs: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class ReferencePass:
    """Keys and values that the subject encoder's self-attention layers store here: layer path → [B, N, C]."""

    reference_k_bnc: dict[str, Tensor] = field(default_factory=dict)
    reference_v_bnc: dict[str, Tensor] = field(default_factory=dict)


class InjectedSelfAttention(nn.Module):
    """Self-attention during generation: the layer's own, plus attention to the reference (MoMA, section 3.3)."""

    def __init__(self, path: str, scale_learnable: Tensor) -> None:
        super().__init__()
        self.path = path
        self.scale_learnable = nn.Parameter(scale_learnable.reshape(1), requires_grad=False)

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        step: DenoisingStep,
    ) -> Tensor:
        out = torch.ops.moma.injected_self_attention(
            attn.to_q(hidden_states),
            attn.to_k(hidden_states),
            attn.to_v(hidden_states),
            step.reference_k_bnc[self.path],
            step.reference_v_bnc[self.path],
            step.object_mask_bn[self.path],
            step.injection_bs[hidden_states.shape[1]],
            step.injection_scale * self.scale_learnable,
            attn.heads,
        )
        return attn.to_out[0](out)


class ContextCrossAttention(nn.Module):
    """Decoupled cross-attention to text and context tokens during generation (MoMA, section 3.2)."""

    def __init__(self, to_k_ip: Tensor, to_v_ip: Tensor) -> None:
        super().__init__()
        self.to_k_ip = _projection(to_k_ip)
        self.to_v_ip = _projection(to_v_ip)

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        step: DenoisingStep,
    ) -> Tensor:
        out, saliency_gs = torch.ops.moma.context_cross_attention(
            attn.to_q(hidden_states),
            attn.to_k(encoder_hidden_states),
            attn.to_v(encoder_hidden_states),
            self.to_k_ip(step.context_gmc),
            self.to_v_ip(step.context_gmc),
            step.foreground_bs[hidden_states.shape[1]],
            step.subject_weights_bt,
            attn.heads,
        )
        step.saliency_gs.append(saliency_gs)
        return attn.to_out[0](out)


class ReferenceSelfAttention(nn.Module):
    """Self-attention of the reference pass; stores the layer's keys and values, projected again by the adapter."""

    def __init__(self, path: str, to_k_ip: Tensor, to_v_ip: Tensor) -> None:
        super().__init__()
        self.path = path
        self.to_k_ip = _projection(to_k_ip)
        self.to_v_ip = _projection(to_v_ip)

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        step: ReferencePass,
    ) -> Tensor:
        k_bnc, v_bnc = attn.to_k(hidden_states), attn.to_v(hidden_states)
        step.reference_k_bnc[self.path] = self.to_k_ip(k_bnc)
        step.reference_v_bnc[self.path] = self.to_v_ip(v_bnc)
        return _plain_attention(attn, hidden_states, k_bnc, v_bnc)


class PlainCrossAttention(nn.Module):
    """Cross-attention of the reference pass, to text tokens only."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        step: ReferencePass,
    ) -> Tensor:
        return _plain_attention(attn, hidden_states, attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states))


def self_attention_path(processor_name: str) -> str:
    """Return `down_blocks.0.attentions.0` for `down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor`."""
    return processor_name.split(".transformer_blocks.")[0]


def set_generation_processors(unet: UNet2DConditionModel, adapters: dict[str, Tensor]) -> None:
    """Set every attention layer's processor for generation, with the adapter's weights."""
    processors: dict[str, nn.Module] = {}
    for name in unet.attn_processors:
        layer = "attention." + name.removesuffix(".processor")
        if ".attn1." in name:
            scale = adapters[f"{layer}.scale_learnable"]
            processors[name] = InjectedSelfAttention(self_attention_path(name), scale)
        else:
            processors[name] = ContextCrossAttention(
                adapters[f"{layer}.to_k_ip.weight"], adapters[f"{layer}.to_v_ip.weight"]
            )
    unet.set_attn_processor(processors)


def set_reference_processors(unet: UNet2DConditionModel, adapters: dict[str, Tensor]) -> None:
    """Set every attention layer's processor for the reference pass, with the adapter's weights."""
    processors: dict[str, nn.Module] = {}
    for name in unet.attn_processors:
        layer = "attention." + name.removesuffix(".processor")
        if ".attn1." in name:
            k, v = adapters[f"{layer}.to_k_ip.weight"], adapters[f"{layer}.to_v_ip.weight"]
            processors[name] = ReferenceSelfAttention(self_attention_path(name), k, v)
        else:
            processors[name] = PlainCrossAttention()
    unet.set_attn_processor(processors)


def _projection(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.load_state_dict({"weight": weight}, assign=True)
    return linear


def _plain_attention(attn: Attention, hidden_states: Tensor, k_bnc: Tensor, v_bnc: Tensor) -> Tensor:
    q, k, v = (t.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for t in (attn.to_q(hidden_states), k_bnc, v_bnc))
    out = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return attn.to_out[0](out)
