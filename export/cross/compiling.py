"""Entry points of a build that compiles packages for a GPU that this machine does not have.

A child process compiles each package, because the stubs must be loaded before PyTorch is imported. Another loads the
package once and lists the weights that its code asks for.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch

from export.cross.devices import DEVICES, DeviceFacts
from export.cross.request import to_json
from export.cross.rules import check
from export.cross.stubs import Toolchain, build_stubs, check_host
from export.packages import PACKAGE_NAME, PackageRequest
from moma_rt.backends.libraries import is_installed
from moma_rt.backends.package_weights import WEIGHTS_MEMBER
from moma_rt.bundle.engines import format_capabilities
from moma_rt.errors import BundleError, InputError
from moma_rt.messages import one_line

_WORKER = "export.cross.worker"
_SHOWN = 3


def check_cross(capability: int) -> tuple[DeviceFacts, Toolchain]:
    """Check that this machine can compile for a compute capability; return the device's properties and the tools.

    Raises:
        InputError: no such device is known, or something is not installed; the message says what to install.
        BundleError: cross-compiling does not work with this version of PyTorch.
    """
    what = f"inductor {format_capabilities([capability])}"
    facts = DEVICES.get(capability)
    if facts is None:
        raise InputError(f"{what}: no such device is known; known are {format_capabilities(DEVICES)}")
    check_host(facts, what)
    if torch.version.cuda is None:
        raise InputError(
            f"{what}: PyTorch {torch.__version__} is a CPU build, which cannot compile for GPUs: install PyPI's own, "
            f"pip install torch=={torch.__version__.split('+')[0]} (5 GB with CUDA)"
        )
    if not is_installed("triton"):
        raise InputError(f"{what}: the Python package triton is not installed; pip install triton")
    tools = Toolchain.find(what, torch.version.cuda)
    check()
    return facts, tools


def cross_compile(request: PackageRequest, folder: Path) -> None:
    """Compile a network for a GPU that this machine does not have, and write `folder/engine.pt2`.

    Raises:
        InputError: see `check_cross`.
        BundleError: inductor cannot compile it, or its code asks for weights that the network does not have.
    """
    name = request.network.name
    facts, tools = check_cross(request.capability)
    with tempfile.TemporaryDirectory(prefix="moma-rt-") as place:
        environment = build_stubs(facts, tools, Path(place))
        chosen = _run({"compile": to_json(request), "folder": str(folder.resolve())}, environment, name)
        package = folder / PACKAGE_NAME
        asked = _run({"constants": str(package.resolve())}, environment, name)
    if chosen == 0:
        raise BundleError(f"{name}: PyTorch {torch.__version__} compiled kernels that were not chosen by rule")
    # Any other tensor was created by the module on the stubbed device, which computes nothing.
    unknown = sorted(set(asked) - _weights(package))
    if unknown:
        raise BundleError(
            f"{name}: its code asks for {len(unknown)} tensors that are not weights of the network, such as "
            f"{', '.join(unknown[:_SHOWN])}: compile it on the device itself, with --target inductor"
        )


def _weights(package: Path) -> set[str]:
    """Return the names of a network's weights that its package lists."""
    with zipfile.ZipFile(package) as archive:
        return set(json.loads(archive.read(WEIGHTS_MEMBER))["tensors"])


def _run(job: dict[str, Any], environment: dict[str, str], name: str) -> Any:
    """Run a job in a child process and return its result.

    Raises:
        BundleError: the job failed; the message begins with the network's name.
    """
    with tempfile.TemporaryDirectory(prefix="moma-rt-") as folder:
        paths = [Path(folder, part) for part in ("job.json", "result.json")]
        paths[0].write_text(json.dumps(job))
        command = [sys.executable, "-m", _WORKER, *map(str, paths)]
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise BundleError(f"{name}: {_why(done)}")
        result = json.loads(paths[1].read_text())
    if "error" in result:
        said = result["error"]
        raise BundleError(said if said.startswith(f"{name}: ") else f"{name}: {said}")
    return result["done"]


def _why(done: "subprocess.CompletedProcess[str]") -> str:
    """Return why a process ended without a result."""
    if done.returncode == -signal.SIGKILL:
        gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
        return (
            f"the process that compiled it was killed, most likely because this machine's {gigabytes:.0f} GB of memory "
            "ran out"
        )
    if done.returncode < 0:
        return f"the process that compiled it was ended by {signal.Signals(-done.returncode).name}"
    lines = done.stderr.strip().splitlines()
    # The lines of a traceback are indented; what was raised follows them.
    indented = [number for number, line in enumerate(lines) if line.startswith(" ")]
    said = " ".join(lines[indented[-1] + 1 if indented else 0 :]) or f"exit code {done.returncode}"
    return f"PyTorch {torch.__version__} cannot compile it: {one_line(said)}"
