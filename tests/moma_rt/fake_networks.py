"""Fake networks, a few lines of NumPy each, and their specs.

Each depends on all its inputs, so that a wrong or stale input changes the picture.
"""

from collections.abc import Callable

import numpy as np

from moma_rt.bundle.specs import (
    Dim,
    Geometry,
    LanguageGeometry,
    NetworkSpec,
    SelfAttentionLayer,
    TensorSpec,
)
from moma_rt.schedulers.tables import Column

SIZE, LATENT, TEXT_WIDTH, EMBEDDING = 64, 8, 6, 16
MAX_BATCH = 4
LAYERS = (
    SelfAttentionLayer("down_blocks.0.attentions.0", 8, 4, 2),
    SelfAttentionLayer("up_blocks.1.attentions.0", 4, 6, 2),
    SelfAttentionLayer("up_blocks.2.attentions.0", 8, 4, 2),
)
LANGUAGE = LanguageGeometry(
    vocabulary=300, width=5, layers=2, kv_heads=1, head_width=3, vision_image_size=14, image_tokens=7
)
GEOMETRY = Geometry(SIZE, 4, LATENT, 77, TEXT_WIDTH, 4, EMBEDDING, LAYERS, LANGUAGE)

B, GB = Dim("batch", 1, 1, MAX_BATCH), Dim("guided_batch", 1, 2, 2 * MAX_BATCH)
S, P, M = Dim("sequence", 1, 20, 2048), Dim("past", 0, 20, 2048), Dim("image_sequence", 1, 7, 7)
N = {grid: Dim(f"reference_tokens_{grid}", 1, grid * grid, grid * grid) for grid in GEOMETRY.grids}


def _f32(name: str, *shape: int | Dim) -> TensorSpec:
    return TensorSpec(name, "float32", shape)


def _reference(batch: int | Dim, tokens: Callable[[int], int | Dim]) -> tuple[TensorSpec, ...]:
    return tuple(
        _f32(f"reference_{kind}.{layer.name}", batch, tokens(layer.grid), layer.channels)
        for layer in LAYERS
        for kind in "kv"
    )


_KV = (LANGUAGE.layers, 2, LANGUAGE.kv_heads)
_LATENTS = (4, LATENT, LATENT)
SPECS = {
    spec.name: spec
    for spec in (
        NetworkSpec(
            "text_encoder", (TensorSpec("token_ids", "int32", (B, 77)),), (_f32("text_tokens", B, 77, TEXT_WIDTH),)
        ),
        NetworkSpec(
            "vae_encoder",
            (_f32("image", 1, 3, SIZE, SIZE), _f32("noise", 1, *_LATENTS)),
            (_f32("latents", 1, *_LATENTS),),
        ),
        NetworkSpec(
            "subject_encoder",
            (_f32("latents", 1, *_LATENTS), _f32("noise", 1, *_LATENTS), _f32("text_tokens", 1, 77, TEXT_WIDTH)),
            _reference(1, lambda grid: grid * grid),
        ),
        NetworkSpec("vision_encoder", (_f32("pixels", 1, 3, 14, 14),), (_f32("image_tokens", 1, 7, LANGUAGE.width),)),
        NetworkSpec(
            "language_model",
            (
                TensorSpec("token_ids", "int32", (1, S)),
                _f32("image_tokens", 1, M, LANGUAGE.width),
                TensorSpec("positions", "int32", (1, S)),
                _f32("past_kv", *_KV, P, LANGUAGE.head_width),
            ),
            (_f32("embedding", 1, EMBEDDING), _f32("new_kv", *_KV, S, LANGUAGE.head_width)),
        ),
        NetworkSpec(
            "context_projector", (_f32("embedding", B, EMBEDDING),), (_f32("context_tokens", B, 4, TEXT_WIDTH),)
        ),
        NetworkSpec(
            "denoiser",
            (
                _f32("latents", B, *_LATENTS),
                _f32("history", B, *_LATENTS),
                _f32("noise", B, *_LATENTS),
                _f32("schedule_row", 64),
                _f32("strength", B),
                _f32("text_tokens", GB, 77, TEXT_WIDTH),
                _f32("context_tokens", GB, 4, TEXT_WIDTH),
                _f32("subject_weights", B, 77),
                _f32("foreground_mask", B, 1, LATENT, LATENT),
                *(_f32(f"object_mask.{grid}", B, N[grid]) for grid in GEOMETRY.grids),
                *_reference(B, lambda grid: N[grid]),
            ),
            (
                _f32("next_latents", B, *_LATENTS),
                _f32("next_history", B, *_LATENTS),
                _f32("next_foreground_mask", B, 1, LATENT, LATENT),
            ),
        ),
        NetworkSpec(
            "vae_decoder",
            (_f32("latents", B, *_LATENTS),),
            (TensorSpec("image", "uint8", (B, SIZE, SIZE, 3)), _f32("pixel_mean", B)),
        ),
    )
}

