"""The compiled attention kernels of a bundle, and the TensorRT plugins that launch them.

A bundle's `kernels/<network>_sm<capability>-<key>/` holds PTX files and a `kernels.json` that says what each computes
and how it is launched. TensorRT embeds a kernel in the engine through a quick deployable plugin with an ahead-of-time
implementation, so the engine runs without these files. TensorRT-RTX has no plugins; TensorRT has this kind since 10.9.
"""

import contextlib
import hashlib
import importlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import numpy as np

from moma_rt.backends.libraries import is_installed, library, version_tuple
from moma_rt.bundle.engines import Flavour, KernelsEntry, format_capabilities
from moma_rt.bundle.manifest import Bundle, NetworkEntry
from moma_rt.bundle.specs import MAX_SIZE, Geometry, Precision
from moma_rt.errors import BundleError
from moma_rt.files import sha256_file
from moma_rt.messages import short_repr

# The only network with the custom operators.
NETWORK = "denoiser"
KERNELS_NAME = "kernels.json"
NAMESPACE = "moma"
FORMAT_VERSION = 1
INJECTED, CONTEXT = "InjectedSelfAttention", "ContextCrossAttention"
# The first TensorRT with ahead-of-time plugins, and the first to parse opset 21's GroupNormalization.
PLUGINS_SINCE = (10, 9)
# Older releases read a plugin's attributes in a way that NumPy rejects since 2.4.
ATTRIBUTES_SINCE = (11, 4)
_MODULES = ("kernels.injected_self_attention.tensorrt_plugin", "kernels.context_cross_attention.tensorrt_plugin")
# How many token counts a kernel is compiled for: text and context tokens. The reference's count is a launch argument.
_FIXED_TOKENS = MappingProxyType({INJECTED: 0, CONTEXT: 2})
_DTYPES = MappingProxyType({Precision.FP16: "float16", Precision.BF16: "bfloat16"})
# By TensorRT's names.
_TENSORRT_DTYPES = MappingProxyType({"HALF": "float16", "BF16": "bfloat16"})
_MAX_THREADS = 1024
# The limit for a kernel whose launcher does not opt in to more shared memory.
_MAX_SHARED_BYTES = 48 * 1024
_ENTRY = re.compile(r"[A-Za-z_]\w*", re.ASCII)
# A file name, not a path.
_FILE = re.compile(r"\w[\w.-]*\.ptx", re.ASCII)


@dataclass(frozen=True)
class KernelShape:
    """The sizes that an operator's kernel is compiled for: heads, head width, queries, and fixed token counts."""

    operator: str
    heads: int
    width: int
    queries: int
    tokens: tuple[int, ...] = ()

    def __str__(self) -> str:
        tokens = f" and {' + '.join(map(str, self.tokens))} tokens" if self.tokens else ""
        return f"{self.operator} of {self.heads} heads of width {self.width} with {self.queries} queries{tokens}"


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel: its entry point in the PTX file `path`, and a block's queries, threads and shared memory."""

    entry: str
    path: Path
    block_queries: int
    threads: int
    shared_bytes: int

    @property
    def ptx(self) -> str:
        """The PTX source."""
        return self.path.read_text(encoding="utf-8")


@dataclass(frozen=True)
class NetworkKernels:
    """A network's kernels for one capability and dtype; `sha256` covers their PTX and launch parameters."""

    sha256: str
    dtype: str
    kernels: Mapping[KernelShape, Kernel]

    def find(self, operator: str, dtype: str, heads: int, width: int, queries: int, tokens: tuple[int, ...]) -> Kernel:
        """Return the kernel for a plugin that TensorRT compiles; `dtype` is TensorRT's name (HALF, BF16).

        Raises:
            BundleError: there is no such kernel.
        """
        shape = KernelShape(operator, heads, width, queries, tokens)
        found = self.kernels.get(shape) if _TENSORRT_DTYPES.get(dtype) == self.dtype else None
        if found is None:
            raise BundleError(f"there is no kernel in {dtype} of {shape}; the bundle's kernels are in {self.dtype}")
        return found


