"""Backends by name. A backend's library is imported when the backend is created, not before."""

from moma_rt.backends.base import Backend
from moma_rt.errors import InputError

NAMES = ("onnxruntime",)


def create(name: str, threads: int | None = None) -> Backend:
    """Create a backend.

    Args:
        name: one of `NAMES`.
        threads: CPU threads a network may use, 1 to 1024; None leaves the choice to the backend.

    Raises:
        InputError: no such backend, or threads out of range.
    """
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= 1024):
        raise InputError(f"threads is {threads!r}: it must be an integer from 1 to 1024")
    if name == "onnxruntime":
        from moma_rt.backends.onnxruntime import OnnxRuntimeBackend

        return OnnxRuntimeBackend(threads)
    raise InputError(f"no backend {name!r}; there are: {', '.join(NAMES)}")