Arrays = dict[str, np.ndarray]


def _text_encoder(i: Arrays) -> Arrays:
    return {"text_tokens": np.sin(i["token_ids"][..., None] * np.linspace(0.1, 1.0, TEXT_WIDTH))}


def _vae_encoder(i: Arrays) -> Arrays:
    pooled = i["image"].mean(1).reshape(1, 1, LATENT, 8, LATENT, 8).mean((3, 5))
    return {"latents": pooled + 0.1 * i["noise"]}


def _subject_encoder(i: Arrays) -> Arrays:
    outputs = {}
    plane = (i["latents"] + i["noise"])[0].mean(0) + i["text_tokens"].mean()
    for index, layer in enumerate(LAYERS):
        stride = LATENT // layer.grid
        tokens = plane[::stride, ::stride].reshape(1, -1, 1) + np.arange(layer.channels) + 10 * index
        outputs |= {f"reference_k.{layer.name}": tokens, f"reference_v.{layer.name}": np.cos(tokens)}
    return outputs


def _vision_encoder(i: Arrays) -> Arrays:
    return {"image_tokens": i["pixels"].mean() + np.arange(7 * LANGUAGE.width).reshape(1, 7, -1)}


def _language_model(i: Arrays) -> Arrays:
    ids, images = i["token_ids"][0], i["image_tokens"][0].mean(-1)
    image_index = np.clip(ids - LANGUAGE.vocabulary, 0, len(images) - 1)
    tokens = np.where(ids >= LANGUAGE.vocabulary, images[image_index], ids / 50.0) * (1.0 + 0.01 * i["positions"][0])
    new_kv = np.broadcast_to(tokens[:, None], (*_KV, len(ids), LANGUAGE.head_width))
    total = i["past_kv"][0, 0, 0, :, 0].sum(dtype=np.float64) + tokens.sum(dtype=np.float64)
    return {"embedding": np.sin(total * np.linspace(0.01, 0.1, EMBEDDING))[None], "new_kv": new_kv}


def _context_projector(i: Arrays) -> Arrays:
    return {"context_tokens": i["embedding"][:, None, :TEXT_WIDTH] * np.arange(1, 5)[:, None] + 0.5}


def _denoiser(i: Arrays) -> Arrays:
    row, batch = i["schedule_row"], len(i["latents"])

    def per_sample(x: np.ndarray) -> np.ndarray:
        return x.reshape(len(x), -1).mean(1)[:, None, None, None]

    text = np.concatenate([i["text_tokens"]] * (1 if len(i["text_tokens"]) > batch else 2))
    context = np.concatenate([i["context_tokens"]] * (1 if len(i["context_tokens"]) > batch else 2))
    halves = per_sample(text) + 0.5 * per_sample(context)
    eps = 0.1 * i["latents"] + halves[:batch] + row[Column.GUIDANCE] * (halves[-batch:] - halves[:batch])
    weighted = (i["subject_weights"] * i["text_tokens"][-batch:].mean(2)).sum(1)
    for layer in LAYERS:
        mask = i[f"object_mask.{layer.grid}"][..., None]
        k, v = i[f"reference_k.{layer.name}"], i[f"reference_v.{layer.name}"]
        reference = ((k + v) * mask).sum((1, 2)) / mask.sum((1, 2))
        scale = row[Column.INJECTION] * i["strength"] * 0.01
        eps = eps + (scale * (reference + weighted))[:, None, None, None] * i["foreground_mask"]
    following = (
        row[Column.LATENTS] * i["latents"]
        + row[Column.EPS] * eps
        + row[Column.HISTORY] * i["history"]
        + row[Column.NOISE] * i["noise"]
    )
    history = (
        row[Column.HISTORY_LATENTS] * i["latents"]
        + row[Column.HISTORY_EPS] * eps
        + row[Column.HISTORY_HISTORY] * i["history"]
    )
    foreground = 1 / (1 + np.exp(-following.mean(1, keepdims=True))) * (0.5 + 0.5 * i["foreground_mask"])
    return {"next_latents": following, "next_history": history, "next_foreground_mask": foreground}


def _vae_decoder(i: Arrays) -> Arrays:
    levels = np.tanh(i["latents"][:, :3] / 4) * 127.5 + 127.5
    image = levels.transpose(0, 2, 3, 1).repeat(8, 1).repeat(8, 2).round().astype(np.uint8)
    return {"image": image, "pixel_mean": i["latents"].mean((1, 2, 3))}


FUNCTIONS: dict[str, Callable[[Arrays], Arrays]] = {
    "text_encoder": _text_encoder,
    "vae_encoder": _vae_encoder,
    "subject_encoder": _subject_encoder,
    "vision_encoder": _vision_encoder,
    "language_model": _language_model,
    "context_projector": _context_projector,
    "denoiser": _denoiser,
    "vae_decoder": _vae_decoder,
}
