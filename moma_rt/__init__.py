"""MoMA inference: one photo of a subject in, new pictures of it out. NumPy and one backend, never PyTorch.

::

    runtime = moma_rt.Runtime.load("bundles/tiny")
    subject = runtime.enroll("car.jpg", "car-mask.png", "car")
    result = runtime.generate(subject, "A car on a beach.")
    result.images[0].save("beach.png")
"""

from importlib import import_module
from typing import TYPE_CHECKING

from moma_rt.errors import BundleError, Cancelled, InputError, MomaError, MomaWarning, OutOfMemory, SubjectError

if TYPE_CHECKING:
    from moma_rt.pipeline.request import Result
    from moma_rt.pipeline.sampling import StepInfo
    from moma_rt.runtime import Runtime
    from moma_rt.subject import Subject

__version__ = "0.1.0"

__all__ = [
    "BundleError",
    "Cancelled",
    "InputError",
    "MomaError",
    "MomaWarning",
    "OutOfMemory",
    "Result",
    "Runtime",
    "StepInfo",
    "Subject",
    "SubjectError",
    "__version__",
]

# Imported on first use, so that `import moma_rt` and `moma-rt --help` do not pay for NumPy and a backend.
_LAZY = {
    "Result": "moma_rt.pipeline.request",
    "Runtime": "moma_rt.runtime",
    "StepInfo": "moma_rt.pipeline.sampling",
    "Subject": "moma_rt.subject",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
