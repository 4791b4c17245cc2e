"""Describes the machine and software of a benchmark run, and writes its results."""

import contextlib
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

import moma_rt
from moma_rt.bundle.manifest import Bundle
from moma_rt.files import atomic_write

_PACKAGES = (
    "numpy",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "torch",
    "triton",
    "diffusers",
    "transformers",
    "tokenizers",
    "tensorrt",
    "tensorrt_rtx",
    "cuda-bindings",
)
# The commit of the sources, for a copy without git history.
_COMMIT_VARIABLE = "MOMA_RT_COMMIT"
# The folder for results, in place of benchmarks/results.
RESULTS_VARIABLE = "MOMA_RT_RESULTS"

# Options whose values are paths on this machine, and the placeholders shown for them.
_PATH_OPTIONS = MappingProxyType({"--bundle": "DIR", "--subject": "FILE"})


def environment(command: str) -> dict[str, Any]:
    """Return hardware, versions and commit of this run, and the command to repeat it; "gpu" only if there is one."""
    gpu = gpu_facts()
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        **({} if gpu is None else {"gpu": gpu}),
        "python": platform.python_version(),
        "versions": {"moma-rt": moma_rt.__version__} | _versions(),
        "commit": _commit(),
        "command": command,
    }


def bundle_facts(bundle: Bundle) -> dict[str, Any]:
    """Return the facts about a bundle that belong in its results."""
    manifest = bundle.manifest
    return {
        "base": manifest.base,
        "precision": bundle.network("denoiser").precision.value,
        "image_size": manifest.geometry.image_size,
        "sources": {source.role: source.name for source in manifest.sources},
    }


def shareable_command(program: str, given: Sequence[str]) -> str:
    """Return the command line `python -m PROGRAM ...`, with placeholders for the paths of bundle and subject."""
    shown = list(given)
    for index, argument in enumerate(given):
        option, is_joined, _ = argument.partition("=")
        if option not in _PATH_OPTIONS:
            continue
        if is_joined:
            shown[index] = f"{option}={_PATH_OPTIONS[option]}"
        elif index + 1 < len(shown):
            shown[index + 1] = _PATH_OPTIONS[option]
    return shlex.join(["python", "-m", program, *shown])


def percentiles(samples: Sequence[float], which: Sequence[int] = (20, 50, 80)) -> dict[str, float]:
    """Return percentiles of the samples, rounded to four decimals."""
    return {f"p{p}": round(float(np.percentile(samples, p)), 4) for p in which}


def results_path(name: str) -> Path:
    """Return the path of <name>.json: in the folder MOMA_RT_RESULTS if that is set, else in benchmarks/results."""
    return Path(os.environ.get(RESULTS_VARIABLE) or Path(__file__).parent / "results") / f"{name}.json"


def write_results(name: str, results: Mapping[str, Any], folder: Path | None = None) -> Path:
    """Write <name>.json atomically to `folder`, by default the one of `results_path`."""
    path = results_path(name) if folder is None else folder / f"{name}.json"
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return path


def _versions() -> dict[str, str]:
    """Return the versions of installed packages; of one that is installed twice, the version that is imported."""
    found = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def gpu_facts() -> dict[str, Any] | None:
    """Return name, driver, compute capability and memory of the first GPU, by nvidia-smi; None without a GPU."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    query = [command, "--query-gpu=name,driver_version,compute_cap,memory.total", "--format=csv,noheader,nounits"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    if done.returncode:
        return None
    name, driver, capability, mebibytes = (field.strip() for field in done.stdout.splitlines()[0].split(","))
    found: dict[str, Any] = {"name": name, "driver": driver, "capability": capability}
    # nvidia-smi reports no memory size if the GPU shares the CPU's memory.
    return found | ({"memory_gib": round(int(mebibytes) / 1024, 1)} if mebibytes.isdecimal() else {})


def _commit() -> str:
    if _COMMIT_VARIABLE in os.environ:
        return os.environ[_COMMIT_VARIABLE]
    if shutil.which("git") is None:
        return "unknown"
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
