"""The C++ compiler of a GPU's packages, whose code may run beside another CPU than the one that compiles it."""

import os
from pathlib import Path
from types import MappingProxyType

# What inductor calls where nothing is said.
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


def portable_compiler(folder: Path) -> Path:
    """Write a command into a folder that calls the compiler, CXX or g++, without instructions of this CPU.

    Returns:
        The command's path.
    """
    path = folder / _COMPILER
    path.write_text(_SCRIPT.format(compiler=os.environ.get("CXX", _COMPILER)))
    path.chmod(0o755)
    return path
