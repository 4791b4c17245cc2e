"""A subject: everything that a photo contributes to the pictures of it, in memory or in one file."""

import hashlib
import json
import os
import re
import stat
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from moma_rt.backends.base import Array
from moma_rt.bundle.manifest import Bundle
from moma_rt.bundle.specs import Geometry
from moma_rt.errors import InputError, SubjectError
from moma_rt.files import atomic_write
from moma_rt.finite import all_finite
from moma_rt.inputs.tokenizers import check_subject_name
from moma_rt.lazy import lazy_property
from moma_rt.messages import first_line, short_repr, warn

FORMAT_VERSION = 2
# Files of this format say nothing about their content.
_WITHOUT_HASH = 1
_HASH_KEY = "sha256"
_METADATA_KEY = "moma_subject"
_SYSTEM_ERROR = re.compile(r"([^:]+) \(os error (\d+)\)")
# Reference K/V fit only the UNet that computed them, the prefix only its language model. The VAE, the vision encoder
# and the way the networks were exported may differ.
_BASE_ROLES = ("unet", "adapters")
_LANGUAGE_ROLES = ("language",)
# Bundles write keys and values in different precisions, and read those of any other.
_KV_DTYPES = ("float32", "float16")
# Dtypes and rank of each kind of tensor in a subject file.
_KINDS = MappingProxyType(
    {
        "photo": (("uint8",), 3),
        "mask": (("bool",), 2),
        "object_mask": (("float32",), 1),
        "reference_k": (_KV_DTYPES, 2),
        "reference_v": (_KV_DTYPES, 2),
        "prefix_ids": (("int32",), 1),
        "prefix_kv": (_KV_DTYPES, 5),
    }
)


@dataclass(frozen=True)
class Origin:
    """The weights that computed a subject: name of the base, for messages, and fingerprints, to compare.

    `language` is None if the bundle had no weights of a language model.
    """

    base: str
    fingerprint: str
    language: str | None

    @classmethod
    def of(cls, bundle: Bundle) -> "Origin":
        """Origin of the subjects that `bundle` enrolls."""
        language = bundle.fingerprint(*_LANGUAGE_ROLES) if bundle.has_sources(*_LANGUAGE_ROLES) else None
        return cls(bundle.manifest.base, bundle.fingerprint(*_BASE_ROLES), language)


@dataclass(frozen=True)
class Prefix:
    """The language model's K/V cache of the photo and the subject's name, P tokens.

    `ids` int32 [P]; `kv` [layers, 2, KV heads, P, head width].
    """

    ids: NDArray[np.int32]
    kv: Array


