"""Measure time and peak memory of engine builds at full size, with or without a GPU.

    python -m benchmarks.builds.engine_builds --out DIR [--only bases|int4|int8|fp16]

Weights are random at the real geometry: neither times nor sizes depend on their values. Each build runs in its own
process, so its memory peak is measured separately.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.builds.full_size import file_bytes, used_folder
from benchmarks.environment import environment, write_results
from moma_rt.bundle.manifest import Bundle

TARGETS = "sm86,sm89,sm120"
WITHOUT_LANGUAGE = ("--skip", "language_model,vision_encoder", "--target", TARGETS)
PARTS = ("bases", "int4", "int8", "fp16")
# Such as "denoiser           built for tensorrt_rtx sm86,sm89,sm120 in 37.7 s".
_LINE = re.compile(r"(\w+) +(kept|built)(?: for \S+ \S+)?(?: in ([\d.]+) s)?")


def main() -> int:
    """Run the parts, print a table, and write a JSON file for each."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.builds.engine_builds", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for the bundles; must be new or empty"
    )
    parser.add_argument(
        "--only",
        choices=PARTS,
        help="build one part: two bases without language model, or the 7B language model in a precision (default: "
        "bases, int4 and int8)",
    )
    options = parser.parse_args()
    if problem := used_folder(options.out):
        parser.error(problem)
    for part in (options.only,) if options.only else PARTS[:3]:
        results = {
            "environment": environment(f"python -m benchmarks.builds.engine_builds --out DIR --only {part}"),
            "builds": bases(options.out) if part == "bases" else language_model(options.out, part),
        }
        path = write_results(f"engine_builds_{part}", results)
        for build in results["builds"]:
            print(f"{build['what']:<50} {build['seconds']:7.1f} s, peak {build['peak_gb']:5.2f} GB")
        print(path)
    return 0


def bases(out: Path) -> list[dict[str, Any]]:
    """Build one base from nothing, then a second one beside it."""
    builds = []
    for base, what in (("rev_animated", "a base from nothing"), ("anything_v4", "a second base")):
        command = ("export.build", "--base", base, "--weights", "random", *WITHOUT_LANGUAGE, "--out", str(out / base))
        builds.append({"what": what, **measured(*command), **verify(out / base)})
    return builds


def language_model(out: Path, precision: str) -> list[dict[str, Any]]:
    """Export the 7B language model, then build its engine."""
    folder = str(out / precision)
    export = ("--base", "sd15", "--weights", "random", "--only", "language_model", "--mllm-precision", precision)
    builds = [{"what": f"{precision} export", **measured("export.build", *export, "--out", folder)}]
    engine = measured("engines.build", folder, "--target", TARGETS)
    builds.append({"what": f"{precision} engine", **engine, **verify(Path(folder))})
    return builds


def measured(*command: str) -> dict[str, Any]:
    """Run a module of this repository; returns seconds, peak memory in GB, and its line about each network."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", *command], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}: {said.strip()[-300:]}")
    found = [_LINE.match(line) for line in said.splitlines()]
    steps = [{"network": m[1], "state": m[2], "seconds": float(m[3] or 0), "line": m[0]} for m in found if m]
    peak = used.ru_maxrss * 1024 / 1e9
    return {"seconds": round(seconds, 1), "peak_gb": round(peak, 2), "steps": steps}


def verify(root: Path) -> dict[str, Any]:
    """Hash every file of a bundle; returns the bytes of its graphs and weights, and its engines' sizes."""
    bundle = Bundle.open(root)
    bundle.verify(bundle.manifest.files)
    files = bundle.manifest.files
    return {
        "bytes": file_bytes(bundle.manifest),
        "engines": [
            {
                "network": engine.network,
                "capabilities": engine.capabilities,
                "file_bytes": files[engine.file].size,
                "weight_bytes": engine.weight_bytes,
                "activation_bytes": engine.activation_bytes,
            }
            for engine in bundle.manifest.engines
        ],
    }


if __name__ == "__main__":
    sys.exit(main())
