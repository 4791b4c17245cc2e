"""A subject: everything a photo contributes to the pictures made of it, in memory or in one file."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from moma_rt.backends.base import Array
from moma_rt.bundle import Bundle
from moma_rt.errors import SubjectError
from moma_rt.files import atomic_write
from moma_rt.specs import Geometry

FORMAT_VERSION = 1
_METADATA_KEY = "moma_subject"
# Reference K/V fit the UNet they were read from; the prefix fits its language model. Whatever else made them (the VAE,
# the vision encoder) and how the networks were exported may differ.
_BASE_ROLES = ("unet", "adapters")
_LANGUAGE_ROLES = ("language",)


@dataclass(frozen=True)
class Origin:
    """Which weights a subject was computed with: the base's name for messages, fingerprints for the comparison.

    `language` is None if the bundle had nothing of a language model.
    """

    base: str
    fingerprint: str
    language: str | None

    @classmethod
    def of(cls, bundle: Bundle) -> "Origin":
        """What a subject enrolled with `bundle` would carry."""
        language = bundle.fingerprint(*_LANGUAGE_ROLES) if bundle.has_sources(*_LANGUAGE_ROLES) else None
        return cls(bundle.manifest.base, bundle.fingerprint(*_BASE_ROLES), language)


@dataclass(frozen=True)
class Prefix:
    """The language model's work on the photo and the subject's name.

    `ids` int32 [P]; `kv` [layers, 2, KV heads, P, head width].
    """

    ids: NDArray[np.int32]
    kv: Array


@dataclass(frozen=True, eq=False)
class Subject:
    """An enrolled photo.

    Attributes:
        name: the subject's name in prompts, such as "car".
        reference_k: by self-attention layer, float32 [N_g, C]: keys of the tokens inside the mask.
        reference_v: likewise, the values.
        object_mask: by grid side g, float32 [N_g]: 1 where a reference token counts.
        photo: uint8 [h,w,RGB], a thumbnail for people.
        mask: bool [H,W], True on the subject, as the networks saw it.
        prefix: None if the bundle had no language model.
        origin: the weights all this was computed with.
        seconds: how long each stage of the enrolment took; not kept in the file.
    """

    name: str
    reference_k: Mapping[str, Array]
    reference_v: Mapping[str, Array]
    object_mask: Mapping[int, Array]
    photo: NDArray[np.uint8]
    mask: NDArray[np.bool_]
    prefix: Prefix | None
    origin: Origin
    seconds: Mapping[str, float] = field(default_factory=dict)

    @cached_property
    def identity(self) -> str:
        """A hash of the content: equal subjects give equal pictures."""
        digest = hashlib.sha256(json.dumps(self._metadata()).encode())
        for name, tensor in sorted(self._tensors().items()):
            # The prefix KV follows from what else is hashed, and at full size it is half a gigabyte.
            if name != "prefix_kv":
                digest.update(f"{name}{tensor.shape}".encode())
                digest.update(np.ascontiguousarray(tensor).data)
        return digest.hexdigest()

    def inputs(self) -> dict[str, Array]:
        """The denoiser's inputs that depend only on the subject, of one sample."""
        return {name: t for name, t in self._tensors().items() if name.startswith(("reference_", "object_mask."))}

    def token_counts(self) -> dict[int, int]:
        """Reference tokens kept at each grid."""
        return {grid: len(mask) for grid, mask in self.object_mask.items()}

    def check(self, bundle: Bundle) -> None:
        """Refuse a subject that another base's bundle made.

        Raises:
            SubjectError: other weights, or tensors that do not fit the bundle's geometry.
        """
        here = Origin.of(bundle)
        if self.origin.fingerprint != here.fingerprint:
            raise SubjectError(
                f"subject {self.name!r} was enrolled with base {self.origin.base!r} "
                f"({self.origin.fingerprint[:8]}), this bundle is of base {here.base!r} "
                f"({here.fingerprint[:8]}): enroll its photo with this bundle"
            )
        wanted = _reference_shapes(bundle.manifest.geometry, self.token_counts())
        found = {name: tensor.shape for name, tensor in self.inputs().items()}
        for name in sorted(wanted.keys() | found.keys()):
            if wanted.get(name) != found.get(name):
                raise SubjectError(
                    f"subject {self.name!r}: {name} has shape {found.get(name)}, this bundle needs {wanted.get(name)}"
                )

    def save(self, path: str | Path) -> None:
        """Write one file, complete or not at all."""
        tensors = {name: np.ascontiguousarray(tensor) for name, tensor in self._tensors().items()}
        with atomic_write(Path(path)) as temporary:
            save_file(tensors, temporary, metadata={_METADATA_KEY: json.dumps(self._metadata())})

    @classmethod
    def load(cls, path: str | Path) -> "Subject":
        """Read a file that `save` wrote.

        Raises:
            SubjectError: no such file, a truncated or foreign one, or one of a newer format.
        """
        path = Path(path)
        if not path.is_file():
            raise SubjectError(f"{path}: no such subject file (moma-rt enroll makes one)")
        try:
            with safe_open(path, framework="numpy") as stream:
                metadata = (stream.metadata() or {}).get(_METADATA_KEY)
                tensors = {name: stream.get_tensor(name) for name in stream.keys()} if metadata else {}
        except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
            raise SubjectError(f"{path} is not a subject file, or a truncated one: {error}") from None
        if metadata is None:
            raise SubjectError(f"{path} is not a subject file: a safetensors file without {_METADATA_KEY!r} metadata")
        try:
            data = json.loads(metadata)
            version = int(data["format_version"])
            if version > FORMAT_VERSION:
                raise SubjectError(
                    f"{path} has subject format {version}; this moma-rt reads formats up to {FORMAT_VERSION}: "
                    "upgrade it"
                )
            return cls._from_parts(data, tensors)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SubjectError(f"{path} is a malformed subject file: {type(error).__name__}: {error}") from None

    def _metadata(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "name": self.name,
            "base": self.origin.base,
            "fingerprint": self.origin.fingerprint,
            "language": self.origin.language,
        }

    def _tensors(self) -> dict[str, Array]:
        tensors: dict[str, Array] = {"photo": self.photo, "mask": self.mask}
        tensors |= {f"reference_k.{layer}": k for layer, k in self.reference_k.items()}
        tensors |= {f"reference_v.{layer}": v for layer, v in self.reference_v.items()}
        tensors |= {f"object_mask.{grid}": mask for grid, mask in self.object_mask.items()}
        if self.prefix is not None:
            tensors |= {"prefix_ids": self.prefix.ids, "prefix_kv": self.prefix.kv}
        return tensors

    @classmethod
    def _from_parts(cls, data: dict[str, Any], tensors: dict[str, Array]) -> "Subject":
        def group(kind: str) -> dict[str, Array]:
            return {name.removeprefix(kind): t for name, t in tensors.items() if name.startswith(kind)}

        ranks = {"photo": 3, "mask": 2, "prefix_ids": 1, "object_mask": 1}
        for name, tensor in tensors.items():
            if tensor.ndim != ranks.get(name.split(".")[0], tensor.ndim):
                raise ValueError(f"{name} has shape {tensor.shape}")
        language = data["language"]
        origin = Origin(str(data["base"]), str(data["fingerprint"]), None if language is None else str(language))
        prefix = None
        if origin.language is not None:
            prefix = Prefix(tensors["prefix_ids"].astype(np.int32, casting="safe"), tensors["prefix_kv"])
        return cls(
            str(data["name"]),
            group("reference_k."),
            group("reference_v."),
            {int(grid): mask for grid, mask in group("object_mask.").items()},
            tensors["photo"].astype(np.uint8, casting="safe"),
            tensors["mask"].astype(np.bool_, casting="safe"),
            prefix,
            origin,
        )


def _reference_shapes(geometry: Geometry, counts: Mapping[int, int]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for grid in geometry.grids:
        # A count of another grid's size is shown as the most this grid can hold.
        count = counts.get(grid, grid * grid)
        shapes[f"object_mask.{grid}"] = (min(max(count, 1), grid * grid),)
    for layer in geometry.self_attention:
        shape = (*shapes[f"object_mask.{layer.grid}"], layer.channels)
        shapes[f"reference_k.{layer.name}"] = shapes[f"reference_v.{layer.name}"] = shape
    return shapes
