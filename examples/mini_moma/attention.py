"""The UNet's attention layers in training: those of MoMA, differentiable and batched over several photos."""

from dataclasses import dataclass, field

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

# Added to the scores of reference tokens outside the subject.
_OUTSIDE = -1e4
_EPSILON = 1e-6


@dataclass(frozen=True)
class Photos:
    """A pass on photos: self-attention layers store adapted keys and values, layer → two of [P, N, C]."""

    keys_values: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class Pictures:
    """A pass on pictures, B of them; `photo_b` says which of the P photos each belongs to.

    Attributes:
        photos: the photos' pass.
        photo_b: int64 [B], 0..P-1.
        mask_pn: float [P, S] on the finest grid, 1 on the photo's subject.
        foreground_bs: float [B, S] on the finest grid, 0..1.
        strength_b: float [B], 0 where nothing is injected.
        context_bmc: context tokens [B, M, C].
        subject_bt: float [B, T], 1 at the subject's tokens.
        saliency: filled with a map [B, S] on the finest grid by each cross-attention layer.
    """

    photos: Photos
    photo_b: Tensor
    mask_pn: Tensor
    foreground_bs: Tensor
    strength_b: Tensor
    context_bmc: Tensor
    subject_bt: Tensor
    saliency: list[Tensor] = field(default_factory=list)


class SelfAttention(nn.Module):
    """Self-attention plus attention to the photo's subject inside the foreground (MoMA, section 3.3)."""

    def __init__(self, layer: int, channels: int) -> None:
        super().__init__()
        self.layer = layer
        self.to_k_ip, self.to_v_ip = (nn.Linear(channels, channels, bias=False) for _ in range(2))
        nn.init.eye_(self.to_k_ip.weight)
        nn.init.eye_(self.to_v_ip.weight)
        self.scale_learnable = nn.Parameter(torch.ones(1))

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        state: Photos | Pictures,
    ) -> Tensor:
        k_bsc, v_bsc = attn.to_k(hidden_states), attn.to_v(hidden_states)
        q = _split(attn.to_q(hidden_states), attn.heads)
        out = scaled_dot_product_attention(q, _split(k_bsc, attn.heads), _split(v_bsc, attn.heads))
        if isinstance(state, Photos):
            state.keys_values[self.layer] = (self.to_k_ip(k_bsc), self.to_v_ip(v_bsc))
        else:
            tokens = hidden_states.shape[1]
            k, v = (_split(t[state.photo_b], attn.heads) for t in state.photos.keys_values[self.layer])
            inside = on_grid(state.mask_pn, tokens)[state.photo_b]
            # Where all tokens are outside, attention is uniform, as in the original.
            q = q * inside.amax(1)[:, None, None, None]
            added = ((1 - inside) * _OUTSIDE)[:, None, None, :]
            injected = scaled_dot_product_attention(q, k, v, attn_mask=added)
            gate = on_grid(state.foreground_bs, tokens) * state.strength_b[:, None] * self.scale_learnable
            out = out + injected * gate[:, None, :, None]
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Cross-attention to the text plus to the context tokens inside the foreground; records the subject's saliency."""

    def __init__(self, channels: int, context_width: int) -> None:
        super().__init__()
        self.to_k_ip, self.to_v_ip = (nn.Linear(context_width, channels, bias=False) for _ in range(2))

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        state: Photos | Pictures,
    ) -> Tensor:
        q = _split(attn.to_q(hidden_states), attn.heads)
        k, v = (_split(project(encoder_hidden_states), attn.heads) for project in (attn.to_k, attn.to_v))
        if isinstance(state, Photos):
            out = scaled_dot_product_attention(q, k, v)
        else:
            probabilities = (q @ k.transpose(-1, -2) * attn.scale).softmax(-1)
            state.saliency.append(_saliency(probabilities, state.subject_bt, state.foreground_bs.shape[1]))
            out = probabilities @ v
            k, v = (_split(project(state.context_bmc), attn.heads) for project in (self.to_k_ip, self.to_v_ip))
            gate = on_grid(state.foreground_bs, hidden_states.shape[1])[:, None, :, None]
            out = out + scaled_dot_product_attention(q, k, v) * gate
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


def set_processors(unet: UNet2DConditionModel) -> None:
    """Give every attention layer its processor; even ones in the order of `attn_processors` are self-attentions."""
    processors: dict[str, SelfAttention | CrossAttention] = {}
    for index, name in enumerate(unet.attn_processors):
        attention = unet.get_submodule(name.rsplit(".", 1)[0])
        channels = attention.to_q.in_features
        if index % 2 == 0:
            processors[name] = SelfAttention(index, channels)
        else:
            processors[name] = CrossAttention(channels, unet.config["cross_attention_dim"])
    unet.set_attn_processor(processors)


def on_grid(map_bs: Tensor, tokens: int) -> Tensor:
    """Sample a square map [B, S] of the finest grid at a coarser one of `tokens` cells, by nearest neighbor."""
    side, coarse = round(map_bs.shape[1] ** 0.5), round(tokens**0.5)
    if side == coarse:
        return map_bs
    step = side // coarse
    return map_bs.unflatten(1, (side, side))[:, ::step, ::step].flatten(1)


def min_max(map_bs: Tensor) -> Tensor:
    """Scale each map to 0..1."""
    low, high = map_bs.amin(1, keepdim=True), map_bs.amax(1, keepdim=True)
    return (map_bs - low) / (high - low).clamp_min(_EPSILON)


def _saliency(probabilities_bhst: Tensor, subject_bt: Tensor, finest: int) -> Tensor:
    """Mean over heads of the probability of the subject's tokens, scaled to 0..1, on the finest grid: [B, finest]."""
    map_bs = min_max(torch.einsum("bhst,bt->bs", probabilities_bhst, subject_bt) / probabilities_bhst.shape[1])
    side, fine = round(map_bs.shape[1] ** 0.5), round(finest**0.5)
    square = map_bs.unflatten(1, (side, side))
    return square.repeat_interleave(fine // side, 1).repeat_interleave(fine // side, 2).flatten(1)


def _split(tensor: Tensor, heads: int) -> Tensor:
    """Split heads: [B, S, C] → [B, heads, S, head width]."""
    return tensor.unflatten(-1, (heads, -1)).transpose(1, 2)
