"""Locates what AOTInductor needs to compile for CUDA: headers, and a driver library that can be linked."""

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

_DRIVER = "libcuda.so"


def toolchain(link_folder: Path, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return environment variables with which AOTInductor can compile for a GPU on this machine.

    CUDA_HOME is a folder with include/cuda.h, which a wrapper called `nvcc` on the PATH may not reveal. The driver only
    installs libcuda.so.1, but a linker looks for libcuda.so: a symlink of that name is created in `link_folder`, which
    is added to LIBRARY_PATH. Variables whose values cannot be found are left out.
    """
    found = {}
    home = next((folder for folder in _candidates(environ) if (folder / "include" / "cuda.h").is_file()), None)
    if home is not None:
        found["CUDA_HOME"] = str(home)
    library = _driver_library()
    if library is not None:
        link_folder.mkdir(parents=True, exist_ok=True)
        link = link_folder / _DRIVER
        if not link.exists():
            link.unlink(missing_ok=True)
            link.symlink_to(library)
        found["LIBRARY_PATH"] = os.pathsep.join(filter(None, (str(link_folder), environ.get("LIBRARY_PATH"))))
    return found


def _candidates(environ: Mapping[str, str]) -> Iterator[Path]:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if environ.get(name):
            yield Path(environ[name])
    nvcc = shutil.which("nvcc", path=environ.get("PATH"))
    if nvcc is not None:
        yield Path(nvcc).resolve().parents[1]
    yield Path("/usr/local/cuda")
    # The newest first.
    yield from sorted(Path("/usr/local").glob("cuda-*"), key=_version, reverse=True)
    # PyTorch's CUDA wheels contain the headers.
    spec = importlib.util.find_spec("nvidia")
    for folder in () if spec is None else spec.submodule_search_locations or ():
        yield from sorted(Path(folder).glob("cu*"), key=_version, reverse=True)


def _version(folder: Path) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", folder.name)))


def _driver_library() -> Path | None:
    """Return the path of libcuda.so.1 in the dynamic linker's cache."""
    ldconfig = shutil.which("ldconfig") or "/sbin/ldconfig"
    try:
        listed = subprocess.run([ldconfig, "-p"], capture_output=True, text=True, check=False).stdout
    except OSError:
        return None
    lines = [line for line in listed.splitlines() if line.strip().startswith(f"{_DRIVER}.1 ")]
    paths = [Path(line.rpartition("=> ")[2].strip()) for line in lines if "x86-64" in line or "AArch64" in line]
    return next((path for path in paths if path.is_file()), None)
