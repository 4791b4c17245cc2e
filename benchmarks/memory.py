"""Measures memory in use: of this process, and of the GPU by all processes."""

import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

_STATUS = Path("/proc/self/status")


def peak_gb() -> float:
    """Return the peak resident memory of this process in GB."""
    peak = _status_bytes("VmHWM")
    if peak is None:
        # The second choice, because this peak includes that of the parent process at the fork.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return peak / 1e9


def resident_mib() -> float | None:
    """Return the resident memory of this process in MiB; None where the kernel does not report it."""
    resident = _status_bytes("VmRSS")
    return None if resident is None else resident / 2**20


def device_mib_used() -> float | None:
    """Return the memory in use on the first NVIDIA GPU by all processes, in MiB; None without a GPU."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    query = [command, "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    lines = done.stdout.split()
    return float(lines[0]) if done.returncode == 0 and lines and lines[0].isdecimal() else None


def device_mib_in_process() -> float | None:
    """Return the memory in use on this process's NVIDIA GPU by all processes, in MiB; None if it uses no GPU.

    Asks the CUDA runtime that is loaded in this process, which takes microseconds; `device_mib_used` starts a process,
    which takes a tenth of a second and memory of its own.
    """
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        free, total = torch.cuda.mem_get_info()
        return (total - free) / 2**20
    runtime: Any = sys.modules.get("cuda.bindings.runtime")
    if runtime is None:
        return None
    failed, free, total = runtime.cudaMemGetInfo()
    return None if int(failed) else (total - free) / 2**20


def _status_bytes(name: str) -> int | None:
    """Read an entry of /proc/self/status in bytes; None where a sandbox or another system lacks it."""
    lines = _STATUS.read_text(encoding="utf-8").splitlines() if _STATUS.exists() else []
    found = [line for line in lines if line.startswith(f"{name}:")]
    return int(found[0].split()[1]) * 1024 if found else None
