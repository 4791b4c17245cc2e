"""Backends by name. A backend's library is imported when the backend is created, not before."""

from typing import TYPE_CHECKING

from moma_rt.backends.device import local_device
from moma_rt.backends.libraries import check_cuda_provider, library, onnx_runtime
from moma_rt.bundle.engines import Flavour
from moma_rt.errors import InputError

if TYPE_CHECKING:
    from moma_rt.backends.base import Backend

# The best that a bundle and this machine allow.
AUTO = "auto"
# The ONNX files, on the CPU and on a GPU.
ONNXRUNTIME, ONNXRUNTIME_CUDA = "onnxruntime", "onnxruntime_cuda"
NAMES = (AUTO, ONNXRUNTIME, ONNXRUNTIME_CUDA, *(flavour.value for flavour in Flavour))


def check(name: str, threads: int | None = None) -> None:
    """Refuse what no backend can be.

    Raises:
        InputError: a name that is not in `NAMES`, or threads out of range.
    """
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= 1024):
        raise InputError(f"threads is {threads!r}: it must be an integer from 1 to 1024")
    if name not in NAMES:
        raise InputError(f"no backend {name!r}; there are: {', '.join(NAMES)}")


def create(name: str, threads: int | None = None) -> "Backend":
    """Create a backend.

    Args:
        name: one of `NAMES`, but not `AUTO`: what that is depends on a bundle (`moma_rt.backends.selection.choose`).
        threads: CPU threads a network may use, 1 to 1024; None leaves the choice to the backend. A GPU uses none.

    Raises:
        InputError: no such backend, threads out of range, or a library that is not installed.
        MomaError: the device cannot be used.
    """
    check(name, threads)
    if name == AUTO:
        raise InputError(f"backend {AUTO} is chosen for a bundle; name one of: {', '.join(NAMES[1:])}")
    # What comes before an import says what is missing for it.
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
