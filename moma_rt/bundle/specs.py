"""Names, dtypes and shapes of a network's tensors, and the sizes of the model.

`export/networks.py` makes these from a checkpoint; the bundle's manifest carries them; ONNX names, dynamic axes,
optimization profiles and runtime buffers all come from them. The readers (`from_json`) trust nothing: they return
consistent values, or raise a ValueError that names the field.
"""

import enum
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

from moma_rt.messages import short_repr

Json = dict[str, Any]

DTYPES = ("float32", "float16", "int64", "int32", "int8", "uint8", "bool")
# The largest dimension that ONNX Runtime and TensorRT allow.
MAX_SIZE = 2**31 - 1


class Precision(enum.Enum):
    """Arithmetic of a network's matrix products.

    INT8 and INT4 quantize the language model's stored weights only, with a scale per output channel or per block of
    inputs; the arithmetic is FP16.
    """

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"
    INT4 = "int4"

    @property
    def is_weight_only(self) -> bool:
        """Whether only the stored weights have this precision."""
        return self in (Precision.INT8, Precision.INT4)

    @property
    def edge_dtype(self) -> str:
        """NumPy's name of the dtype in which large tensors pass between networks; NumPy has no bfloat16."""
        return "float32" if self in (Precision.FP32, Precision.BF16) else "float16"


@dataclass(frozen=True)
class Dim:
    """A dynamic dimension. Equal names within a network are equal sizes; `min`/`opt`/`max` bound the profile."""

    name: str
    min: int
    opt: int
    max: int

    @classmethod
    def from_json(cls, data: Json) -> "Dim":
        """Raises ValueError unless 0 <= min <= opt <= max and max >= 1."""
        check_fields(cls, data)
        dim = cls(
            _name("dimension", data["name"]),
            _size("min", data["min"], 0),
            _size("opt", data["opt"], 0),
            _size("max", data["max"]),
        )
        if not dim.min <= dim.opt <= dim.max:
            raise ValueError(f"dimension {dim.name!r} needs min <= opt <= max, not {dim.min}, {dim.opt}, {dim.max}")
        return dim


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
        """Raises ValueError for a dtype not in `DTYPES`, or a size outside 1 to `MAX_SIZE`."""
        check_fields(cls, data)
        name, dtype = _name("tensor", data["name"]), data["dtype"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise ValueError(f"tensor {name!r} has dtype {short_repr(dtype)}; known: {', '.join(DTYPES)}")
        sizes = _list(f"the shape of tensor {name!r}", data["shape"])
        shape = tuple(Dim.from_json(d) if isinstance(d, dict) else _size(f"a size of {name!r}", d) for d in sizes)
        return cls(name, dtype, shape)


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
        """Raises ValueError for two tensors of the same name, or different bounds of the same dimension."""
        check_fields(cls, data)
        name = _name("network", data["name"])
        inputs = tuple(TensorSpec.from_json(t) for t in _list("inputs", data["inputs"]))
        outputs = tuple(TensorSpec.from_json(t) for t in _list("outputs", data["outputs"]))
        tensors = (*inputs, *outputs)
        _check_unique(f"network {name!r}: tensor", (tensor.name for tensor in tensors))
        dims = {dim for tensor in tensors for dim in tensor.dynamic_axes.values()}
        _check_unique(f"network {name!r}: bounds of dimension", (dim.name for dim in dims))
        return cls(name, inputs, outputs)


@dataclass(frozen=True)
class SelfAttentionLayer:
    """One self-attention layer of the UNet: diffusers' path of its transformer, grid side, channels and heads."""

    name: str
    grid: int
    channels: int
    heads: int

    @classmethod
    def from_json(cls, data: Json) -> "SelfAttentionLayer":
        """Raises ValueError unless the sizes are at least 1 and `heads` divides `channels`."""
        check_fields(cls, data)
        layer = cls(_name("layer", data["name"]), *(_size(key, data[key]) for key in ("grid", "channels", "heads")))
        _check_divides(layer.name, "heads", layer.heads, "channels", layer.channels)
        return layer


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

    @classmethod
    def from_json(cls, data: Json) -> "LanguageGeometry":
        """Raises ValueError unless all sizes are at least 1."""
        return cls(**{key: _size(key, data[key]) for key in check_fields(cls, data)})


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
        """Raises ValueError for sizes below 1 or that do not divide each other, no layer, or two of the same name."""
        sizes = check_fields(cls, data) - {"self_attention", "language"}
        layers = tuple(SelfAttentionLayer.from_json(x) for x in _list("self_attention", data["self_attention"]))
        language = LanguageGeometry.from_json(data["language"]) if data["language"] is not None else None
        geometry = cls(
            **{key: _size(key, data[key]) for key in sizes},
            self_attention=layers,
            language=language,
        )
        if not layers:
            raise ValueError("self_attention has no layers")
        _check_unique("layer", (layer.name for layer in layers))
        _check_divides("geometry", "latent_size", geometry.latent_size, "image_size", geometry.image_size)
        for layer in layers:
            _check_divides(layer.name, "grid", layer.grid, "latent_size", geometry.latent_size)
        return geometry


def check_fields(cls: type, data: Json) -> set[str]:
    """Return the names of a dataclass's fields; raises ValueError unless `data` has exactly these."""
    names = {field.name for field in fields(cls)}
    if not isinstance(data, dict) or data.keys() != names:
        found = sorted(data) if isinstance(data, dict) else data
        raise ValueError(f"{cls.__name__} has the fields {', '.join(sorted(names))}, not {short_repr(found)}")
    return names


def _name(what: str, value: object) -> str:
    if not isinstance(value, str) or not value or not value.isprintable():
        raise ValueError(f"the name of a {what} is {short_repr(value)}, not a line of text")
    return value


def _size(what: str, value: object, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MAX_SIZE:
        raise ValueError(f"{what} is {short_repr(value)}, not a whole number of {least} to {MAX_SIZE}")
    return value


def _list(what: str, value: object) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{what} is {short_repr(value)}, not a list")
    return list(value)


def _check_unique(what: str, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"{what} {name!r} is given twice")
        seen.add(name)


def _check_divides(owner: str, small_name: str, small: int, large_name: str, large: int) -> None:
    if large % small:
        raise ValueError(f"{owner}: {small_name} {small} does not divide {large_name} {large}")
