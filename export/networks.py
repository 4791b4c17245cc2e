"""The table of all networks: the tensors of each, and the module that computes it.

ONNX names and axes, example inputs, optimization profiles and runtime buffers all follow from the specs made here.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from export.checkpoints.adapters import AdapterGeometry
from export.checkpoints.adapters import expected_shapes as adapter_shapes
from export.checkpoints.architectures import Shapes, expected_shapes, llama_config
from export.checkpoints.model import ADAPTERS, LANGUAGE, Checkpoint, Component
from export.checkpoints.values import converted
from export.models.language import ContextProjector, LanguageModel
from export.models.text import TextEncoder
from export.models.unet import Denoiser, SubjectEncoder, load_unet
from export.models.vae import VaeDecoder, VaeEncoder, load_vae
from export.models.vision import VisionEncoder
from export.streaming import WeightSource, use_projections
from moma_rt.bundle.specs import Dim, Geometry, NetworkSpec, Precision, TensorSpec
from moma_rt.errors import CheckpointError, InputError
from moma_rt.schedulers.tables import ROW_LENGTH

MAX_BATCH = 4
MAX_LANGUAGE_TOKENS = 2048

_BATCH = Dim("batch", 1, 1, MAX_BATCH)
# One or two guidance halves per sample; the shape says which.
_GUIDED_BATCH = Dim("guided_batch", 1, 2, 2 * MAX_BATCH)
_DTYPES = MappingProxyType(
    {
        Precision.FP32: torch.float32,
        Precision.FP16: torch.float16,
        Precision.BF16: torch.bfloat16,
        Precision.INT8: torch.float16,
        Precision.INT4: torch.float16,
    }
)


@dataclass(frozen=True)
class Network:
    """One row of the table.

    `tensors` makes the spec, given the dtype of the large tensors that pass between networks; `parts` makes the module
    with weights converted to a dtype; `arguments` turns the flat inputs, in the spec's order, into the module's
    positional arguments; `source` reads single weights of a network whose weights do not fit in memory.
    """

    name: str
    tensors: Callable[[Geometry, str], NetworkSpec]
    parts: Callable[[Checkpoint, Geometry, torch.dtype], nn.Module]
    arguments: Callable[[tuple[Any, ...], Geometry], tuple[Any, ...]] = lambda flat, _: flat
    source: Callable[[Checkpoint], WeightSource] | None = None

    def spec(self, geometry: Geometry, precision: Precision = Precision.FP32) -> NetworkSpec:
        """The network's inputs and outputs in the given precision."""
        return self.tensors(geometry, precision.edge_dtype)

    def module(self, checkpoint: Checkpoint, geometry: Geometry, precision: Precision = Precision.FP32) -> nn.Module:
        """The network in PyTorch with the checkpoint's weights; linear layers store theirs as [inputs, outputs]."""
        module = self.parts(checkpoint, geometry, _DTYPES[precision])
        use_projections(module)
        return module

    def structure(self, checkpoint: Checkpoint, geometry: Geometry, precision: Precision = Precision.FP32) -> nn.Module:
        """The same module on the meta device, for tracing: the checkpoint's weights are not read."""
        return self.module(_placeholders(checkpoint), geometry, precision)


@dataclass(frozen=True)
class Precisions:
    """The precisions of a bundle's networks: of the language model, and of all others.

    `wide` names networks whose values leave half precision's range: they are fp32 where the others are fp16.
    """

    networks: Precision = Precision.FP32
    language: Precision = Precision.FP32
    wide: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.networks.is_weight_only:
            allowed = ", ".join(p.value for p in Precision if not p.is_weight_only)
            raise InputError(f"{self.networks.value} is for the language model only; other networks take {allowed}")

    def of(self, name: str) -> Precision:
        """The precision of a network. The context projector's 3 million weights are too few to be worth rounding."""
        if name == "context_projector" or (name in self.wide and self.networks is Precision.FP16):
            return Precision.FP32
        return self.language if name == "language_model" else self.networks


def _float(name: str, *shape: int | Dim, dtype: str = "float32") -> TensorSpec:
    return TensorSpec(name, dtype, shape)


def _int(name: str, *shape: int | Dim) -> TensorSpec:
    return TensorSpec(name, "int32", shape)


def _image(name: str, g: Geometry) -> TensorSpec:
    return _float(name, 1, 3, g.image_size, g.image_size)


def _latents(name: str, g: Geometry, batch: int | Dim = 1) -> TensorSpec:
    return _float(name, batch, g.latent_channels, g.latent_size, g.latent_size)


