"""CLIP's text encoder, on transformers' layers."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from export.models.edges import at_edge


class TextEncoder(nn.Module):
    """token_ids int32 [B, T ≤ 77] → text tokens [B, T, width], after the final norm."""

    def __init__(self, config: dict[str, Any], weights: dict[str, Tensor]) -> None:
        super().__init__()
        with torch.device("meta"):
            model = CLIPTextModel(CLIPTextConfig(**config, attn_implementation="sdpa"))
        model.load_state_dict(weights, assign=True)
        # transformers keeps the layers in the model itself, older versions in a part of it.
        self.model = getattr(model, "text_model", model).eval().requires_grad_(False)

    def forward(self, token_ids: Tensor) -> Tensor:
        embeddings = self.model.embeddings
        positions = embeddings.position_embedding.weight[: token_ids.shape[1]]
        hidden_states = embeddings.token_embedding(token_ids) + positions
        for layer in self.model.encoder.layers:
            hidden_states = layer(hidden_states, attention_mask=None, is_causal=True)
        return at_edge(self.model.final_layer_norm(hidden_states))
