"""Errors that a user can cause, and how a command line reports them.

Every message is one line that names what was given and what is allowed. A command prints it and exits with
code 2; a service catches `MomaError`. Any other exception is a bug, except an `OSError` of a file that was given.
"""

import contextlib
import functools
import io
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import ParamSpec, TextIO, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
# 128 + SIGPIPE, the exit code of a program that does not handle the signal.
EXIT_BROKEN_PIPE = 141


class MomaError(Exception):
    """Base of all errors that a user can cause; ``str(error)`` is one line to print.

    Names out of files may hold line breaks and control characters, which are escaped.
    """

    def __str__(self) -> str:
        text = super().__str__()
        return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class InputError(MomaError):
    """A photo, mask, name, prompt or number that cannot be used."""


class BundleError(MomaError):
    """A bundle that is missing, altered, from another version or incomplete."""


class SubjectError(MomaError):
    """A subject file that cannot be read, or a subject of another base."""


class CheckpointError(MomaError):
    """A checkpoint that is missing, truncated, unsafe or of another architecture."""


class OutOfMemory(MomaError):
    """A call needs more memory than is left, on the device or in the budget; smaller calls still run."""


class Cancelled(MomaError):
    """A generation that its step callback cancelled."""


class MomaWarning(UserWarning):
    """Something that was done differently from what the user may expect, such as a prompt that was truncated."""


@contextlib.contextmanager
def memory_errors() -> Iterator[None]:
    """Convert the `MemoryError` of NumPy, Pillow or Python itself to an `OutOfMemory`."""
    try:
        yield
    except MemoryError as error:
        reason = (str(error).strip().splitlines() or ["an allocation failed"])[0]
        raise OutOfMemory(f"too little memory: {reason}; close other programs, or ask for less at a time") from None


def with_memory_errors(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function raise `OutOfMemory` in the place of `MemoryError`."""

    # Not contextlib's decorator: its frame is outside this package, and warnings would be attributed to it.
    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with memory_errors():
            return function(*args, **kwargs)

    return wrapped


def run_command(program: str, main: Callable[[], int], stderr: TextIO | None = None) -> int:
    """Run a command line's body; turn errors, warnings and Ctrl-C into one line each on stderr.

    An `OSError` counts as a user's error as well: a name that is too long, a folder without permission, a file that
    vanished, a full disk. A closed pipe on stdout ends the command quietly.

    Returns:
        The exit code of `main`, or `EXIT_USER_ERROR`, `EXIT_INTERRUPTED` or `EXIT_BROKEN_PIPE`.
    """
    stream = stderr if stderr is not None else sys.stderr
    for output in (sys.stdout, stream):
        # The terminal's encoding may lack characters of a file name.
        if isinstance(output, io.TextIOWrapper):
            output.reconfigure(errors="backslashreplace")

    def show_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        if issubclass(category, MomaWarning):
            _print_line(f"{program}: warning: {message}", stream)

    with warnings.catch_warnings():
        warnings.simplefilter("always", MomaWarning)
        warnings.showwarning = show_warning
        try:
            with memory_errors():
                code = main()
        except SystemExit:
            if failed := _flush_stdout(program, stream):
                return failed
            raise
        except KeyboardInterrupt:
            _print_line(f"{program}: interrupted", stream)
            code = EXIT_INTERRUPTED
        except BrokenPipeError:
            _discard(sys.stdout)
            _discard(sys.stderr)
            return EXIT_BROKEN_PIPE
        except MomaError as error:
            _print_line(f"{program}: error: {error}", stream)
            code = EXIT_USER_ERROR
        except OSError as error:
            # An error without a file name may come from stdout, which then fails to flush as well.
            if error.filename is None and (failed := _flush_stdout(program, stream)):
                return failed
            _print_line(f"{program}: error: {os_error_line(error)}", stream)
            code = EXIT_USER_ERROR
    return _flush_stdout(program, stream) or code


def print_output(text: str) -> None:
    """Print a command's result on stdout, and flush it.

    Raises:
        InputError: stdout cannot be written.
        BrokenPipeError: its reader closed the pipe; `run_command` then ends quietly.
    """
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        _discard(sys.stdout)
        raise InputError(f"cannot write to stdout: {error.strerror or error}") from None


def os_error_line(error: OSError) -> str:
    """Format an `OSError` as its path, if it has one, and the system's message."""
    reason = error.strerror or str(error) or type(error).__name__
    if error.filename is None:
        return reason
    return f"{os.fsdecode(error.filename) if not isinstance(error.filename, int) else error.filename}: {reason}"


def _print_line(text: str, stream: TextIO) -> None:
    # File names may hold line breaks. If stderr cannot be written, the exit code alone reports the error.
    with contextlib.suppress(OSError):
        print(" ".join(text.splitlines()), file=stream)


def _flush_stdout(program: str, stream: TextIO) -> int:
    """Flush stdout while a failure can still be reported; return 0, or the exit code of the failure."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        _discard(sys.stdout)
        return EXIT_BROKEN_PIPE
    except OSError as error:
        _discard(sys.stdout)
        _print_line(f"{program}: error: cannot write to stdout: {error.strerror or error}", stream)
        return EXIT_USER_ERROR
    return 0


def _discard(stream: TextIO) -> None:
    """Redirect a stream to the null device, so that the interpreter's flush at exit prints no traceback."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        handle = stream.fileno()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, handle)
        os.close(null)
