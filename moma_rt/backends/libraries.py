"""The Python packages of TensorRT, TensorRT-RTX, PyTorch, ONNX Runtime and CUDA, imported when first asked for.

TensorRT's two flavours have the same interface, so a flavour is a value: its module is named trt wherever it is used.
"""

import functools
import importlib
import importlib.util
import re
from types import ModuleType
from typing import Any

from moma_rt.bundle.engines import Flavour
from moma_rt.errors import InputError
from moma_rt.messages import one_line

# The CUDA runtime, and what pip installs it by.
CUDA_MODULE, CUDA_PIP_NAME = "cuda.bindings.runtime", "cuda-bindings"
# ONNX Runtime's provider for NVIDIA's GPUs. Before 1.28 it leaves attention to the CPU, and before 1.31 runs copy from
# page-locked memory of its own, while nobody waits for them here.
CUDA_PROVIDER, _OLDEST_CUDA_PROVIDER = "CUDAExecutionProvider", (1, 31)
# Both packages install the module onnxruntime, and whichever is uninstalled takes files of the other with it.
CUDA_PROVIDER_INSTALLATION = (
    "pip uninstall onnxruntime onnxruntime-gpu, then pip install 'onnxruntime-gpu[cuda,cudnn]>=1.31'"
)
_MEMORY_LINE = re.compile(r"Total (Activation|Weights) Memory: (\d+)")


def is_installed(module: str) -> bool:
    """Whether a module could be imported; of a dotted name, its packages are."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def library(flavour: Flavour) -> Any:
    """The flavour's Python package.

    Raises:
        InputError: it is not installed, or its native libraries cannot be loaded.
    """
    return _load(flavour.module, flavour.pip_name)


def cuda_runtime() -> Any:
    """The Python package of the CUDA runtime.

    Raises:
        InputError: as for `library`.
    """
    return _load(CUDA_MODULE, CUDA_PIP_NAME)


def onnx_runtime() -> Any:
    """The Python package of ONNX Runtime, with whichever providers.

    Raises:
        InputError: as for `library`, or parts of it are missing.
    """
    ort = _load("onnxruntime", "onnxruntime")
    if not hasattr(ort, "InferenceSession"):
        raise InputError(
            "parts of the Python package onnxruntime are missing: pip uninstall onnxruntime onnxruntime-gpu, then pip "
            "install one of them"
        )
    return ort


def has_cuda_provider() -> bool:
    """Whether the ONNX Runtime that is installed is one for NVIDIA's GPUs."""
    try:
        return CUDA_PROVIDER in onnx_runtime().get_available_providers()
    except InputError:
        return False


def check_cuda_provider() -> None:
    """Refuse an ONNX Runtime without a CUDA provider that is new enough.

    Raises:
        InputError: as for `onnx_runtime`, or the one that is installed has none, or an older one.
    """
    ort = onnx_runtime()
    if CUDA_PROVIDER not in ort.get_available_providers():
        raise InputError(f"the installed onnxruntime {ort.__version__} is for CPUs alone: {CUDA_PROVIDER_INSTALLATION}")
    if version_tuple(ort.__version__) < _OLDEST_CUDA_PROVIDER:
        raise InputError(f"onnxruntime-gpu {ort.__version__} is too old: {CUDA_PROVIDER_INSTALLATION}")


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
    """The flavour's version, such as 10.3.0, as the package itself says it.

    The metadata of what pip installed is under a name of the CUDA version, and absent where a Jetson has TensorRT from
    its system.

    Raises:
        InputError: as for `library`.
    """
    return str(library(flavour).__version__)


def version_tuple(version: str) -> tuple[int, ...]:
    """The leading numbers of a version."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def library_log(flavour: Flavour) -> Any:
    """What a library says: `error`, the first one since `begin()`, and `memory`, bytes by what they are for.

    It is the library's ILogger as well: the only one in this process, since the library ignores every further one.

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
