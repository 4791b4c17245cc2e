"""Backends by name. A backend's library is imported when the backend is created, not before."""

from typing import TYPE_CHECKING

from moma_rt.backends.cpu import usable_cores
from moma_rt.backends.device import local_device
from moma_rt.backends.libraries import check_cuda_provider, library, onnx_runtime
from moma_rt.bundle.engines import Flavour
from moma_rt.errors import InputError

if TYPE_CHECKING:
    from moma_rt.backends.base import Backend

# Selects the best backend that a bundle and this machine allow.
AUTO = "auto"
# ONNX Runtime, on the CPU and on a GPU.
ONNXRUNTIME, ONNXRUNTIME_CUDA = "onnxruntime", "onnxruntime_cuda"
NAMES = (AUTO, ONNXRUNTIME, ONNXRUNTIME_CUDA, *(flavour.value for flavour in Flavour))


def check(name: str, threads: int | None = None) -> None:
    """Check a backend's name and its number of CPU threads.

    Raises:
        InputError: the name is not in `NAMES`, or threads is out of range.
    """
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= 1024):
        raise InputError(f"threads is {threads!r}: it must be an integer from 1 to 1024")
    if name not in NAMES:
        raise InputError(f"no backend {name!r}; there are: {', '.join(NAMES)}")


def create(name: str, threads: int | None = None) -> "Backend":
    """Create a backend.

    Args:
        name: one of `NAMES` except `AUTO`, which depends on a bundle (`moma_rt.backends.selection.choose`).
        threads: CPU threads a network may use, 1 to 1024; None: as many as this process may use cores, or the
            backend's default if it may use all. A GPU uses none.

    Raises:
        InputError: there is no such backend, threads is out of range, or a library is not installed.
        MomaError: the device cannot be used.
    """
    check(name, threads)
    if name == AUTO:
        raise InputError(f"backend {AUTO} depends on the bundle; name one of: {', '.join(NAMES[1:])}")
    if threads is None:
        threads = usable_cores()
    # The check before each import raises an error that names the missing package.
    if name == ONNXRUNTIME:
        onnx_runtime()
        from moma_rt.backends.onnxruntime import OnnxRuntimeBackend

        return OnnxRuntimeBackend(threads)
    if name == ONNXRUNTIME_CUDA:
        check_cuda_provider()
        from moma_rt.backends.onnxruntime_cuda import OnnxRuntimeCudaBackend

        return OnnxRuntimeCudaBackend()
    flavour = Flavour(name)
    if flavour is Flavour.INDUCTOR:
        library(flavour)
        from moma_rt.backends.inductor import InductorBackend

        return InductorBackend(local_device(), threads)
    from moma_rt.backends.tensorrt import TensorRtBackend

    return TensorRtBackend(flavour)
