"""Measure the export of SD1.5's geometry with random weights, and one denoising step against PyTorch eager.

    python -m benchmarks.builds.full_size --out DIR

Each part runs in its own process, so its memory peak is measured separately; the steps alternate.
"""

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from benchmarks.environment import environment, percentiles, write_results
from export.sample_inputs import sample_inputs
from moma_rt.bundle.manifest import Bundle, Manifest
from moma_rt.bundle.specs import Geometry

NETWORKS = "denoiser,subject_encoder,vae_encoder,vae_decoder,text_encoder"
# The fraction of reference tokens inside the object mask.
OBJECT_SHARE = 0.4

Arrays = dict[str, np.ndarray]
Step = Callable[[], Arrays]


def main() -> int:
    """Run everything, print a table, and write benchmarks/results/full_size_cpu.json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.builds.full_size", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for the bundle; must be new or empty"
    )
    parser.add_argument(
        "--repeats", type=int, default=5, metavar="N", help="number of timed steps after one warm-up (default: 5)"
    )
    options = parser.parse_args()
    if problem := used_folder(options.out):
        parser.error(problem)
    results: dict[str, Any] = {
        "environment": environment(f"python -m benchmarks.builds.full_size --out DIR --repeats {options.repeats}"),
        "export": export(options.out),
    }
    torch_result, ort_result = alternate((pytorch_step, onnxruntime_step), options.out, options.repeats)
    errors = {
        name: relative_error(ort_result["outputs"][name], torch_result["outputs"][name])
        for name in ("next_latents", "next_foreground_mask")
    }
    results["denoiser_step"] = {
        "batch": 1,
        "guided_batch": 2,
        "object_share": OBJECT_SHARE,
        "pytorch_eager": torch_result["measured"],
        "onnxruntime": ort_result["measured"],
        "relative_error": errors,
    }
    path = write_results("full_size_cpu", results)
    print_table(results, path)
    return 0


def used_folder(out: Path) -> str:
    """Return what is wrong with `--out`, in one line; empty for a new or an empty folder."""
    try:
        if not out.exists() or (out.is_dir() and not any(out.iterdir())):
            return ""
    except OSError as error:
        return f"--out {out}: cannot be read: {error.strerror}"
    return f"--out {out}: is not an empty folder; finished parts in it would not be built again and measured"


def export(out: Path) -> dict[str, Any]:
    """Build the bundle in its own process; returns seconds, peak memory in GB, and the bytes of its files."""
    command = [sys.executable, "-m", "export.build", "--base", "sd15", "--weights", "random", "--only", NETWORKS]
    start = time.perf_counter()
    subprocess.run([*command, "--out", str(out)], check=True)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
    sizes = file_bytes(Bundle.open(out).manifest)
    return {"networks": NETWORKS.split(","), "seconds": round(seconds, 1), "peak_gb": round(peak, 2), "bytes": sizes}


def file_bytes(manifest: Manifest) -> dict[str, int]:
    """Return the bytes of a bundle's graphs, and of each group of weights."""
    sizes = {
        "graphs": sum(manifest.files[graph].size for entry in manifest.networks.values() for graph in entry.graphs)
    }
    for file in sorted({file for entry in manifest.networks.values() for file in entry.weights}):
        group, _, _ = PurePosixPath(file).parent.name.rpartition("-")
        sizes[f"weights of {group}"] = manifest.files[file].size
    return sizes


def pytorch_step(out: Path) -> Step:
    """Return one step of the exported module in PyTorch eager."""
    import torch

    from export.checkpoints.load import CheckpointRequest, load_checkpoint
    from export.checkpoints.model import roles_for
    from export.networks import NETWORKS as TABLE

    network = TABLE["denoiser"]
    checkpoint = load_checkpoint(CheckpointRequest("sd15", "random", roles=roles_for(["denoiser"])))
    geometry = Bundle.open(out).manifest.geometry
    spec, module = network.spec(geometry), network.module(checkpoint, geometry)
    inputs = sample_inputs(spec, geometry, step_sizes(geometry))
    arguments = network.arguments(tuple(torch.from_numpy(inputs[t.name]) for t in spec.inputs), geometry)

    def run() -> Arrays:
        with torch.inference_mode():
            outputs = module(*arguments)
        return {tensor.name: array.numpy() for tensor, array in zip(spec.outputs, outputs, strict=True)}

    return run


