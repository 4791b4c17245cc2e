"""What a network's tensors look like, and the sizes of the model they belong to.

`export/networks.py` makes these from a checkpoint; the bundle's manifest carries them; ONNX names, dynamic axes,
optimization profiles and runtime buffers all come from them.
"""

import enum
from dataclasses import asdict, dataclass
from typing import Any

Json = dict[str, Any]


class Precision(enum.Enum):
    """Arithmetic of a network's matrix products."""

    FP32 = "fp32"


@dataclass(frozen=True)
class Dim:
    """A dynamic dimension. Equal names within a network are equal sizes; `min`/`opt`/`max` bound the profile."""

    name: str
    min: int
    opt: int
    max: int


@dataclass(frozen=True)
class TensorSpec:
    """One input or output: its name, NumPy dtype name, and shape of constants and dynamic dimensions."""

    name: str
    dtype: str
    shape: tuple[int | Dim, ...]

    @property
    def min_shape(self) -> tuple[int, ...]:
        return tuple(d.min if isinstance(d, Dim) else d for d in self.shape)

    @property
    def opt_shape(self) -> tuple[int, ...]:
        return tuple(d.opt if isinstance(d, Dim) else d for d in self.shape)

    @property
    def max_shape(self) -> tuple[int, ...]:
        return tuple(d.max if isinstance(d, Dim) else d for d in self.shape)

    @property
    def dynamic_axes(self) -> dict[int, Dim]:
        return {axis: d for axis, d in enumerate(self.shape) if isinstance(d, Dim)}

    def resolve(self, **sizes: int) -> tuple[int, ...]:
        """The shape with each dynamic dimension replaced by `sizes[name]`."""
        return tuple(sizes[d.name] if isinstance(d, Dim) else d for d in self.shape)

    def to_json(self) -> Json:
        shape = [asdict(d) if isinstance(d, Dim) else d for d in self.shape]
        return {"name": self.name, "dtype": self.dtype, "shape": shape}

    @classmethod
    def from_json(cls, data: Json) -> "TensorSpec":
        shape = tuple(Dim(**d) if isinstance(d, dict) else int(d) for d in data["shape"])
        return cls(str(data["name"]), str(data["dtype"]), shape)


@dataclass(frozen=True)
class NetworkSpec:
    """A network's name and its tensors, in the order of the ONNX graph."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def tensor(self, name: str) -> TensorSpec:
        return next(t for t in (*self.inputs, *self.outputs) if t.name == name)

    def to_json(self) -> Json:
        return {
            "name": self.name,
            "inputs": [t.to_json() for t in self.inputs],
            "outputs": [t.to_json() for t in self.outputs],
        }

    @classmethod
    def from_json(cls, data: Json) -> "NetworkSpec":
        return cls(
            str(data["name"]),
            tuple(TensorSpec.from_json(t) for t in data["inputs"]),
            tuple(TensorSpec.from_json(t) for t in data["outputs"]),
        )


@dataclass(frozen=True)
class SelfAttentionLayer:
    """One self-attention layer of the UNet: diffusers' path of its transformer, grid side, width and heads."""

    name: str
    grid: int
    channels: int
    heads: int


@dataclass(frozen=True)
class LanguageGeometry:
    """Sizes of the language model and of the vision encoder in front of it."""

    vocabulary: int
    width: int
    layers: int
    kv_heads: int
    head_width: int
    vision_image_size: int
    image_tokens: int


@dataclass(frozen=True)
class Geometry:
    """Sizes the runtime needs. `self_attention` is in the adapter file's order (down, up, mid)."""

    image_size: int
    latent_channels: int
    latent_size: int
    text_tokens: int
    text_width: int
    context_tokens: int
    embedding_width: int
    self_attention: tuple[SelfAttentionLayer, ...]
    language: LanguageGeometry | None

    @property
    def grids(self) -> tuple[int, ...]:
        """The distinct sides of the self-attention grids, finest first (64, 32, 16, 8 for SD1.5 at 512²)."""
        return tuple(sorted({layer.grid for layer in self.self_attention}, reverse=True))

    def to_json(self) -> Json:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Json) -> "Geometry":
        layers = tuple(SelfAttentionLayer(**layer) for layer in data["self_attention"])
        language = LanguageGeometry(**data["language"]) if data["language"] is not None else None
        return cls(**{**data, "self_attention": layers, "language": language})
