"""The sizes a runtime needs, read from a checkpoint's configurations."""

from typing import Any

from export.checkpoints.adapters import CONTEXT_TOKENS, EMBEDDING_WIDTH
from export.checkpoints.architectures import LATENT_CHANNELS, TEXT_TOKENS, attention_layers
from export.checkpoints.model import Checkpoint, Component
from moma_rt.bundle.specs import Geometry, LanguageGeometry, SelfAttentionLayer
from moma_rt.errors import CheckpointError


def geometry_of(checkpoint: Checkpoint) -> Geometry:
    """The geometry of a checkpoint; `language` is None if it has no language model or no vision tower.

    Raises:
        CheckpointError: the adapters' embedding width is not the one that the runtime uses.
    """
    unet, vae, adapters = checkpoint.unet.config, checkpoint.vae.config, checkpoint.adapters
    width = EMBEDDING_WIDTH if adapters is None else adapters.config["embedding_width"]
    if width != EMBEDDING_WIDTH:
        raise CheckpointError(f"the adapter file has embeddings of width {width}; MoMA's have {EMBEDDING_WIDTH}")
    latent_size = checkpoint.image_size // 2 ** (len(vae["block_out_channels"]) - 1)
    return Geometry(
        image_size=checkpoint.image_size,
        latent_channels=LATENT_CHANNELS,
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
    return tuple(
        SelfAttentionLayer(
            layer.path.split(".transformer_blocks.")[0], latent_size >> layer.level, layer.channels, layer.heads
        )
        for layer in attention_layers(unet)
        if layer.is_self
    )


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