@dataclass(frozen=True, eq=False)
class Subject:
    """An enrolled photo.

    Attributes:
        name: the subject's name in prompts, such as "car".
        reference_k: keys of the tokens inside the mask by self-attention layer, float32 or float16 [N_g, C].
        reference_v: likewise, the values.
        object_mask: by grid side g, float32 [N_g]: 1 where a reference token counts.
        photo: uint8 [h,w,RGB], a thumbnail to look at.
        mask: bool [H,W], True on the subject, as the networks saw it.
        prefix: the language model's K/V cache of photo and name; None if the bundle lacked it or the vision
            encoder.
        origin: the weights that computed the subject.
        seconds: wall-clock seconds of each stage of the enrollment; not saved.
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

    @lazy_property
    def identity(self) -> str:
        """SHA-256 of the content: equal subjects give equal pictures. Computed once; takes a second at SD1.5's size."""
        return self._sha256()

    def _sha256(self) -> str:
        digest = hashlib.sha256(json.dumps(self._metadata()).encode())
        for name, tensor in sorted(self._tensors().items()):
            digest.update(f"{name}{tensor.dtype}{tensor.shape}".encode())
            digest.update(np.ascontiguousarray(tensor).data)
        return digest.hexdigest()

    def inputs(self) -> dict[str, Array]:
        """Denoiser inputs of one sample that depend only on the subject."""
        return {name: t for name, t in self._tensors().items() if name.startswith(("reference_", "object_mask."))}

    def token_counts(self) -> dict[int, int]:
        """Number of reference tokens at each grid."""
        return {grid: len(mask) for grid, mask in self.object_mask.items()}

    def check(self, bundle: Bundle) -> None:
        """Refuse a subject that was enrolled with another base.

        Raises:
            SubjectError: the weights differ, or tensors do not fit the bundle's geometry.
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
        """Write the subject to one file, atomically, with a hash of its content.

        Raises:
            OSError: the file cannot be written, such as on a full disk; a former file is left as it was.
        """
        tensors = {name: np.ascontiguousarray(tensor) for name, tensor in self._tensors().items()}
        # Not `identity`: the arrays may have been changed since that was computed.
        metadata = {**self._metadata(), _HASH_KEY: self._sha256()}
        with atomic_write(Path(path)) as temporary:
            try:
                save_file(tensors, temporary, metadata={_METADATA_KEY: json.dumps(metadata)})
            except SafetensorError as error:
                raise _system_error(error, path) from None

    @classmethod
    def load(cls, path: str | Path) -> "Subject":
        """Read a file that ``save`` wrote.

        Raises:
            SubjectError: the file is missing, unreadable, truncated, altered, no subject file or of a newer format, or
                holds what no enrollment makes: another dtype or rank, NaN or infinity, an empty photo, a name that fits
                no prompt.
            InputError: ``path`` is not a path.

        A file of format 1, which has no hash, is read with a `MomaWarning`.
        """
        if not isinstance(path, str | os.PathLike):
            raise InputError(f"path must be the path of a subject file, not {short_repr(path)}")
        path = Path(path)
        _check_readable(path)
        try:
            with safe_open(path, framework="numpy") as stream:
                metadata = (stream.metadata() or {}).get(_METADATA_KEY)
                tensors = {name: stream.get_tensor(name) for name in stream.keys()} if metadata else {}
        except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            reason = first_line(error)
            raise SubjectError(f"{path} is not a subject file, or was truncated or altered: {reason}") from None
        if metadata is None:
            raise SubjectError(
                f"{path} is not a subject file, or was altered: a safetensors file without {_METADATA_KEY!r} metadata"
            )
        try:
            data = json.loads(metadata)
            version = data["format_version"]
            if isinstance(version, bool) or not isinstance(version, int) or version < 1:
                raise ValueError(f"format_version is {short_repr(version)}")
            if version > FORMAT_VERSION:
                raise SubjectError(
                    f"{path} has subject format {version}, or was altered; this moma-rt reads formats up to "
                    f"{FORMAT_VERSION}: upgrade it"
                )
            subject = cls._from_parts(data, tensors)
            expected = data.get(_HASH_KEY) if version == _WITHOUT_HASH else data[_HASH_KEY]
        # Deep nesting raises RecursionError, an infinite number OverflowError.
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, InputError) as error:
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise SubjectError(f"{path} is a malformed subject file, or was altered: {reason}") from None
        if version == _WITHOUT_HASH and expected is None:
            warn(
                f"{path} has subject format {version}, without a hash, so damage goes unnoticed: enroll its photo again"
            )
        elif expected != subject.identity:
            raise SubjectError(
                f"{path} was altered: its content has another SHA-256 than it names; copy the file again, or enroll "
                "its photo again"
            )
        return subject

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

        for name, tensor in tensors.items():
            _check_tensor(name, tensor)
        check_subject_name(data["name"])
        language = data["language"]
        origin = Origin(
            _check_line("base", data["base"]),
            _check_line("fingerprint", data["fingerprint"]),
            None if language is None else _check_line("language", language),
        )
        prefix = None
        # `language` does not imply a prefix: a bundle without a vision encoder computes none.
        if not {"prefix_ids", "prefix_kv"}.isdisjoint(tensors):
            prefix = Prefix(tensors["prefix_ids"], tensors["prefix_kv"])
        return cls(
            data["name"],
            group("reference_k."),
            group("reference_v."),
            {int(grid): mask for grid, mask in group("object_mask.").items()},
            tensors["photo"],
            tensors["mask"],
            prefix,
            origin,
        )


def _check_readable(path: Path) -> None:
    """Refuse a path that is no readable file, with the system's reason, which the reader of safetensors hides."""
    try:
        # Opening a pipe would wait for its other end.
        if stat.S_ISREG(path.stat().st_mode):
            path.open("rb").close()
            return
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise SubjectError(f"{path} cannot be read: {reason or first_line(error)}") from None
    raise SubjectError(f"{path}: no such subject file (moma-rt enroll makes one)")


def _system_error(error: SafetensorError, path: str | Path) -> Exception:
    """The error of a write that failed, which the writer of safetensors reports as text."""
    found = _SYSTEM_ERROR.search(str(error))
    if found is None:
        return SubjectError(f"{path} cannot be written: {first_line(error)}")
    text, number = found[1].strip(), int(found[2])
    # On Windows it is one of the system's own codes, of which OSError makes the errno.
    return OSError(number, text, str(path), number if sys.platform == "win32" else None)


def _check_tensor(name: str, tensor: Array) -> None:
    """Refuse a tensor that no enrollment makes; `Subject.check` compares shapes with a bundle."""
    kind = name.split(".")[0]
    if kind not in _KINDS:
        return
    dtypes, rank = _KINDS[kind]
    if tensor.dtype.name not in dtypes or tensor.ndim != rank:
        allowed = " or ".join(dtypes)
        raise ValueError(f"{name!r} is {tensor.dtype} {list(tensor.shape)}, not {allowed} of {rank} dimensions")
    if kind in ("photo", "mask") and (0 in tensor.shape or tensor.shape[2:] not in ((), (3,))):
        raise ValueError(f"{name!r} has shape {list(tensor.shape)}")
    if not all_finite(tensor):
        raise ValueError(f"{name!r} contains NaN or infinity")


def _check_line(what: str, text: object) -> str:
    if not isinstance(text, str) or not text.isprintable():
        raise ValueError(f"{what} is {short_repr(text)}, not a line of text")
    return text


def _reference_shapes(geometry: Geometry, counts: Mapping[int, int]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for grid in geometry.grids:
        # Clamped to what this grid can hold, which the error message then shows.
        count = counts.get(grid, grid * grid)
        shapes[f"object_mask.{grid}"] = (min(max(count, 1), grid * grid),)
    for layer in geometry.self_attention:
        shape = (*shapes[f"object_mask.{layer.grid}"], layer.channels)
        shapes[f"reference_k.{layer.name}"] = shapes[f"reference_v.{layer.name}"] = shape
    return shapes
