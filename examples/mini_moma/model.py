"""The small MoMA as one module, in the names of diffusers and transformers."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaModel,
)

from examples.mini_moma.attention import Photos, Pictures, set_processors
from export.checkpoints.architectures import llama_config
from export.checkpoints.presets import MINI
from export.models.unet import REFERENCE_TEXT_TOKENS
from export.tokenizers import language_tokenizer, save, text_tokenizer
from moma_rt.errors import InputError
from moma_rt.inputs.tokenizers import LanguageTokenizer, TextTokenizer, text_prompt

CONTEXT_TOKENS = 4
EMBEDDING = 1024
# Image tokens of a square photo.
IMAGE_TOKENS = (MINI.vision["image_size"] // MINI.vision["patch_size"]) ** 2
_MAPPING = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, eq=False)
class Texts:
    """Token ids of prompts, one row each.

    Attributes:
        text_bt: int64 [B, 77], what CLIP reads.
        subject_bt: float [B, 77], 1 at the subject's tokens.
        language_bl: int64 [B, L], what the language model reads after the image tokens, padded with 0.
        lengths_b: int64 [B], of the rows of `language_bl`.
    """

    text_bt: Tensor
    subject_bt: Tensor
    language_bl: Tensor
    lengths_b: Tensor


class Tokens:
    """Both tokenizers, as the runtime uses them.

    Raises:
        InputError: they have not been trained yet.
    """

    def __init__(self, data: Path) -> None:
        folder = data / "tokenizers"
        if not (folder / "language").exists():
            raise InputError(f"{data} has no tokenizers; first run: python -m examples.mini_moma data")
        built = {
            folder / "text.json": text_tokenizer(folder / "text"),
            folder / "language.json": language_tokenizer(folder / "language"),
        }
        for path, tokenizer in built.items():
            save(tokenizer, path)
        text, language = built
        self._text, self._language = TextTokenizer(text), LanguageTokenizer(language)
        self.text_vocabulary, self.language_vocabulary = (t.get_vocab_size() for t in built.values())
        self.before = self._sequence("a", "")[0]

    def text(self, text: str) -> Tensor:
        """Encode for CLIP: int64 [77]."""
        return torch.from_numpy(self._text.encode(text)).long()

    def prompts(self, names: Sequence[str], prompts: Sequence[str]) -> Texts:
        """Encode prompts, each with its subject's name."""
        rows = [self.text(text_prompt(name, prompt)) for name, prompt in zip(names, prompts, strict=True)]
        weights = [
            torch.from_numpy(self._text.subject_weights(name, row.numpy()))
            for name, row in zip(names, rows, strict=True)
        ]
        after = [self._sequence(name, prompt)[1] for name, prompt in zip(names, prompts, strict=True)]
        padded = nn.utils.rnn.pad_sequence(after, batch_first=True)
        return Texts(torch.stack(rows), torch.stack(weights), padded, torch.tensor([len(row) for row in after]))

    def _sequence(self, name: str, prompt: str) -> tuple[Tensor, Tensor]:
        """Encode for the language model: the ids before and after the image."""
        ids = self._language.encode(name, prompt, self.language_vocabulary, IMAGE_TOKENS)
        start = int(np.argmax(ids >= self.language_vocabulary))
        before, after = ids[:start], ids[start + IMAGE_TOKENS :]
        return torch.from_numpy(before).long(), torch.from_numpy(after).long()


