"""The C++ compiler of a GPU's packages, whose code may run beside another CPU than the one that compiles it."""

from pathlib import Path
from types import MappingProxyType

_COMPILER = "g++"
# Inductor names this machine's own instructions.
_SCRIPT = """#!/bin/sh
for argument do
    shift
    [ "$argument" = -march=native ] || set -- "$@" "$argument"
done
exec {compiler} "$@"
"""
# Of `torch._inductor.config`: vectors of one number, which is to say none.
PORTABLE_SETTINGS = MappingProxyType({"cpp.simdlen": 1})


def portable_compiler(folder: Path, compiler: str = _COMPILER) -> Path:
    """Write a command that calls a compiler without instructions of this CPU, into a folder; returns its path."""
    path = folder / _COMPILER
    path.write_text(_SCRIPT.format(compiler=compiler))
    path.chmod(0o755)
    return path
