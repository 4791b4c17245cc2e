"""Errors that a user can cause, and how a command line reports them.

Every message is one line that names what was given and what is allowed. A command prints it and exits with
code 2; a service catches `MomaError`. Anything else that escapes is a defect of this project.
"""

import sys
import warnings
from collections.abc import Callable
from typing import TextIO

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


class MomaError(Exception):
    """A mistake in what the user gave; `str(error)` is one line fit to print."""


class InputError(MomaError):
    """A photo, mask, name, prompt or number that cannot be used."""


class BundleError(MomaError):
    """A bundle that is missing, altered, from another version or incomplete."""


class SubjectError(MomaError):
    """A subject file that cannot be read or belongs to another bundle."""


class CheckpointError(MomaError):
    """A checkpoint that is missing, truncated, unsafe or of another architecture."""


class Cancelled(MomaError):
    """A generation that its step callback ended."""


class MomaWarning(UserWarning):
    """Something that was done differently from what the user may expect, such as a prompt that was cut."""


def run_command(program: str, main: Callable[[], int], stderr: TextIO | None = None) -> int:
    """Run a command line's body; turn `MomaError`, warnings and Ctrl-C into one line each on stderr."""
    stream = stderr if stderr is not None else sys.stderr

    def show_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        if issubclass(category, MomaWarning):
            print(f"{program}: warning: {message}", file=stream)

    with warnings.catch_warnings():
        warnings.simplefilter("always", MomaWarning)
        warnings.showwarning = show_warning
        try:
            return main()
        except MomaError as error:
            print(f"{program}: error: {error}", file=stream)
            return EXIT_USER_ERROR
        except KeyboardInterrupt:
            print(f"{program}: interrupted", file=stream)
            return EXIT_INTERRUPTED
