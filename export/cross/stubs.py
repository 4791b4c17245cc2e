"""Build stubs of the driver and the CUDA runtime for an absent device, and the environment that loads them."""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from export.cross.devices import DeviceFacts
from moma_rt.errors import BundleError, InputError
from moma_rt.messages import one_line

_SOURCES = Path(__file__).parent
_DRIVER, _RUNTIME = "libcuda.so.1", "libmoma_cudart.so"
# Headers that a package's C++ code includes; the ones that come with PyTorch are incomplete.
_HEADERS = ("cuda.h", "cuda_runtime_api.h", "crt/host_defines.h", "nv/target")


@dataclass(frozen=True)
class Toolchain:
    """The tools that compile a package, besides PyTorch and Triton.

    cuda_home: the folder whose `include` has the CUDA headers of PyTorch's version.
    """

    cc: str
    cxx: str
    cuda_home: Path

    @classmethod
    def find(cls, what: str, cuda: str) -> "Toolchain":
        """Find this machine's compilers and CUDA headers.

        Args:
            what: what will be compiled; errors begin with it.
            cuda: PyTorch's version of CUDA.

        Raises:
            InputError: a tool is missing; the message says what to install.
        """
        found = {name: shutil.which(name) for name in ("cc", "g++")}
        for name, path in found.items():
            if path is None:
                raise InputError(f"{what}: no C++ compiler: {name} is not on the path; install g++")
        major = int(cuda.split(".")[0])
        for home in _cuda_homes(major):
            if _cuda_major(home) == major and all((home / "include" / name).is_file() for name in _HEADERS):
                return cls(str(found["cc"]), str(found["g++"]), home)
        raise InputError(
            f"{what}: no CUDA headers of version {major}: set CUDA_HOME to a CUDA toolkit (whose include has "
            f"{' and '.join(_HEADERS)}), or pip install 'nvidia-cuda-crt~={major}.0' 'nvidia-cuda-cccl~={major}.0'"
        )


def build_stubs(facts: DeviceFacts, tools: Toolchain, folder: Path) -> dict[str, str]:
    """Compile the stubs into a folder; return the environment in which a process sees the device.

    Raises:
        BundleError: the stubs cannot be compiled; the message is the compiler's.
    """
    include = f"-I{tools.cuda_home / 'include'}"
    macros = [f"-D{name}={value}" for name, value in facts.macros.items()]
    for source, library in (("driver.c", _DRIVER), ("runtime.c", _RUNTIME)):
        command = [tools.cc, "-shared", "-fPIC", "-w", include, *macros, f"-Wl,-soname,{library}"]
        done = subprocess.run(
            [*command, "-o", folder / library, _SOURCES / source], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            errors = [line for line in done.stderr.splitlines() if "error: " in line]
            raise BundleError(f"{source} cannot be compiled: {one_line(errors[0] if errors else done.stderr)}")
    (folder / "libcuda.so").symlink_to(_DRIVER)
    return _environment(folder, tools)


def _environment(folder: Path, tools: Toolchain) -> dict[str, str]:
    root = _SOURCES.parent.parent
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(("CUDA_", "NVIDIA_"))},
        "PYTHONPATH": _before(root, "PYTHONPATH"),
        "LD_PRELOAD": str(folder / _RUNTIME),
        "LD_LIBRARY_PATH": _before(folder, "LD_LIBRARY_PATH"),
        "LIBRARY_PATH": _before(folder, "LIBRARY_PATH"),
        "TRITON_LIBCUDA_PATH": str(folder),
        "CUDA_HOME": str(tools.cuda_home),
        "CXX": tools.cxx,
        # Generate no instructions that only this CPU has.
        "ATEN_CPU_CAPABILITY": "default",
        # Compile in the worker itself: its child processes would not choose by rule.
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }


def _before(folder: Path, variable: str) -> str:
    return os.pathsep.join(filter(None, (str(folder), os.environ.get(variable))))


def check_host(facts: DeviceFacts, what: str) -> None:
    """Refuse a host that cannot compile packages for a device.

    Raises:
        InputError: the host does not run Linux, or its CPU architecture is not that of the device's hosts.
    """
    if sys.platform != "linux":
        raise InputError(f"{what}: packages are compiled for another machine's GPU on Linux only")
    if platform.machine() not in facts.machines:
        raise InputError(
            f"{what}: hosts of such a device are {' or '.join(facts.machines)}, and this machine is "
            f"{platform.machine()}: build on such a host"
        )


def _cuda_homes(major: int) -> Iterator[Path]:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield Path(os.environ[variable])
    yield Path(sysconfig.get_path("purelib")) / "nvidia" / f"cu{major}"
    yield Path("/usr/local/cuda")
    yield from sorted(Path("/usr/local").glob(f"cuda-{major}.*"), reverse=True)


def _cuda_major(home: Path) -> int | None:
    try:
        header = (home / "include" / "cuda.h").read_text(errors="replace")
    except OSError:
        return None
    found = re.search(r"^#define CUDA_VERSION (\d+)", header, re.MULTILINE)
    return None if found is None else int(found.group(1)) // 1000
