"""Read state dicts from disk: safetensors, PyTorch pickles and sharded folders, without running code in them.

Opening reads only headers (names and shapes), so that errors are reported before any large read; tensors are read on
demand. Pickles are read by PyTorch's weights-only unpickler, which builds tensors and nothing else.
"""

import hashlib
import io
import json
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from moma_rt.errors import CheckpointError
from moma_rt.messages import first_line

_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_VARIANTS = ("", "fp16")
_SAFETENSORS = ".safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".th", ".ckpt")
_CHUNK_BYTES = 1 << 22
_SCANNED_PICKLE_BYTES = 1 << 26
# Globals that pickled tensors and containers import. They decide only how a refusal is worded, not what is refused.
_PLAIN_GLOBALS = re.compile(
    r"torch\._utils\._rebuild_\w+|torch\.(storage\.)?\w*Storage|torch\.(Size|device|nn\.parameter\.Parameter)"
    r"|torch\.(b?float|u?int|half|bool|complex)\w*|collections\.OrderedDict|(__builtin__|builtins)\.set"
)
_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class Weights:
    """An opened state dict: `location` is the path the user gave, `files` are all files that define its content.

    `places` and `shapes` map each tensor's stored name to its file and its shape.
    """

    location: Path
    files: tuple[Path, ...]
    places: Mapping[str, Path]
    shapes: Mapping[str, tuple[int, ...]]

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Read the named tensors in their stored dtype, on the CPU; only their files are opened.

        Raises:
            CheckpointError: a file vanished or was damaged since it was opened.
        """
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.places[name], []).append(name)
        tensors: dict[str, torch.Tensor] = {}
        for file, wanted in by_file.items():
            tensors.update(_read_tensors(file, wanted))
        return tensors


def open_weights(path: Path) -> Weights:
    """Open a weights file, or the weights of a folder (one file or shards; full precision before `fp16`).

    Raises:
        CheckpointError: no weights found (the message says what was looked for), a truncated or corrupt file, a missing
            shard, an index that names files outside its folder, or a pickle that is not plain tensors.
    """
    found = _find(path) if path.is_dir() else path
    if not found.is_file():
        raise CheckpointError(f"{path} does not exist")
    if found.suffix == ".json":
        return _open_sharded(path, found)
    shapes = _read_shapes(found)
    return Weights(path, (found,), dict.fromkeys(shapes, found), shapes)


def read_metadata(path: Path) -> dict[str, str]:
    """Read the text entries in a safetensors file's header; other files have none.

    Raises:
        CheckpointError: a truncated or corrupt file.
    """
    if path.suffix != _SAFETENSORS:
        return {}
    with _safetensors(path) as stream:
        return dict(stream.metadata() or {})


def load_pickle(path: Path) -> Any:
    """Load a PyTorch pickle of tensors and plain containers; tensors are memory-mapped, not copied.

    Raises:
        CheckpointError: missing, truncated or corrupt, or containing anything but plain tensors; code is never run.
    """
    head = _head(path)
    try:
        with warnings.catch_warnings():
            # PyTorch's warnings about unusual files would precede the one-line error.
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=head.startswith(b"PK\x03\x04"))
    except Exception as error:
        # On damaged input the unpickler raises errors of many types, which do not tell the cause.
        foreign = _foreign_globals(path)
        if foreign or "TorchScript" in str(error):
            named = ", ".join(foreign[:3]) or "a TorchScript program"
            raise CheckpointError(
                f"{path} is a pickle that contains code ({named}), not plain tensors: it was refused and "
                "nothing in it was run"
            ) from None
        raise CheckpointError(f"{path} is truncated, corrupt or not a PyTorch file") from None


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
        f"{folder} has no weights: looked for {'|'.join(_STEMS)}[.fp16].safetensors|.bin and their .index.json"
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
    shapes = {name: found[shard][name] for name, shard in places.items()}
    return Weights(location, (index, *shards), places, shapes)


def _read_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    if file.suffix == _SAFETENSORS:
        with _safetensors(file) as stream:
            return {name: tuple(stream.get_slice(name).get_shape()) for name in stream.keys()}  # noqa: SIM118
    return {name: tuple(tensor.shape) for name, tensor in _pickled_tensors(file).items()}


def _read_tensors(file: Path, names: list[str]) -> dict[str, torch.Tensor]:
    try:
        if file.suffix == _SAFETENSORS:
            with _safetensors(file) as stream:
                return {name: stream.get_tensor(name) for name in names}
        tensors = _pickled_tensors(file)
        return {name: tensors[name] for name in names}
    except (SafetensorError, KeyError) as error:
        raise CheckpointError(f"{file} changed since it was opened: {first_line(error)}") from None


def _safetensors(file: Path) -> Any:
    _head(file)
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file} is truncated or corrupt: {first_line(error)}") from None


def _pickled_tensors(file: Path) -> dict[str, torch.Tensor]:
    if file.suffix not in _PICKLES:
        raise CheckpointError(f"{file} is not a weights file: known are {_SAFETENSORS}, {', '.join(_PICKLES)}")
    return as_state_dict(load_pickle(file), str(file))


def as_state_dict(data: Any, what: str) -> dict[str, torch.Tensor]:
    """Return `data` as a flat mapping of names to tensors; for a training checkpoint, its `state_dict`.

    Raises:
        CheckpointError: `data` is something else; the message names it by `what`.
    """
    while isinstance(data, Mapping) and isinstance(data.get("state_dict"), Mapping):
        data = data["state_dict"]
    if not isinstance(data, Mapping):
        raise CheckpointError(f"{what} holds a {type(data).__name__}, not a state dict")
    for name, value in data.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(f"{what} is not a flat state dict: {name!r} is a {type(value).__name__}")
    return dict(data)


def _head(file: Path) -> bytes:
    try:
        with file.open("rb") as stream:
            head = stream.read(len(_LFS_POINTER))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from None
    if head == _LFS_POINTER:
        raise CheckpointError(f"{file} is a Git LFS pointer, not the weights: run `git lfs pull` in its folder")
    return head


def _foreign_globals(file: Path) -> list[str]:
    """Return the names that a pickle would import beyond those of plain tensors, without importing anything."""
    names = {name for stream in _pickle_streams(file) for name in _imports(stream)}
    return sorted(name for name in names if not _PLAIN_GLOBALS.fullmatch(name))


def _pickle_streams(file: Path) -> Iterator[io.BytesIO]:
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                for entry in archive.infolist():
                    if entry.filename.endswith(".pkl") and entry.file_size <= _SCANNED_PICKLE_BYTES:
                        yield io.BytesIO(archive.read(entry))
        else:
            with file.open("rb") as stream:
                yield io.BytesIO(stream.read(_SCANNED_PICKLE_BYTES))
    except (OSError, zipfile.BadZipFile, RuntimeError, NotImplementedError):
        return


def _imports(stream: io.BytesIO) -> Iterator[str]:
    """Yield the names that the consecutive pickles in `stream` import (memoized names are not resolved)."""
    end = len(stream.getbuffer())
    while stream.tell() < end:
        strings: list[str] = []
        try:
            for opcode, argument, _ in pickletools.genops(stream):
                if opcode.name in ("GLOBAL", "INST"):
                    yield str(argument).replace(" ", ".", 1)
                elif opcode.name == "STACK_GLOBAL":
                    yield ".".join(strings[-2:]) or "an import"
                elif isinstance(argument, str):
                    strings.append(argument)
        except (ValueError, EOFError, UnicodeDecodeError, pickle.UnpicklingError):
            return
