"""The Python packages of TensorRT, TensorRT-RTX, PyTorch, ONNX Runtime and CUDA, imported on first use.

TensorRT's two flavours have the same interface, so code that works with both names the module trt.
"""

import contextlib
import functools
import importlib
import importlib.util
import os
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from moma_rt.bundle.engines import Flavour
from moma_rt.errors import InputError
from moma_rt.messages import one_line

# The module of the CUDA runtime, and its package for pip.
CUDA_MODULE, CUDA_PIP_NAME = "cuda.bindings.runtime", "cuda-bindings"
# ONNX Runtime's provider for NVIDIA GPUs. Before 1.28 it leaves attention to the CPU. Before 1.31 its runs copy from
# page-locked memory of its own, which is unsafe here because runs are asynchronous.
CUDA_PROVIDER, _OLDEST_CUDA_PROVIDER = "CUDAExecutionProvider", (1, 31)
# Both packages install the module onnxruntime, so uninstalling one deletes files of the other.
CUDA_PROVIDER_INSTALLATION = (
    "pip uninstall onnxruntime onnxruntime-gpu, then pip install 'onnxruntime-gpu[cuda,cudnn]>=1.31'"
)
# Otherwise it looks up an address of its maker's and writes a device id and a database into the home folder.
_NO_TELEMETRY = "ORT_DISABLE_TELEMETRY"
_MEMORY_LINE = re.compile(r"Total (Activation|Weights) Memory: (\d+)")


def is_installed(module: str) -> bool:
    """Whether a module can be imported; imports only the packages that contain it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def library(flavour: Flavour) -> Any:
    """Import the flavour's Python package.

    Raises:
        InputError: it is not installed, or its native libraries cannot be loaded.
    """
    return _load(flavour.module, flavour.pip_name)


def cuda_runtime() -> Any:
    """Import the Python package of the CUDA runtime.

    Raises:
        InputError: as for `library`.
    """
    return _load(CUDA_MODULE, CUDA_PIP_NAME)


def onnx_runtime() -> Any:
    """Import the Python package of ONNX Runtime, with whichever providers and without its telemetry.

    It reads the variable once, when it is imported: a program that imports it before has decided for itself.

    Raises:
        InputError: as for `library`, or parts of it are missing.
    """
    with _environment(_NO_TELEMETRY, "1"):
        ort = _load("onnxruntime", "onnxruntime")
    if not hasattr(ort, "InferenceSession"):
        raise InputError(
            "parts of the Python package onnxruntime are missing: pip uninstall onnxruntime onnxruntime-gpu, then pip "
            "install one of them"
        )
    return ort


def has_cuda_provider() -> bool:
    """Whether the installed ONNX Runtime has the CUDA provider."""
    try:
        return CUDA_PROVIDER in onnx_runtime().get_available_providers()
    except InputError:
        return False


def check_cuda_provider() -> None:
    """Check that the installed ONNX Runtime has a CUDA provider, and that it is new enough.

    Raises:
        InputError: as for `onnx_runtime`, or the provider is missing or too old.
    """
    ort = onnx_runtime()
    if CUDA_PROVIDER not in ort.get_available_providers():
        raise InputError(f"the installed onnxruntime {ort.__version__} is for CPUs only: {CUDA_PROVIDER_INSTALLATION}")
    if version_tuple(ort.__version__) < _OLDEST_CUDA_PROVIDER:
        raise InputError(f"onnxruntime-gpu {ort.__version__} is too old: {CUDA_PROVIDER_INSTALLATION}")


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Set an environment variable for a while, unless it is set."""
    if name in os.environ:
        yield
        return
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name, None)


def _load(module: str, pip_name: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise InputError(
            f"the Python package {module} is not installed ({one_line(error)}): pip install {pip_name}"
        ) from None
    except (ImportError, OSError, RuntimeError) as error:
        raise InputError(f"the Python package {module} cannot be loaded: {one_line(error)}") from None


def library_version(flavour: Flavour) -> str:
    """The flavour's version, such as 10.3.0, from the package itself.

    pip's metadata has the CUDA version in its name, and is absent on a Jetson whose system provides TensorRT.

    Raises:
        InputError: as for `library`.
    """
    return str(library(flavour).__version__)


def version_tuple(version: str) -> tuple[int, ...]:
    """The first numbers of a version, at most three."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def library_log(flavour: Flavour) -> Any:
    """The library's logger: `error` is the first error since `begin()`, and `memory` maps a purpose to bytes.

    A process has only one ILogger per library, because the library ignores every further one.

    Raises:
        InputError: as for `library`.
    """
    return _log_of(library(flavour))


@functools.cache
def _log_of(trt: ModuleType) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.begin()

        def begin(self) -> None:
            self.error = ""
            self.memory: dict[str, int] = {}

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self.error = self.error or one_line(message)
            elif found := _MEMORY_LINE.search(message):
                self.memory[found[1]] = int(found[2])

    return Log()
