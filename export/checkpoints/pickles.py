"""Read PyTorch pickles without running code in them.

PyTorch's weights-only unpickler builds tensors and plain containers. Training leaves more in a file: numbers of NumPy,
classes of callbacks, hyperparameters, paths. They are not imported: inert stand-ins take their places. A file that
refers to functions that run programs or code is refused.
"""

import io
import pickle
import pickletools
import re
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from moma_rt.errors import CheckpointError
from moma_rt.messages import short_repr

_SCANNED_PICKLE_BYTES = 1 << 26
_LISTED = 3
# Globals that pickled tensors and containers import, which PyTorch builds.
_PLAIN_GLOBALS = re.compile(
    r"torch\._utils\._rebuild_\w+|torch\.(storage\.)?\w*Storage|torch\.(Size|Tensor|device|nn\.parameter\.Parameter)"
    r"|torch\.(b?float|u?int|half|bool|complex)\w*|collections\.(OrderedDict|Counter)|builtins\.(set|bytearray|complex)"
    r"|_codecs\.encode|torch\._tensor\._rebuild_from_type_v2|torch\.serialization\._get_layout"
)
_PLAIN_BUILTINS = frozenset(
    "bool bytes dict float frozenset int list object range slice str tuple type NoneType Ellipsis".split()
)
# What attacks in pickles call. None of it would run; a file that asks for it is not to be trusted with anything.
_CODE_MODULES = frozenset(
    "os posix nt sys subprocess shutil socket pty runpy importlib imp pkgutil zipimport ctypes code codeop commands "
    "marshal pickle _pickle dill cloudpickle multiprocessing asyncio threading _thread signal webbrowser http urllib "
    "requests httpx aiohttp ftplib smtplib ssl timeit trace pdb bdb cProfile profile doctest pydoc idlelib distutils "
    "setuptools pip venv tempfile site atexit operator _operator types functools winreg sqlite3 io _io".split()
)
_CODE_NAMES = re.compile(
    r"torch\.(hub|jit|package|fx|ops|classes|_dynamo|_inductor|utils\.cpp_extension|utils\.bottleneck)\..*"
    r"|torch\.(load|serialization\.load)|numpy\.(f2py|testing|distutils)\..*|.*\.(exec|eval|system|popen|__import__)"
)
_HARMLESS_NAMES = frozenset(
    "functools.partial operator.itemgetter types.SimpleNamespace types.NoneType io.BytesIO _io.BytesIO".split()
)
# What Python's own pickle, as opposed to torch.save, puts into a file for each tensor.
_PLAIN_PICKLE = "torch.storage._load_from_bytes"
_IMPORTS = ("GLOBAL", "INST", "STACK_GLOBAL")
_MEMO_WRITES, _MEMO_READS = ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), ("GET", "BINGET", "LONG_BINGET")
_DEFAULTDICT, _DEQUE = "collections.defaultdict", "collections.deque"
# Trainers store the weights under one of these, beside other entries.
_WRAPPERS = ("state_dict", "model_state_dict", "module", "model", "params")
# A pickle may hold itself, so looking inside has to end.
_MAX_WRAPPERS = 4
# torch.save's default is 2; 3 differs from it in nothing that a state dict has.
_READABLE_PROTOCOLS = (2, 3)
_LFS_POINTER = b"version https://git-lfs"
_ZIP = b"PK\x03\x04"
_INSTEAD = "take the .safetensors of the same model"


