"""A C++ compiler wrapper for GPU packages, whose host code may run on another CPU than the one that compiles it."""

import os
from pathlib import Path
from types import MappingProxyType

# Inductor's default compiler.
_COMPILER = "g++"
# Drops inductor's -march=native.
_SCRIPT = """#!/bin/sh
for argument do
    shift
    [ "$argument" = -march=native ] || set -- "$@" "$argument"
done
exec {compiler} "$@"
"""
# Settings of `torch._inductor.config`: a SIMD length of 1 turns vectorization off.
PORTABLE_SETTINGS = MappingProxyType({"cpp.simdlen": 1})


def portable_compiler(folder: Path) -> Path:
    """Write a script into a folder that calls the compiler, $CXX or g++, without -march=native.

    Returns:
        The script's path.
    """
    path = folder / _COMPILER
    path.write_text(_SCRIPT.format(compiler=os.environ.get("CXX", _COMPILER)))
    path.chmod(0o755)
    return path
