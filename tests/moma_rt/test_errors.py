"""`run_command`: what a command prints, and its exit code, whatever its body does."""

import errno
import io
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest

from moma_rt.errors import InputError, MomaError, MomaWarning, run_command

PRELUDE = "import sys, os\nfrom moma_rt.errors import print_output, run_command\n"


def outcome(main):
    """The exit code and the lines on stderr."""
    stream = io.StringIO()
    code = run_command("prog", main, stream)
    return code, stream.getvalue().splitlines()


def raising(error):
    def main():
        raise error

    return main


def program(repository, body, *, stdout, unbuffered=""):
    """Run `body` as main() in its own interpreter: what happens at exit counts too."""
    code = PRELUDE + "def main():\n" + "".join(f"    {line}\n" for line in body) + "sys.exit(run_command('prog', main))"
    return subprocess.run(
        [sys.executable, "-c", code],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        cwd=repository,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
    )


@pytest.mark.parametrize("code", [0, 1, 7])
def test_the_code_of_main_is_returned(code):
    assert outcome(lambda: code) == (code, [])


def test_an_interruption_is_one_line():
    assert outcome(raising(KeyboardInterrupt())) == (130, ["prog: interrupted"])


def test_a_warning_of_this_project_is_one_line_and_others_are_silent():
    def main():
        for _ in range(2):
            warnings.warn("the text is cut", MomaWarning, stacklevel=1)
        warnings.warn("of another library", UserWarning, stacklevel=1)
        return 0

    assert outcome(main) == (0, ["prog: warning: the text is cut"] * 2)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (InputError("steps is 0"), "prog: error: steps is 0"),
        (InputError("photo a\nb.png does not exist"), "prog: error: photo a\\nb.png does not exist"),
        (PermissionError(errno.EACCES, "Permission denied", "b/x"), "prog: error: b/x: Permission denied"),
        (FileNotFoundError(errno.ENOENT, "No such file", b"b\xff"), "prog: error: b\udcff: No such file"),
        (OSError(errno.ENOSPC, "No space left on device"), "prog: error: No space left on device"),
        (OSError("encoder error"), "prog: error: encoder error"),
        (OSError(), "prog: error: OSError"),
        (OSError(errno.EBADF, "Bad file descriptor", 7), "prog: error: 7: Bad file descriptor"),
    ],
)
def test_an_error_is_one_line_and_exit_code_2(error, line):
    assert outcome(raising(error)) == (2, [line])


def test_a_defect_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        outcome(raising(ZeroDivisionError()))


PRINTS = [
    ["print('line\\n' * 100_000)", "return 0"],
    ["print('line')", "return 0"],
    ["print('line')", "sys.exit(0)"],
    ["print_output('line')", "return 0"],
    ["print_output('line\\n' * 100_000)", "return 0"],
]


@pytest.mark.parametrize("body", PRINTS)
def test_a_closed_pipe_on_stdout_is_a_quiet_end(repository, body):
    reading, writing = os.pipe()
    os.close(reading)
    try:
        ran = program(repository, body, stdout=writing)
    finally:
        os.close(writing)
    assert (ran.returncode, ran.stderr) == (141, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize(("body", "unbuffered"), [*((body, "") for body in PRINTS[1:]), (PRINTS[-1], "1")])
def test_a_stdout_that_is_full_is_one_line(repository, body, unbuffered):
    with open("/dev/full", "w") as full:
        ran = program(repository, body, stdout=full, unbuffered=unbuffered)
    assert ran.stderr == "prog: error: cannot write to stdout: No space left on device\n"
    assert ran.returncode == 2


def test_a_stderr_that_cannot_be_written_leaves_the_exit_code():
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

    assert run_command("prog", raising(InputError("steps is 0")), Full()) == 2


def test_the_text_of_an_error_is_one_printable_line():
    """Names come out of files: a line break or an escape sequence in one must not reach the terminal."""
    error = MomaError("a\nb\x1b[31m is no tensor of \u202eevil \u00e9\u65e5")
    assert str(error) == "a\\nb\\x1b[31m is no tensor of \\u202eevil \u00e9\u65e5"
    assert outcome(raising(error)) == (2, [f"prog: error: {error}"])


def test_too_little_memory_is_one_line():
    """Of NumPy, of Pillow or of Python itself."""
    code, lines = outcome(lambda: np.zeros((1 << 45,), np.float64))
    assert code == 2
    assert lines[0].startswith("prog: error: too little memory: Unable to allocate 256. TiB for an")
    assert len(lines) == 1
    line = "prog: error: too little memory: an allocation failed; close other programs, or ask for less at a time"
    assert outcome(raising(MemoryError())) == (2, [line])
