"""The language model as MoMA uses it: one forward pass whose last token becomes an embedding.

There is no LM head and no decoding. From the last layer's queries on, only the last token is computed, since nothing
reads the others. Prefix and suffix of a prompt are two calls of one network, so its weights are in memory once.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel, apply_rotary_pos_emb

from export.models.edges import at_edge


class LanguageModel(nn.Module):
    """Llama's decoder, then `down(silu(gate·x) · up·x)` on the last token (MoMA, section 3.1).

    token_ids int32 [1, S]; ids from `vocabulary` up name rows of image_tokens [1, M, width] (M ≥ 1);
    positions int32 [1, S]; past_kv [layers, 2, K/V heads, P, head width], P ≥ 0 →
    embedding [1, 1024] of the last token, new_kv [layers, 2, K/V heads, S, head width].
    """

    def __init__(self, config: dict[str, Any], weights: dict[str, Tensor], mapping: dict[str, Tensor]) -> None:
        super().__init__()
        llama = LlamaConfig(**config)
        with torch.device("meta"):
            model = LlamaModel(llama)
            self.mapping = nn.ModuleDict(
                {
                    name: nn.Linear(mapping[f"{name}.weight"].shape[1], mapping[f"{name}.weight"].shape[0], bias=False)
                    for name in ("gate_proj", "up_proj", "down_proj")
                }
            )
        model.load_state_dict(weights, assign=True)
        self.mapping.load_state_dict(mapping, assign=True)
        self.embed_tokens, self.layers, self.norm = model.embed_tokens, model.layers, model.norm
        self.vocabulary = llama.vocab_size
        self.heads = llama.num_attention_heads
        self.kv_heads = llama.num_key_value_heads
        self.head_width = llama.hidden_size // llama.num_attention_heads
        self.rope_theta = float(config.get("rope_theta", 10000.0))
        self.eval().requires_grad_(False)

    def forward(
        self, token_ids: Tensor, image_tokens: Tensor, positions: Tensor, past_kv: Tensor
    ) -> tuple[Tensor, Tensor]:
        dtype = self.norm.weight.dtype
        past_kv = past_kv.to(dtype)
        hidden_bsc = self._embed(token_ids, image_tokens.to(dtype))
        cos, sin = self._rotary(positions, hidden_bsc.dtype)
        past = torch.arange(past_kv.shape[3], dtype=positions.dtype, device=positions.device)
        key_positions = torch.cat([past, positions[0]])
        visible_sk = key_positions[None, :] <= positions[0][:, None]
        new_kv = []
        for index, layer in enumerate(self.layers):
            queries = slice(-1, None) if index == len(self.layers) - 1 else slice(None)
            normed_bsc = layer.input_layernorm(hidden_bsc)
            k_bhsd, v_bhsd = self._keys_values(layer, normed_bsc, cos, sin)
            new_kv.append(torch.cat([k_bhsd, v_bhsd]))
            q_bhsd = _rotate(
                self._heads(layer.self_attn.q_proj(normed_bsc[:, queries])), cos[:, queries], sin[:, queries]
            )
            attended_bsc = self._attend(
                q_bhsd,
                torch.cat([past_kv[index, 0:1], k_bhsd], dim=2),
                torch.cat([past_kv[index, 1:2], v_bhsd], dim=2),
                visible_sk[queries],
            )
            hidden_bsc = hidden_bsc[:, queries] + layer.self_attn.o_proj(attended_bsc)
            hidden_bsc = hidden_bsc + layer.mlp(layer.post_attention_layernorm(hidden_bsc))
        last_bc = self.norm(hidden_bsc)[:, -1]
        gated_bc = nn.functional.silu(self.mapping["gate_proj"](last_bc)) * self.mapping["up_proj"](last_bc)
        return self.mapping["down_proj"](gated_bc).float(), at_edge(torch.stack(new_kv))

    def _embed(self, token_ids: Tensor, image_tokens: Tensor) -> Tensor:
        is_image = token_ids >= self.vocabulary
        words = self.embed_tokens(token_ids.clamp_max(self.vocabulary - 1))
        rows = (token_ids[0] - self.vocabulary).clamp_min(0)
        return torch.where(is_image[..., None], image_tokens.index_select(1, rows), words)

    def _rotary(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        exponents = torch.arange(0, self.head_width, 2, dtype=torch.float32, device=positions.device) / self.head_width
        angles = positions[..., None].float() * (1.0 / self.rope_theta**exponents)
        both = torch.cat([angles, angles], dim=-1)
        return both.cos().to(dtype), both.sin().to(dtype)

    def _heads(self, projected_bsc: Tensor) -> Tensor:
        return projected_bsc.unflatten(-1, (-1, self.head_width)).transpose(1, 2)

    def _keys_values(
        self, layer: LlamaDecoderLayer, normed_bsc: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        k_bhsd = _rotate(self._heads(layer.self_attn.k_proj(normed_bsc)), cos, sin)
        return k_bhsd, self._heads(layer.self_attn.v_proj(normed_bsc))

    def _attend(self, q_bhsd: Tensor, k_bhsd: Tensor, v_bhsd: Tensor, visible_sk: Tensor) -> Tensor:
        out = nn.functional.scaled_dot_product_attention(
            q_bhsd, k_bhsd, v_bhsd, attn_mask=visible_sk[None, None], enable_gqa=self.heads != self.kv_heads
        )
        return out.transpose(1, 2).flatten(2)


class ContextProjector(nn.Module):
    """embedding [B, 1024] → context tokens [B, 4, width]: `Linear`, split in tokens, `LayerNorm` each.

    A separate network, because the unconditional context tokens are the projection of zeros, and because a user may
    supply an embedding without a language model.
    """

    def __init__(self, projectors: dict[str, Tensor], text_width: int) -> None:
        super().__init__()
        weight = projectors["proj.weight"]
        self.tokens = weight.shape[0] // text_width
        with torch.device("meta"):
            self.proj = nn.Linear(weight.shape[1], weight.shape[0])
            self.norm = nn.LayerNorm(text_width)
        self.load_state_dict(projectors, assign=True)
        self.eval().requires_grad_(False)

    def forward(self, embedding: Tensor) -> Tensor:
        return self.norm(self.proj(embedding).unflatten(-1, (self.tokens, -1)))


def _rotate(states_bhsd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return apply_rotary_pos_emb(states_bhsd, states_bhsd, cos, sin)[0]
