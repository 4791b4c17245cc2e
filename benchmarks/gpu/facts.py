"""Step 0: describe the machine, and compile and run one Linear with AOTInductor: `python -m benchmarks.gpu.facts`.

If the toolchain lacks something that later steps need (headers, linker, driver, Triton), this step fails in seconds.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._inductor import aoti_compile_and_package, aoti_load_package

from benchmarks.gpu.step import StepResults, step_options
from moma_rt.errors import MomaError, run_command
from moma_rt.messages import one_line

PROGRAM = "benchmarks.gpu.facts"
_CLOCKS = "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"
_WIDTH, _ROWS = 64, 8
_QUICKLY = {"aot_inductor.precompile_headers": False, "aot_inductor.compile_wrapper_opt_level": "O0"}
# For dot products of 64 numbers in fp16 on a GPU, fp32 on a CPU, relative to the largest output.
_TOLERANCE = {"cuda": 5e-3, "cpu": 1e-5}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the step; returns the exit code."""
    options = step_options(PROGRAM, sys.argv[1:] if arguments is None else arguments, description=__doc__)
    return run_command(PROGRAM, lambda: _measure(options))


def _measure(options: Any) -> int:
    results = StepResults("facts", options, torch=torch_facts(options.device), tools=tools())
    results.put(clocks=clocks())
    start = time.perf_counter()
    error = linear_error(options.device)
    seconds = round(time.perf_counter() - start, 1)
    on = results["environment"].get("gpu", {}).get("name", "a CPU")
    commit = results["environment"]["commit"]
    results.finish(
        f"{on}, torch {torch.__version__}, commit {commit}; AOTInductor of a Linear in {seconds} s, off by {error:.1e}",
        linear={"seconds": seconds, "relative_error": error},
    )
    return 0


def torch_facts(device: str) -> dict[str, Any]:
    """Return PyTorch's description of the device."""
    facts: dict[str, Any] = {"cuda": torch.version.cuda, "threads": torch.get_num_threads()}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "capability": list(torch.cuda.get_device_capability(0)),
            "multiprocessors": properties.multi_processor_count,
            "l2_mib": round(properties.L2_cache_size / 2**20, 1),
            "cudnn": torch.backends.cudnn.version(),
        }
    return facts


def tools() -> dict[str, str | None]:
    """Return the paths of tools that steps call, and environment variables that compilers read."""
    found = {name: shutil.which(name) for name in ("nvcc", "ncu", "compute-sanitizer", "g++", "nvidia-smi")}
    found |= {name: os.environ.get(name) for name in ("CUDA_HOME", "LIBRARY_PATH")}
    if found["nvcc"]:
        said = subprocess.run([found["nvcc"], "--version"], capture_output=True, text=True, check=False).stdout
        found["nvcc_version"] = next((line for line in said.splitlines() if "release" in line), None)
    return found


def clocks() -> dict[str, str]:
    """Return clocks in MHz, power limit in W and temperature, as nvidia-smi reports them; empty without nvidia-smi."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return {}
    query = [command, f"--query-gpu={_CLOCKS}", "--format=csv,noheader,nounits"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    values = done.stdout.splitlines()[0].split(",") if done.returncode == 0 and done.stdout else []
    return {name: value.strip() for name, value in zip(_CLOCKS.split(","), values, strict=False)}


def linear_error(device: str) -> float:
    """Compile a Linear with activation ahead of time, load it and run it; returns the relative error.

    Raises:
        MomaError: it cannot be compiled or run, or its result is wrong.
    """
    dtype = torch.float16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(_WIDTH, _WIDTH), nn.SiLU()).to(device, dtype).eval()
    x = torch.randn(_ROWS, _WIDTH, device=device, dtype=dtype)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        wanted = module.float()(x.float())
        module.to(dtype)
        try:
            with torch.no_grad():
                program = torch.export.export(module, (x.clone(),))
                package = str(Path(folder) / "linear.pt2")
                aoti_compile_and_package(program, package_path=package, inductor_configs=_QUICKLY)
            found = aoti_load_package(package)(x).float()
        except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
            raise MomaError(f"AOTInductor does not work on this machine: {one_line(error)}") from None
    relative = float((found - wanted).abs().max() / wanted.abs().max())
    if not relative <= _TOLERANCE[device]:
        raise MomaError(f"AOTInductor of a Linear is off by {relative:.1e}, {_TOLERANCE[device]:.0e} are allowed")
    return relative


if __name__ == "__main__":
    sys.exit(main())