class Inert:
    """Base of the stand-ins for classes and functions that a pickle names: keeps nothing, does nothing."""

    stands_for = ""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def load_pickle(path: Path) -> Any:
    """Load a PyTorch pickle: tensors, memory-mapped and not copied, plain containers, and `Inert` for anything else.

    Raises:
        CheckpointError: missing, truncated or corrupt, or the pickle of a whole object or one that refers to functions
            that run code; none is ever run.
    """
    is_zip = file_head(path).startswith(_ZIP)
    try:
        return _loaded(path, is_zip, {})
    except Exception as error:
        # On damaged input the unpickler raises errors of many types, which do not tell the cause.
        foreign = _foreign_globals(path)
        if "TorchScript" in str(error) or any(map(_is_code, foreign)):
            raise _refused(path, [name for name in foreign if _is_code(name)] or ["a TorchScript program"]) from None
    for stand_in in (_inert, _dictionary) if foreign else ():
        try:
            data = _loaded(path, is_zip, {name: stand_in(name) for name in foreign})
        except Exception:
            continue
        if isinstance(data, Inert) or (isinstance(data, type) and issubclass(data, Inert)):
            raise _refused(path, [data.stands_for])
        return data
    if _PLAIN_PICKLE in foreign and not is_zip:
        raise CheckpointError(
            f"{path} was written with Python's pickle, not with torch.save, and cannot be read without running it: "
            f"{_INSTEAD}, or, if you trust the file, convert it: pickle.load, then safetensors.torch.save_file"
        )
    if foreign:
        raise CheckpointError(
            f"{path} holds more than weights ({', '.join(foreign[:_LISTED])}) and cannot be read without running it: "
            f"{_INSTEAD}, or, if you trust the file, convert it: torch.load(..., weights_only=False), then "
            "safetensors.torch.save_file"
        )
    protocol = next(filter(None, map(_foreign_protocol, _pickle_streams(path))), None)
    if protocol is not None:
        raise CheckpointError(f"{path} {protocol}")
    raise CheckpointError(f"{path} is truncated, corrupt or not a PyTorch file")


def as_state_dict(data: Any, what: str) -> dict[str, torch.Tensor]:
    """Return `data` as a flat mapping of names to tensors; for a training checkpoint, the one of its weights.

    Entries beside the tensors, such as `epoch`, are left out; an entry named like a layer's must be a tensor.

    Raises:
        CheckpointError: `data` is something else; the message names it by `what`.
    """
    data = without_wrappers(data)
    if not isinstance(data, Mapping):
        raise CheckpointError(f"{what} holds a {type(data).__name__}, not a state dict")
    has_tensors = any(isinstance(value, torch.Tensor) for value in data.values())
    found: dict[str, torch.Tensor] = {}
    for name, value in data.items():
        if isinstance(name, str) and isinstance(value, torch.Tensor):
            if value.layout is not torch.strided or value.is_quantized:
                raise CheckpointError(f"{what} has a sparse or quantized tensor, {name}; only dense ones are supported")
            if value.is_meta:
                raise CheckpointError(f"{what}: {name} has no values: it was saved from the meta device")
            found[name] = value
        elif not (isinstance(name, str) and has_tensors and "." not in name):
            raise CheckpointError(f"{what} is not a flat state dict: {short_repr(name)} is a {type(value).__name__}")
    return found


def without_wrappers(data: Any) -> Any:
    """Return what trainers store under `state_dict` or the like, beside other entries; other data as it is."""
    for _ in range(_MAX_WRAPPERS):
        if not isinstance(data, Mapping):
            break
        data = next((data[key] for key in _WRAPPERS if isinstance(data.get(key), Mapping)), data)
    return data


def file_head(file: Path) -> bytes:
    """Return a weights file's first bytes.

    Raises:
        CheckpointError: it cannot be read, or is a Git LFS pointer.
    """
    try:
        with file.open("rb") as stream:
            head = stream.read(len(_LFS_POINTER))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from None
    if head == _LFS_POINTER:
        raise CheckpointError(f"{file} is a Git LFS pointer, not the weights: run `git lfs pull` in its folder")
    return head


def _loaded(path: Path, is_zip: bool, stand_ins: Mapping[str, Any]) -> Any:
    with warnings.catch_warnings(), torch.serialization.safe_globals([(s, name) for name, s in stand_ins.items()]):
        # PyTorch's warnings about unusual files would precede the one-line error.
        warnings.simplefilter("ignore", UserWarning)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)


def _inert(name: str) -> Any:
    """A stand-in whose instances are hashable, as keys must be."""
    if name == _DEFAULTDICT:
        return _empty_dictionary()
    if name == _DEQUE:
        return _empty_list()
    return type(name.rpartition(".")[2], (Inert,), {"stands_for": name})


