"""`python -m export.cross.worker JOB RESULT`: the child process that runs PyTorch on the stubbed driver.

JOB is a JSON file: {"compile": request, "folder": path} or {"constants": path of a package}. RESULT is written as JSON:
{"done": ...} or {"error": one line}.
"""

import ctypes
import json
import signal
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from moma_rt.errors import MomaError

_PR_SET_PDEATHSIG = 1


def main(job_path: str, result_path: str) -> int:
    """Run a job. A MomaError is written to the result; any other error ends this process with a traceback."""
    # End with a parent that is killed: nobody else reads the result.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    job = json.loads(Path(job_path).read_text())
    try:
        result: dict[str, Any] = {"done": _compile(job) if "compile" in job else _constants(Path(job["constants"]))}
    except MomaError as error:
        result = {"error": str(error)}
    Path(result_path).write_text(json.dumps(result))
    return 0


def _compile(job: dict[str, Any]) -> int:
    """Compile a package; return the number of kernels chosen by rule."""
    from export.cross.request import from_json
    from export.cross.rules import install
    from export.packages import write_package

    chosen = install()
    write_package(from_json(job["compile"]), Path(job["folder"]))
    return chosen()


def _constants(package: Path) -> list[str]:
    """Load a package's code as the runtime does; return the names of all tensors that it asks for."""
    import torch

    with zipfile.ZipFile(package) as archive, tempfile.TemporaryDirectory(prefix="moma-rt-") as folder:
        (member,) = (name for name in archive.namelist() if name.endswith(".so"))
        code = archive.extract(member, folder)
        try:
            runner = torch._C._aoti.AOTIModelContainerRunnerCuda(code, 1, "cuda", "", True)
        except RuntimeError as error:
            raise MomaError(f"its code cannot be loaded: {error}") from None
        return sorted(runner.get_constant_names_to_original_fqns().values())


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