class ContextEncoder(nn.Module):
    """Photo and prompt to the context embedding: vision tower, projector, language model, mapping."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vision = CLIPVisionModel(CLIPVisionConfig(**_without_type(MINI.vision)))
        vision, width = MINI.vision["hidden_size"], MINI.language["hidden_size"]
        self.projector = nn.Sequential(nn.Linear(vision, width), nn.GELU(), nn.Linear(width, width))
        self.language = LlamaModel(LlamaConfig(**llama_config({**MINI.language, "vocab_size": vocabulary})))
        self.gate_proj, self.up_proj = (nn.Linear(width, MINI.mapping_width, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(MINI.mapping_width, EMBEDDING, bias=False)

    def forward(self, pixels_pchw: Tensor, before: Tensor, texts: Texts, photo_b: Tensor) -> Tensor:
        """Return embeddings [B, 1024].

        Args:
            pixels_pchw: float [P, 3, 112, 112], the subjects on white in CLIP's normalization.
            before: int64, the ids before the image.
            texts: of the B prompts.
            photo_b: int64 [B], which photo each prompt is about.
        """
        features = self.vision(pixel_values=pixels_pchw, output_hidden_states=True).hidden_states[-2][:, 1:]
        image_bnc = self.projector(features)[photo_b]
        embed = self.language.embed_tokens
        start = embed(before).expand(len(photo_b), -1, -1)
        # Attention is causal, so the padding at the end changes nothing before it.
        hidden = self.language(inputs_embeds=torch.cat([start, image_bnc, embed(texts.language_bl)], 1))[0]
        last = hidden[torch.arange(len(photo_b)), len(before) + image_bnc.shape[1] + texts.lengths_b - 1]
        return self.down_proj(functional.silu(self.gate_proj(last)) * self.up_proj(last))


class MiniMoma(nn.Module):
    """UNet, text encoder, adapters and context encoder."""

    def __init__(self, tokens: Tokens) -> None:
        super().__init__()
        self.unet = UNet2DConditionModel.from_config(dict(MINI.unet))
        set_processors(self.unet)
        config = {**_without_type(MINI.text_encoder), "vocab_size": tokens.text_vocabulary}
        self.text_encoder = CLIPTextModel(CLIPTextConfig(**config))
        self.context = ContextEncoder(tokens.language_vocabulary)
        width = MINI.unet["cross_attention_dim"]
        self.proj, self.norm = nn.Linear(EMBEDDING, CONTEXT_TOKENS * width), nn.LayerNorm(width)
        self._initialize()
        self.unet.to(memory_format=torch.channels_last)

    def encode_text(self, ids_bt: Tensor) -> Tensor:
        """Return text tokens [B, 77, C] of ids [B, 77]."""
        return self.text_encoder(input_ids=ids_bt)[0]

    def context_tokens(self, embedding_bd: Tensor) -> Tensor:
        """Project embeddings [B, 1024] to context tokens [B, 4, C]; zeros give the unconditional ones."""
        return self.norm(self.proj(embedding_bd).unflatten(-1, (CONTEXT_TOKENS, -1)))

    def read_photos(self, latents_pchw: Tensor, ids_pt: Tensor) -> Photos:
        """Run the UNet on noised latents of photos at t = 0, with the bare subject names as text."""
        photos, zero = Photos(), torch.zeros(len(latents_pchw), dtype=torch.long)
        text = self.encode_text(ids_pt)[:, :REFERENCE_TEXT_TOKENS]
        self.unet(latents_pchw, zero, text, cross_attention_kwargs={"state": photos}, return_dict=False)
        return photos

    def forward(self, latents_bchw: Tensor, t_b: Tensor, text_btc: Tensor, state: Pictures) -> tuple[Tensor, Tensor]:
        """Return the predicted noise [B, 4, h, w] and the mean saliency of all layers [B, h * w]."""
        kwargs = {"state": state}
        eps = self.unet(latents_bchw, t_b, text_btc, cross_attention_kwargs=kwargs, return_dict=False)[0]
        return eps, torch.stack(state.saliency).mean(0)

    def _initialize(self) -> None:
        for name, parameter in self.unet.named_parameters():
            # Blocks start as the identity.
            if name.removesuffix(".weight").removesuffix(".bias").endswith(("conv2", "proj_out", "conv_out")):
                nn.init.zeros_(parameter)
            elif ".attn2.processor.to_v_ip" in name:
                nn.init.normal_(parameter, std=0.1)
        for name, parameter in self.text_encoder.named_parameters():
            if name.endswith("token_embedding.weight"):
                nn.init.normal_(parameter, std=0.5)
            elif name.endswith("position_embedding.weight"):
                nn.init.normal_(parameter, std=0.2)


def original_weights(module: MiniMoma) -> dict[str, Any]:
    """Return the weights by role and name of the original files, for `examples.mini_moma.checkpoint`."""
    state = module.state_dict()

    def part(prefix: str, new: str = "") -> dict[str, Tensor]:
        found = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
        # Modules of transformers 4 begin their names with it themselves.
        return {new + key.removeprefix(new): tensor for key, tensor in found.items()}

    # Numbered as the original's file numbers them: in the order of `attn_processors`.
    attentions: dict[str, Tensor] = {}
    for index, processor in enumerate(module.unet.attn_processors):
        attentions |= part(f"unet.{processor}.", f"{index}.")
    mapping = {f"mapping.{name}.weight": state[f"context.{name}.weight"] for name in _MAPPING}
    return {
        "unet": {key: tensor for key, tensor in part("unet.").items() if ".processor." not in key},
        "text_encoder": part("text_encoder.", "text_model."),
        "vision": part("context.vision.", "vision_model."),
        "language": part("context.language.", "model.") | part("context.projector.", "model.mm_projector."),
        "adapters": {
            "projectors": part("proj.", "proj.") | part("norm.", "norm."),
            "self_cross_attentions": attentions,
            "llm_mapping": mapping,
        },
    }


def _without_type(config: Any) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name != "model_type"}