def _dictionary(name: str) -> Any:
    """A stand-in that makes dictionaries: the unpickler fills no others, and classes may inherit from `dict`."""
    # NumPy's objects are restored from tuples, which a dictionary does not take.
    return _inert(name) if name.startswith("numpy.") or name == _DEQUE else _empty_dictionary()


def _empty_dictionary() -> Callable[..., Any]:
    class Dictionary:
        def __new__(cls, *_: Any, **__: Any) -> Any:
            return OrderedDict()

    return Dictionary


def _empty_list() -> Callable[..., list[Any]]:
    def new(*_: Any) -> list[Any]:
        return []

    return new


def _refused(path: Path, names: list[str]) -> CheckpointError:
    return CheckpointError(
        f"{path} is a pickle that contains code ({', '.join(names[:_LISTED])}), not plain tensors: it was refused and "
        f"nothing in it was run; {_INSTEAD}"
    )


def _is_code(name: str) -> bool:
    """Whether a pickle's global is one that attacks call."""
    module, _, last = name.partition(".")
    if module in ("builtins", "__builtin__"):
        return last not in _PLAIN_BUILTINS
    if name in _HARMLESS_NAMES:
        return False
    return module in _CODE_MODULES or _CODE_NAMES.fullmatch(name) is not None


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
                data = stream.read(_SCANNED_PICKLE_BYTES)
            if not data.startswith(_ZIP):
                yield io.BytesIO(data)
    except (OSError, zipfile.BadZipFile, RuntimeError, NotImplementedError):
        return


def _imports(stream: io.BytesIO) -> Iterator[str]:
    """Yield the names that the consecutive pickles in `stream` import."""
    for operations in _pickles(stream):
        strings: list[str] = []
        memo: dict[int, str | None] = {}
        # The string on top of the stack, which the memo may keep for later.
        top: str | None = None
        for opcode, argument in operations:
            if opcode.name in ("GLOBAL", "INST"):
                yield _today(*str(argument).split(" ", 1))
            elif opcode.name == "STACK_GLOBAL":
                yield ".".join(strings[-2:]) or "an import"
            if opcode.name in _MEMO_WRITES:
                memo[len(memo) if argument is None else argument] = top
                continue
            top = memo.get(argument) if opcode.name in _MEMO_READS else argument if isinstance(argument, str) else None
            if top is not None:
                strings.append(top)


def _foreign_protocol(stream: io.BytesIO) -> str | None:
    """Say what to do about pickles of a protocol that PyTorch's reader lacks; None for others and damaged ones."""
    protocol, imports = -1, False
    for operations in _pickles(stream):
        given = operations[0][1] if operations[0][0].name == "PROTO" else max(code.proto for code, _ in operations)
        if operations[-1][0].name != "STOP" or given in _READABLE_PROTOCOLS:
            break
        protocol = max(protocol, given)
        imports = imports or any(code.name in _IMPORTS for code, _ in operations)
    # Any text may happen to be a pickle, but only real ones import.
    if not imports:
        return None
    # PyTorch itself cannot load what it saves with protocol 0.
    convert = (
        "if you trust the file, convert it: torch.load(..., weights_only=False), then" if protocol else "save with"
    )
    return (
        f"is pickled with protocol {protocol}, which PyTorch's reader that runs no code does not know: {_INSTEAD}, or "
        f"{convert} torch.save in its default protocol"
    )


def _pickles(stream: io.BytesIO) -> Iterator[list[tuple[pickletools.OpcodeInfo, Any]]]:
    """Yield the operations of each of the consecutive pickles in `stream`; those of a damaged one until the damage."""
    end = len(stream.getbuffer())
    while stream.tell() < end:
        operations: list[tuple[pickletools.OpcodeInfo, Any]] = []
        try:
            operations.extend((opcode, argument) for opcode, argument, _ in pickletools.genops(stream))
        except (ValueError, EOFError, UnicodeDecodeError, pickle.UnpicklingError):
            end = 0
        if operations:
            yield operations


def _today(module: str, name: str) -> str:
    """The full name in Python 3, which PyTorch compares, of a name that may be Python 2's."""
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    return f"{module}.{name}"
