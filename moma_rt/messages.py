"""Values and warnings in the form in which people read them."""

import sys
import warnings
from pathlib import Path

from moma_rt.errors import MomaWarning

_SHOWN_CHARACTERS = 80
_LINE_CHARACTERS = 300


def short_repr(value: object) -> str:
    """`repr(value)` on one line, its end left out when it is long; the type's name where there is no repr."""
    try:
        text = repr(value)
    except Exception:  # an int of 5000 digits has none, and a stranger's __repr__ may raise anything
        return f"<{type(value).__name__}>"
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def first_line(error: BaseException) -> str:
    """What an error of another library says, without the traceback or advice that may follow; its type if nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def one_line(text: object) -> str:
    """All that another library says, on one line; the end of what is very long is left out."""
    return " ".join(str(text).split())[:_LINE_CHARACTERS]


def warn(message: str) -> None:
    """Warn with a `MomaWarning`, attributed to the line outside this package that called into it.

    Python's default filter shows a warning once a place: one attributed to a line in here would be shown to the first
    of many callers only.
    """
    package = str(Path(__file__).parent / "_").removesuffix("_")
    level, frame = 1, sys._getframe()
    while frame.f_code.co_filename.startswith(package) and frame.f_back is not None:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, MomaWarning, stacklevel=level)