def _reference(g: Geometry, edge: str, batch: int | Dim, tokens: Mapping[int, int | Dim]) -> tuple[TensorSpec, ...]:
    """The reference's K of every layer, then V of every layer."""
    return tuple(
        _float(f"reference_{kind}.{layer.name}", batch, tokens[layer.grid], layer.channels, dtype=edge)
        for kind in ("k", "v")
        for layer in g.self_attention
    )


def _text_encoder_spec(g: Geometry, edge: str) -> NetworkSpec:
    return NetworkSpec(
        "text_encoder",
        (_int("token_ids", _GUIDED_BATCH, g.text_tokens),),
        (_float("text_tokens", _GUIDED_BATCH, g.text_tokens, g.text_width, dtype=edge),),
    )


def _vae_encoder_spec(g: Geometry, edge: str) -> NetworkSpec:
    return NetworkSpec("vae_encoder", (_image("image", g), _latents("noise", g)), (_latents("latents", g),))


def _subject_encoder_spec(g: Geometry, edge: str) -> NetworkSpec:
    text = _float("text_tokens", 1, g.text_tokens, g.text_width, dtype=edge)
    outputs = _reference(g, edge, 1, {grid: grid * grid for grid in g.grids})
    return NetworkSpec("subject_encoder", (_latents("latents", g), _latents("noise", g), text), outputs)


def _vision_encoder_spec(g: Geometry, edge: str) -> NetworkSpec:
    language = _language(g)
    side = language.vision_image_size
    tokens = _float("image_tokens", 1, language.image_tokens, language.width, dtype=edge)
    return NetworkSpec("vision_encoder", (_float("pixels", 1, 3, side, side),), (tokens,))


def _language_model_spec(g: Geometry, edge: str) -> NetworkSpec:
    language = _language(g)
    prompt = language.image_tokens + 64
    sequence = Dim("sequence", 1, 32, MAX_LANGUAGE_TOKENS)
    past = Dim("past", 0, prompt, MAX_LANGUAGE_TOKENS)
    image_sequence = Dim("image_sequence", 1, language.image_tokens, language.image_tokens)
    kv = (language.layers, 2, language.kv_heads)
    return NetworkSpec(
        "language_model",
        (
            _int("token_ids", 1, sequence),
            _float("image_tokens", 1, image_sequence, language.width, dtype=edge),
            _int("positions", 1, sequence),
            _float("past_kv", *kv, past, language.head_width, dtype=edge),
        ),
        (
            _float("embedding", 1, g.embedding_width),
            _float("new_kv", *kv, sequence, language.head_width, dtype=edge),
        ),
    )


def _context_projector_spec(g: Geometry, edge: str) -> NetworkSpec:
    tokens = _float("context_tokens", _BATCH, g.context_tokens, g.text_width)
    return NetworkSpec("context_projector", (_float("embedding", _BATCH, g.embedding_width),), (tokens,))


