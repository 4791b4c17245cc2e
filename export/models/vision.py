"""CLIP's vision tower and LLaVA's projector, which turn a picture into tokens of the language model."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from export.models.edges import at_edge

# LLaVA reads the output of the layer before the last (`mm_vision_select_layer` -2).
UNUSED_LAYERS = 1


class VisionEncoder(nn.Module):
    """pixels [1, 3, 336, 336], CLIP-normalized → image tokens [1, 576, language width], without the class token.

    `projector` holds LLaVA's `mlp2x_gelu`: `0.weight`, `0.bias`, `2.weight`, `2.bias`.
    """

    def __init__(self, config: dict[str, Any], weights: dict[str, Tensor], projector: dict[str, Tensor]) -> None:
        super().__init__()
        with torch.device("meta"):
            model = CLIPVisionModel(CLIPVisionConfig(**config, attn_implementation="sdpa"))
            width, inner = projector["0.weight"].shape[1], projector["0.weight"].shape[0]
            self.projector = nn.Sequential(
                nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, projector["2.weight"].shape[0])
            )
        model.load_state_dict(weights, assign=True)
        self.projector.load_state_dict(projector, assign=True)
        # transformers keeps the layers in the model itself, older versions in a part of it.
        tower = getattr(model, "vision_model", model)
        self.embeddings, self.pre_norm = tower.embeddings, tower.pre_layrnorm
        self.layers = tower.encoder.layers[: len(tower.encoder.layers) - UNUSED_LAYERS]
        self.eval().requires_grad_(False)

    def forward(self, pixels: Tensor) -> Tensor:
        embeddings = self.embeddings
        pixels = pixels.to(embeddings.class_embedding.dtype)
        patches = embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
        class_token = embeddings.class_embedding.expand(pixels.shape[0], 1, -1)
        hidden_states = torch.cat([class_token, patches], dim=1) + embeddings.position_embedding.weight
        hidden_states = self.pre_norm(hidden_states)
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask=None)
        return at_edge(self.projector(hidden_states[:, 1:]))
