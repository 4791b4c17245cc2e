"""Read state dicts from disk: safetensors, PyTorch pickles and sharded folders, without running code in them.

Opening reads only headers (names and shapes), so that errors are reported before any large read; tensors are read on
demand, and checked for NaN and infinity.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from export.checkpoints.names import unwrapped
from export.checkpoints.pickles import as_state_dict, file_head, load_pickle
from export.checkpoints.values import check_finite, check_floating
from moma_rt.errors import CheckpointError
from moma_rt.messages import first_line

_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_VARIANTS = ("", "fp16", "bf16", "ema", "non_ema")
_SAFETENSORS = ".safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".th", ".ckpt")
_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class Weights:
    """An opened state dict: `location` is the path the user gave, `files` are all files that define its content.

    `places` and `shapes` map each tensor's name to its file and its shape. `stored` has its name in the file where that
    differs: what trainers and torch.compile put before all names is removed.
    """

    location: Path
    files: tuple[Path, ...]
    places: Mapping[str, Path]
    shapes: Mapping[str, tuple[int, ...]]
    stored: Mapping[str, str] = field(default_factory=dict)

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Read the named tensors in their stored dtype, on the CPU; only their files are opened.

        Raises:
            CheckpointError: a tensor has NaN or infinity, or a file vanished or was damaged since it was opened.
        """
        tensors: dict[str, torch.Tensor] = {}
        for file, wanted in self._by_file(names).items():
            found = dict(_read_tensors(file, list(wanted)))
            check_finite(found, file)
            tensors |= {name: found[stored] for stored, name in wanted.items()}
        return tensors

    def check(self, names: Iterable[str]) -> None:
        """Check the values of the named weights, with few of them in memory at a time.

        Raises:
            CheckpointError: NaN, infinity, or integers, or a file vanished or was damaged since it was opened.
        """
        for file, wanted in self._by_file(names).items():
            for stored, tensor in _read_tensors(file, list(wanted)):
                check_floating({stored: tensor}, file)
                check_finite({stored: tensor}, file)

    def _by_file(self, names: Iterable[str]) -> dict[Path, dict[str, str]]:
        """Map stored names to the given ones, file by file."""
        found: dict[Path, dict[str, str]] = {}
        for name in names:
            found.setdefault(self.places[name], {})[self.stored.get(name, name)] = name
        return found


def open_weights(path: Path) -> Weights:
    """Open a weights file, or the weights of a folder (one file or shards; without a variant before `fp16` and others).

    Raises:
        CheckpointError: no weights found (the message says what was looked for), a truncated or corrupt file, a missing
            shard, an index that names files outside its folder, or a pickle that is not plain tensors.
    """
    found = _find(path) if path.is_dir() else path
    if not found.is_file():
        raise CheckpointError(f"{path} does not exist")
    if found.suffix == ".json":
        return _open_sharded(path, found)
    return _renamed(path, (found,), {name: (found, shape) for name, shape in _read_shapes(found).items()})


def read_metadata(path: Path) -> dict[str, str]:
    """Read the text entries in a safetensors file's header; other files have none.

    Raises:
        CheckpointError: a truncated or corrupt file.
    """
    if path.suffix != _SAFETENSORS:
        return {}
    with _safetensors(path) as stream:
        return dict(stream.metadata() or {})


def read_json(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file.

    Raises:
        CheckpointError: missing, unreadable, or not a JSON object.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable as JSON: {first_line(error)}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return data


def content_hash(files: Iterable[Path]) -> str:
    """Return the SHA-256, in hexadecimal, of the names, sizes and contents of files, in the order of their names."""
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda f: f.name):
        try:
            digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
            with file.open("rb") as stream:
                while chunk := stream.read(_CHUNK_BYTES):
                    digest.update(chunk)
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from None
    return digest.hexdigest()


def tensors_hash(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256, in hexadecimal, of tensors' names, dtypes, shapes and values, in the order of names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _find(folder: Path) -> Path:
    for extension in (_SAFETENSORS, ".bin"):
        for variant in _VARIANTS:
            for stem in _STEMS:
                suffix = f".{variant}" if variant else ""
                candidates = (f"{stem}{suffix}{extension}", f"{stem}{extension}.index{suffix}.json")
                for candidate in candidates:
                    if (folder / candidate).is_file():
                        return folder / candidate
    raise CheckpointError(
        f"{folder} has no weights: looked for {'|'.join(_STEMS)}[.{'|.'.join(filter(None, _VARIANTS))}]"
        ".safetensors|.bin and their .index.json"
    )


def _open_sharded(location: Path, index: Path) -> Weights:
    entries = read_json(index).get("weight_map")
    if not isinstance(entries, dict) or not entries:
        raise CheckpointError(f"{index} has no weight_map: it is not an index of shards")
    places: dict[str, Path] = {}
    for name, shard in entries.items():
        # Symlinks are followed on purpose: in download caches, every file is a symlink to outside the folder.
        if not isinstance(shard, str) or PurePosixPath(shard).name != shard or "\\" in shard or "\0" in shard:
            raise CheckpointError(f"{index} names {shard!r}, which is not a file of its own folder: refused")
        places[str(name)] = index.parent / shard
    shards = sorted(set(places.values()))
    for missing in (s for s in shards if not s.is_file()):
        raise CheckpointError(f"{index.parent} lacks {missing.name}, a shard that {index.name} names")
    found = {shard: _read_shapes(shard) for shard in shards}
    for name, shard in places.items():
        if name not in found[shard]:
            raise CheckpointError(f"{shard} lacks {name}, which {index.name} says it holds")
    return _renamed(location, (index, *shards), {name: (shard, found[shard][name]) for name, shard in places.items()})


def _renamed(location: Path, files: tuple[Path, ...], tensors: Mapping[str, tuple[Path, tuple[int, ...]]]) -> Weights:
    """Return the opened tensors, given by stored name, under their names without wrappers."""
    stored = unwrapped(tensors)
    places = {name: tensors[old][0] for name, old in stored.items()}
    shapes = {name: tensors[old][1] for name, old in stored.items()}
    return Weights(location, files, places, shapes, {name: old for name, old in stored.items() if name != old})


def _read_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    if file.suffix == _SAFETENSORS:
        with _safetensors(file) as stream:
            return {name: tuple(stream.get_slice(name).get_shape()) for name in stream.keys()}  # noqa: SIM118
    return {name: tuple(tensor.shape) for name, tensor in _pickled_tensors(file).items()}


def _read_tensors(file: Path, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        if file.suffix == _SAFETENSORS:
            with _safetensors(file) as stream:
                for name in names:
                    yield name, stream.get_tensor(name)
        else:
            tensors = _pickled_tensors(file)
            for name in names:
                yield name, tensors[name]
    except (SafetensorError, KeyError) as error:
        raise CheckpointError(f"{file} changed since it was opened: {first_line(error)}") from None


def _safetensors(file: Path) -> Any:
    file_head(file)
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file} is truncated or corrupt: {first_line(error)}") from None


def _pickled_tensors(file: Path) -> dict[str, torch.Tensor]:
    if file.suffix not in _PICKLES:
        raise CheckpointError(f"{file} is not a weights file: known are {_SAFETENSORS}, {', '.join(_PICKLES)}")
    return as_state_dict(load_pickle(file), str(file))
