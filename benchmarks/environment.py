"""Where and on what a measurement was made, and how its samples are summed up."""

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
# A copy of the sources without their history: whoever made it says of which commit it is.
_COMMIT_VARIABLE = "MOMA_RT_COMMIT"
# A folder that results go to in place of benchmarks/results.
RESULTS_VARIABLE = "MOMA_RT_RESULTS"

# Options that name a place on this machine, and what is shown for it.
_PLACES = MappingProxyType({"--bundle": "DIR", "--subject": "FILE"})


def environment(command: str) -> dict[str, Any]:
    """Hardware, versions and commit of this run, and the command that repeats it; "gpu" where there is one."""
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
    """What a result says of the bundle that it was measured with."""
    manifest = bundle.manifest
    return {
        "base": manifest.base,
        "precision": bundle.network("denoiser").precision.value,
        "image_size": manifest.geometry.image_size,
        "sources": {source.role: source.name for source in manifest.sources},
    }


def repeatable(program: str, given: Sequence[str]) -> str:
    """The command `python -m PROGRAM` with the arguments given, without this machine's paths of bundle and subject."""
    shown = list(given)
    for index, argument in enumerate(given):
        option, is_joined, _ = argument.partition("=")
        if option not in _PLACES:
            continue
        if is_joined:
            shown[index] = f"{option}={_PLACES[option]}"
        elif index + 1 < len(shown):
            shown[index + 1] = _PLACES[option]
    return shlex.join(["python", "-m", program, *shown])


def percentiles(samples: Sequence[float], which: Sequence[int] = (20, 50, 80)) -> dict[str, float]:
    """Percentiles of a list of numbers, to four digits behind the point."""
    return {f"p{p}": round(float(np.percentile(samples, p)), 4) for p in which}


def results_path(name: str) -> Path:
    """Where <name>.json is written: in the folder that MOMA_RT_RESULTS names, else in benchmarks/results."""
    return Path(os.environ.get(RESULTS_VARIABLE) or Path(__file__).parent / "results") / f"{name}.json"


def write_results(name: str, results: Mapping[str, Any], folder: Path | None = None) -> Path:
    """Write <name>.json, complete or not at all, to `folder`, by default that of `results_path`."""
    path = results_path(name) if folder is None else folder / f"{name}.json"
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return path


def _versions() -> dict[str, str]:
    """Of those packages that are installed; of one that is there twice, the one that is imported."""
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
    """Name, driver, compute capability and memory of the first GPU, by its driver; None where there is none."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    query = [command, "--query-gpu=name,driver_version,compute_cap,memory.total", "--format=csv,noheader,nounits"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    if done.returncode:
        return None
    name, driver, capability, mebibytes = (field.strip() for field in done.stdout.splitlines()[0].split(","))
    found: dict[str, Any] = {"name": name, "driver": driver, "capability": capability}
    # Where GPU and CPU share their memory the driver does not say how much there is.
    return found | ({"memory_gib": round(int(mebibytes) / 1024, 1)} if mebibytes.isdecimal() else {})


def _commit() -> str:
    if _COMMIT_VARIABLE in os.environ:
        return os.environ[_COMMIT_VARIABLE]
    if shutil.which("git") is None:
        return "unknown"
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