def attention_shapes(geometry: Geometry) -> tuple[KernelShape, ...]:
    """Return the distinct kernel shapes of the denoiser; each transformer block has one layer of either operator."""
    shapes = dict[KernelShape, None]()
    for layer in geometry.self_attention:
        sizes = (layer.heads, layer.channels // layer.heads, layer.grid * layer.grid)
        shapes[KernelShape(INJECTED, *sizes)] = None
        shapes[KernelShape(CONTEXT, *sizes, (geometry.text_tokens, geometry.context_tokens))] = None
    return tuple(shapes)


def kernel_dtype(precision: Precision) -> str | None:
    """Return the dtype of the kernels for a network of this precision; None if there are none."""
    return _DTYPES.get(precision)


def choose(
    bundle: Bundle, owner: NetworkEntry, flavour: Flavour, version: str, capability: int
) -> tuple[NetworkKernels | None, str]:
    """Choose the kernels with which TensorRT builds a network; where the bundle's cannot be used, also return why.

    Raises:
        BundleError: a file was altered, or a `kernels.json` is malformed.
    """
    entries = {e.capability: e for e in bundle.manifest.kernels if e.network == owner.spec.name}
    if not entries:
        return None, ""
    why = _unsupported_reason(flavour, version)
    if why:
        return None, why
    if capability not in entries:
        return None, f"they are for {format_capabilities(sorted(entries))}, and none for sm{capability}"
    dtype = kernel_dtype(owner.precision)
    if dtype is None:
        return None, f"there are none in {owner.precision.value}"
    found = read_kernels(bundle, entries[capability], dtype)
    for shape in attention_shapes(bundle.manifest.geometry):
        if shape not in found.kernels:
            return None, f"there is none in {dtype} of {shape}"
    return found, ""


def _unsupported_reason(flavour: Flavour, version: str) -> str:
    """Return why a library version cannot use the kernels; empty if it can."""
    if flavour is not Flavour.TENSORRT:
        return "TensorRT-RTX has no plugins"
    if version_tuple(version)[:2] < PLUGINS_SINCE:
        return f"TensorRT {version} has no plugins ahead of time (since {'.'.join(map(str, PLUGINS_SINCE))})"
    if version_tuple(version)[:2] < ATTRIBUTES_SINCE and version_tuple(np.__version__)[:2] >= (2, 4):
        return f"the plugins of TensorRT {version} do not work with NumPy {np.__version__}: pip install 'numpy<2.4'"
    missing = [name for name in (f"{flavour.value}.plugin", *_MODULES) if not is_installed(name)]
    return f"there is no module {missing[0]}" if missing else ""


def read_kernels(bundle: Bundle, entry: KernelsEntry, dtype: str) -> NetworkKernels:
    """Read the kernels of one manifest entry in one dtype, and verify each of their files.

    Raises:
        BundleError: a file is missing or altered, or `kernels.json` is malformed; the message names the file.
    """
    bundle.verify([entry.file])
    index_path = bundle.path(entry.file)
    try:
        records = _records(json.loads(index_path.read_text(encoding="utf-8")))
        kernels = _kernels_of(records, index_path.parent, entry.capability, dtype)
    # json.loads raises RecursionError for JSON that is nested too deeply.
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BundleError(f"{index_path} is malformed: {type(error).__name__}: {error}") from None
    files = sorted({f"{entry.folder}/{kernel.path.name}" for kernel in kernels.values()})
    bundle.verify(files)
    hashes = [bundle.manifest.files[name].sha256 for name in (entry.file, *files)]
    digest = hashlib.sha256("".join(hashes).encode()).hexdigest()
    return NetworkKernels(digest, dtype, MappingProxyType(kernels))


def _records(data: Any) -> list[dict[str, Any]]:
    if data["format_version"] != FORMAT_VERSION:
        raise ValueError(f"format_version is {short_repr(data['format_version'])}, not {FORMAT_VERSION}")
    if not isinstance(data["kernels"], list):
        raise ValueError(f"kernels is {short_repr(data['kernels'])}, not a list")
    return data["kernels"]


def _kernels_of(
    records: Iterable[dict[str, Any]], folder: Path, capability: int, dtype: str
) -> dict[KernelShape, Kernel]:
    kernels: dict[KernelShape, Kernel] = {}
    for record in records:
        shape, kernel = _shape(record), _kernel(record, folder)
        if record["dtype"] not in _DTYPES.values():
            raise ValueError(f"a dtype is {short_repr(record['dtype'])}, not one of {', '.join(_DTYPES.values())}")
        if _number(record, "capability", 1, 999) != capability:
            raise ValueError(f"a kernel is for sm{record['capability']}, and the folder for sm{capability}")
        if record["dtype"] == dtype:
            if shape in kernels:
                raise ValueError(f"two kernels in {dtype} of {shape}")
            kernels[shape] = kernel
    return kernels


def _shape(record: dict[str, Any]) -> KernelShape:
    operator, tokens = record["operator"], record["tokens"]
    if operator not in _FIXED_TOKENS:
        raise ValueError(f"an operator is {short_repr(operator)}, not one of {', '.join(_FIXED_TOKENS)}")
    if not isinstance(tokens, list) or len(tokens) != _FIXED_TOKENS[operator]:
        raise ValueError(f"the tokens of {operator} are {short_repr(tokens)}, not {_FIXED_TOKENS[operator]} numbers")
    heads, width, queries = (_number(record, name) for name in ("heads", "width", "queries"))
    return KernelShape(
        operator, heads, width, queries, tuple(_checked("a number of tokens", count) for count in tokens)
    )


def _kernel(record: dict[str, Any], folder: Path) -> Kernel:
    entry, file = record["entry"], record["file"]
    if not isinstance(entry, str) or not _ENTRY.fullmatch(entry):
        raise ValueError(f"an entry is {short_repr(entry)}, not the name of a kernel")
    if not isinstance(file, str) or not _FILE.fullmatch(file):
        raise ValueError(f"a file is {short_repr(file)}, not the name of a .ptx beside it")
    return Kernel(
        entry,
        folder / file,
        _number(record, "block_queries"),
        _number(record, "threads", 1, _MAX_THREADS),
        _number(record, "shared_bytes", 0, _MAX_SHARED_BYTES),
    )


def _number(record: dict[str, Any], name: str, least: int = 1, most: int = MAX_SIZE) -> int:
    return _checked(name, record[name], least, most)


def _checked(name: str, value: object, least: int = 1, most: int = MAX_SIZE) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{name} is {short_repr(value)}, not a whole number of {least} to {most}")
    return value


def code_hash() -> str:
    """Hash the code that puts kernels into an engine."""
    files = [__file__, *(importlib.import_module(name).__file__ for name in _MODULES)]
    return hashlib.sha256("".join(sha256_file(Path(str(file))) for file in files).encode()).hexdigest()


@contextlib.contextmanager
def registered(kernels: NetworkKernels | None) -> Iterator[None]:
    """Register the plugins that launch these kernels while the context is active.

    TensorRT's registry is global to the process, and any node whose plugin it knows becomes that plugin. The plugins
    are removed afterwards, because the next graph may belong to another bundle or be built without them.

    Raises:
        InputError: TensorRT is not installed or cannot be loaded.
    """
    if kernels is None:
        yield
        return
    trt = library(Flavour.TENSORRT)
    with contextlib.ExitStack() as stack:
        for name in _MODULES:
            plugin = importlib.import_module(name)
            plugin.register(kernels.find)
            stack.callback(_deregister, trt, plugin)
        yield


def _deregister(trt: Any, plugin: ModuleType) -> None:
    import tensorrt.plugin as trtp

    registry = trt.get_plugin_registry()
    registry.deregister_creator(registry.get_creator(plugin.NAME, "1", NAMESPACE))
    delattr(getattr(trtp.op, NAMESPACE), plugin.NAME)
