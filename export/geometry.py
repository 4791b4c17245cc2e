"""The sizes a runtime needs, read from a checkpoint's configurations."""

from typing import Any

from export.checkpoints.model import Checkpoint, Component
from moma_rt.specs import Geometry, LanguageGeometry, SelfAttentionLayer

# CLIP's text length, and the width of MoMA's embedding and its number of context tokens (`design` of the adapters).
TEXT_TOKENS = 77
EMBEDDING_WIDTH = 1024
CONTEXT_TOKENS = 4


def geometry_of(checkpoint: Checkpoint) -> Geometry:
    """The geometry of a checkpoint; `language` is None where it has no language model or no vision tower."""
    unet, vae = checkpoint.unet.config, checkpoint.vae.config
    latent_size = checkpoint.image_size // 2 ** (len(vae["block_out_channels"]) - 1)
    return Geometry(
        image_size=checkpoint.image_size,
        latent_channels=int(unet["in_channels"]),
        latent_size=latent_size,
        text_tokens=TEXT_TOKENS,
        text_width=int(unet["cross_attention_dim"]),
        context_tokens=CONTEXT_TOKENS,
        embedding_width=EMBEDDING_WIDTH,
        self_attention=self_attention_layers(unet, latent_size),
        language=_language_geometry(checkpoint.language, checkpoint.vision),
    )


def self_attention_layers(unet: dict[str, Any], latent_size: int) -> tuple[SelfAttentionLayer, ...]:
    """Every self-attention layer of an SD1.5-like UNet in the adapter file's order: down, up, mid."""
    widths = [int(w) for w in unet["block_out_channels"]]
    # diffusers' naming slip: in SD1.5's configuration "attention_head_dim" is the number of heads.
    heads = int(unet.get("num_attention_heads") or unet["attention_head_dim"])
    depth = int(unet["layers_per_block"])
    layers = []
    for block, kind in enumerate(unet["down_block_types"]):
        for index in range(depth if "CrossAttn" in kind else 0):
            name = f"down_blocks.{block}.attentions.{index}"
            layers.append(SelfAttentionLayer(name, latent_size >> block, widths[block], heads))
    for block, kind in enumerate(unet["up_block_types"]):
        level = len(widths) - 1 - block
        for index in range(depth + 1 if "CrossAttn" in kind else 0):
            name = f"up_blocks.{block}.attentions.{index}"
            layers.append(SelfAttentionLayer(name, latent_size >> level, widths[level], heads))
    level = len(widths) - 1
    layers.append(SelfAttentionLayer("mid_block.attentions.0", latent_size >> level, widths[level], heads))
    return tuple(layers)


def _language_geometry(language: Component | None, vision: Component | None) -> LanguageGeometry | None:
    if language is None or vision is None:
        return None
    config, tower = language.config, vision.config
    heads = int(config["num_attention_heads"])
    return LanguageGeometry(
        vocabulary=int(config["vocab_size"]),
        width=int(config["hidden_size"]),
        layers=int(config["num_hidden_layers"]),
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_width=int(config["hidden_size"]) // heads,
        vision_image_size=int(tower["image_size"]),
        image_tokens=(int(tower["image_size"]) // int(tower["patch_size"])) ** 2,
    )
