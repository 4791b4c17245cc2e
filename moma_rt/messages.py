"""One-line texts of values and errors, and warnings."""

import sys
import warnings
from pathlib import Path

from moma_rt.errors import MomaWarning

_SHOWN_CHARACTERS = 80
_LINE_CHARACTERS = 300


def short_repr(value: object) -> str:
    """`repr(value)` on one line, truncated if long; the type's name if `repr` raises."""
    try:
        text = repr(value)
    except Exception:  # an int of 5000 digits has no repr, and a __repr__ may raise anything
        return f"<{type(value).__name__}>"
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def first_line(error: BaseException) -> str:
    """First line of another library's error, without traceback or advice; its type's name if it has no text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def one_line(text: object) -> str:
    """Text of another library on one line, truncated if very long."""
    return " ".join(str(text).split())[:_LINE_CHARACTERS]


def warn(message: str) -> None:
    """Warn with a `MomaWarning`, attributed to the line outside this package that called into it.

    Python's default filter shows a warning once per line of code: attributed to a line in here, it would be shown to
    the first caller only.
    """
    package = str(Path(__file__).parent / "_").removesuffix("_")
    level, frame = 1, sys._getframe()
    while frame.f_code.co_filename.startswith(package) and frame.f_back is not None:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, MomaWarning, stacklevel=level)