def onnxruntime_step(out: Path) -> Step:
    """Return one step of the bundle's denoiser on the runtime's CPU backend."""
    from moma_rt.backends import create

    bundle = Bundle.open(out)
    entry, backend = bundle.network("denoiser"), create("onnxruntime")
    network = backend.load(entry.spec, bundle.path(bundle.graph("denoiser")), tuple(map(bundle.path, entry.weights)))
    sizes = step_sizes(bundle.manifest.geometry)
    inputs = sample_inputs(entry.spec, bundle.manifest.geometry, sizes)
    tensors = (*entry.spec.inputs, *entry.spec.outputs)
    buffers = backend.allocate({t.name: (t.resolve(**sizes), t.dtype) for t in tensors})
    for name, array in inputs.items():
        backend.upload(buffers[name], array)
    bound = network.bind(buffers)

    def run() -> Arrays:
        bound.enqueue()
        return {t.name: backend.download(buffers[t.name]) for t in entry.spec.outputs}

    return run


def step_sizes(geometry: Geometry) -> dict[str, int]:
    """Return the dynamic sizes of a step: one sample, both guidance halves, a mask of `OBJECT_SHARE`."""
    tokens = {f"reference_tokens_{g}": max(1, round(OBJECT_SHARE * g * g)) for g in geometry.grids}
    return {"batch": 1, "guided_batch": 2, **tokens}


def alternate(contenders: Sequence[Callable[[Path], Step]], out: Path, repeats: int) -> list[dict[str, Any]]:
    """Time the contenders' steps alternately, so that other load on the machine affects all alike."""
    pipes, processes, context = [], [], get_context("spawn")
    for contender in contenders:
        pipe, far = context.Pipe()
        processes.append(context.Process(target=serve, args=(contender, out, far), daemon=True))
        processes[-1].start()
        pipes.append(pipe)
    seconds: list[list[float]] = [[] for _ in contenders]
    for turn in range(1 + repeats):
        for pipe, taken in zip(pipes, seconds, strict=True):
            pipe.send("step")
            value = pipe.recv()
            if turn > 0:
                taken.append(value)
    results = []
    for pipe, taken in zip(pipes, seconds, strict=True):
        pipe.send("end")
        outputs, peak = pipe.recv()
        measured = {**percentiles(taken), "repeats": repeats, "peak_gb": round(peak, 2)}
        results.append({"measured": measured, "outputs": outputs})
    for process in processes:
        process.join()
    return results


def serve(contender: Callable[[Path], Step], out: Path, pipe: Connection) -> None:
    """Run a contender's process: one step per "step" message; finally send its outputs and its peak memory in GB."""
    run = contender(out)
    outputs: Arrays = {}
    while pipe.recv() == "step":
        start = time.perf_counter()
        outputs = run()
        pipe.send(time.perf_counter() - start)
    pipe.send((outputs, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9))


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Return ‖found − expected‖ / ‖expected‖."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def print_table(results: dict[str, Any], path: Path) -> None:
    """Print the results as a table."""
    step, exported = results["denoiser_step"], results["export"]
    print(f"\nexport           {exported['seconds']:8.1f} s, peak {exported['peak_gb']:.2f} GB")
    for what, size in exported["bytes"].items():
        print(f"{what:<30} {size / 1e6:8.1f} MB")
    for name in ("pytorch_eager", "onnxruntime"):
        print(f"{name:<16} {step[name]['p50']:8.2f} s a step (p50), peak {step[name]['peak_gb']:.2f} GB")
    for name, error in step["relative_error"].items():
        print(f"{name:<22} relative error {error:.1e}")
    print(path)


if __name__ == "__main__":
    sys.exit(main())