def _denoiser_spec(g: Geometry, edge: str) -> NetworkSpec:
    """Inputs and outputs of one denoising step."""
    tokens = {grid: Dim(f"reference_tokens_{grid}", 1, max(1, grid * grid // 2), grid * grid) for grid in g.grids}
    mask = (_BATCH, 1, g.latent_size, g.latent_size)
    inputs = (
        _latents("latents", g, _BATCH),
        _latents("history", g, _BATCH),
        _latents("noise", g, _BATCH),
        _float("schedule_row", ROW_LENGTH),
        _float("strength", _BATCH),
        _float("text_tokens", _GUIDED_BATCH, g.text_tokens, g.text_width, dtype=edge),
        _float("context_tokens", _GUIDED_BATCH, g.context_tokens, g.text_width, dtype=edge),
        _float("subject_weights", _BATCH, g.text_tokens),
        _float("foreground_mask", *mask),
        *(_float(f"object_mask.{grid}", _BATCH, tokens[grid]) for grid in g.grids),
        *_reference(g, edge, _BATCH, tokens),
    )
    outputs = (
        _latents("next_latents", g, _BATCH),
        _latents("next_history", g, _BATCH),
        _float("next_foreground_mask", *mask),
    )
    return NetworkSpec("denoiser", inputs, outputs)


def denoiser_arguments(flat: tuple[Any, ...], g: Geometry) -> tuple[Any, ...]:
    """Gather the masks, the keys and the values of the denoiser's flat inputs into three tuples."""
    grids, layers = len(g.grids), len(g.self_attention)
    fixed = len(flat) - grids - 2 * layers
    masks, keys = flat[fixed : fixed + grids], flat[fixed + grids : fixed + grids + layers]
    return (*flat[:fixed], masks, keys, flat[fixed + grids + layers :])


def _vae_decoder_spec(g: Geometry, edge: str) -> NetworkSpec:
    image = TensorSpec("image", "uint8", (_BATCH, g.image_size, g.image_size, 3))
    return NetworkSpec("vae_decoder", (_latents("latents", g, _BATCH),), (image, _float("pixel_mean", _BATCH)))


def _language(g: Geometry) -> Any:
    if g.language is None:
        raise CheckpointError("this checkpoint has no language model: give one with --mllm DIR")
    return g.language


def _weights(component: Component | None, dtype: torch.dtype) -> dict[str, Tensor]:
    if component is None:
        raise CheckpointError("a component that this network needs was not given")
    weights = component.load()
    for name in weights:
        # One at a time, so that each stored tensor is freed as soon as it is converted.
        weights[name] = converted(weights[name], dtype, f"{component.role} of {component.name}: {name}")
    return weights


def _select(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def _text_encoder(c: Checkpoint, g: Geometry, dtype: torch.dtype) -> nn.Module:
    return TextEncoder(c.text_encoder.config, _weights(c.text_encoder, dtype))


def _vae_encoder(c: Checkpoint, g: Geometry, dtype: torch.dtype) -> nn.Module:
    return VaeEncoder(load_vae(c.vae.config, _weights(c.vae, dtype)))


def _vae_decoder(c: Checkpoint, g: Geometry, dtype: torch.dtype) -> nn.Module:
    return VaeDecoder(load_vae(c.vae.config, _weights(c.vae, dtype)))


def _denoiser(c: Checkpoint, g: Geometry, dtype: torch.dtype) -> nn.Module:
    return Denoiser(load_unet(c.unet.config, _weights(c.unet, dtype)), _weights(c.adapters, dtype), g)


def _subject_encoder(c: Checkpoint, g: Geometry, dtype: torch.dtype) -> nn.Module:
    return SubjectEncoder(load_unet(c.unet.config, _weights(c.unet, dtype)), _weights(c.adapters, dtype), g)


def _vision_encoder(c: Checkpoint, g: Geometry, dtype: torch.dtype) -> nn.Module:
    assert c.vision is not None
    projector = _select(_weights(c.language, dtype), "mm_projector.")
    return VisionEncoder(c.vision.config, _weights(c.vision, dtype), projector)


def _placeholders(c: Checkpoint) -> Checkpoint:
    """The checkpoint with tensors on the meta device in place of its weights."""

    def empty(component: Component) -> Component:
        @functools.cache
        def shapes() -> Shapes:
            if component.role == ADAPTERS:
                return adapter_shapes(c.unet.config, AdapterGeometry(**component.config))
            return expected_shapes(component.role, component.config, component.name)

        def load(names: Iterable[str] | None = None) -> dict[str, Tensor]:
            return {n: torch.empty(shapes()[n], device="meta") for n in (shapes() if names is None else names)}

        return dataclasses.replace(component, load=load)

    optional = {
        name: empty(component)
        for name in ("adapters", "language", "vision")
        if (component := getattr(c, name)) is not None
    }
    return dataclasses.replace(c, unet=empty(c.unet), vae=empty(c.vae), text_encoder=empty(c.text_encoder), **optional)


def _language_source(c: Checkpoint) -> WeightSource:
    language, adapters = c.language, c.adapters
    assert language is not None
    assert adapters is not None
    shapes = expected_shapes(LANGUAGE, language.config, language.name)

    def read(name: str) -> Tensor:
        return (adapters if name.startswith("mapping.") else language).load([name])[name]

    # Only the decoder's matrices are quantized: embeddings are looked up, and norms are vectors.
    return WeightSource(read, frozenset(n for n in shapes if n.startswith("layers.") and n.endswith("_proj.weight")))


def _language_model(c: Checkpoint, g: Geometry, dtype: torch.dtype) -> nn.Module:
    assert c.language is not None
    weights = {name: t for name, t in _weights(c.language, dtype).items() if not name.startswith("mm_projector.")}
    return LanguageModel(llama_config(c.language.config), weights, _select(_weights(c.adapters, dtype), "mapping."))


def _context_projector(c: Checkpoint, g: Geometry, dtype: torch.dtype) -> nn.Module:
    return ContextProjector(_select(_weights(c.adapters, dtype), "projectors."), g.text_width)


NETWORKS = MappingProxyType(
    {
        n.name: n
        for n in (
            Network("text_encoder", _text_encoder_spec, _text_encoder),
            Network("vae_encoder", _vae_encoder_spec, _vae_encoder),
            Network("subject_encoder", _subject_encoder_spec, _subject_encoder),
            Network("vision_encoder", _vision_encoder_spec, _vision_encoder),
            Network("language_model", _language_model_spec, _language_model, source=_language_source),
            Network("context_projector", _context_projector_spec, _context_projector),
            Network("denoiser", _denoiser_spec, _denoiser, denoiser_arguments),
            Network("vae_decoder", _vae_decoder_spec, _vae_decoder),
        )
    }
)
