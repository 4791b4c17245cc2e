"""`python -m export.compare BUNDLE`: compare each network, as the bundle runs it, with PyTorch in fp32.

The reference uses the checkpoints that the bundle was made from, so they must be given again (random weights are
generated again). Engines that this machine can run are compared too.
"""

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from engines.targets import parse_list
from export.build import add_checkpoint_options, checkpoint_of
from export.sample_inputs import sample_inputs, usual_sizes
from moma_rt.backends.base import Array
from moma_rt.backends.device import local_device
from moma_rt.backends.libraries import is_installed, library_version
from moma_rt.bundle.engines import CPU_DEVICE
from moma_rt.bundle.manifest import Bundle, NetworkEntry
from moma_rt.bundle.specs import NetworkSpec, Precision
from moma_rt.errors import CheckpointError, InputError, print_output, run_command
from moma_rt.messages import warn

if TYPE_CHECKING:
    from export.checkpoints.model import Checkpoint

PROGRAM = "export.compare"
_EPILOG = """\
example:
  python -m export.build --base tiny && python -m export.compare bundles/tiny
      one line per network and backend: the worst output, its relative L2 error and its largest absolute error
"""
_RANDOM = re.compile(r"random weights, seed (\d+)( of \w+)?")

Arrays = dict[str, Array]


@dataclass(frozen=True)
class Difference:
    """The error of one tensor against its reference.

    `relative` is ‖found − expected‖ / ‖expected‖; `tolerance` is the largest absolute difference, the smallest
    tolerance that passes; `at` is its index.
    """

    tensor: str
    relative: float
    tolerance: float
    at: tuple[int, ...]

    def __str__(self) -> str:
        return (
            f"{self.tensor}{list(self.at)} is worst: relative error {self.relative:.1e}, "
            f"passes with a tolerance of {self.tolerance:.1e}"
        )


def difference(name: str, found: Array, expected: Array) -> Difference:
    """Compare two arrays of the same shape; a value that is not finite has an infinite error."""
    if found.shape != expected.shape:
        raise ValueError(f"{name} has shape {found.shape}, its reference {expected.shape}")
    wanted = expected.astype(np.float64)
    apart = np.abs(found.astype(np.float64) - wanted)
    apart[np.isnan(apart)] = np.inf
    at = np.unravel_index(int(apart.argmax()), apart.shape)
    norm = float(np.linalg.norm(wanted)) or 1.0
    return Difference(name, float(np.linalg.norm(apart)) / norm, float(apart[at]), tuple(int(i) for i in at))


def worst(found: Arrays, expected: Arrays) -> Difference:
    """Return the difference of the output with the largest relative error."""
    return max((difference(name, found[name], expected[name]) for name in expected), key=lambda d: d.relative)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog=f"python -m {PROGRAM}",
        description="Run each network of a bundle on every backend of this machine and compare its outputs with "
        "PyTorch in fp32.\nGive the checkpoints as for export.build; a bundle of random weights needs none.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("bundle", type=Path, metavar="BUNDLE", help="the folder that python -m export.build made")
    add_checkpoint_options(p, base_required=False)
    p.add_argument("--only", metavar="NETWORKS", help="compare only these networks, separated by commas")
    p.add_argument(
        "--modules",
        type=int,
        default=0,
        metavar="N",
        help="also list the N modules of each network whose outputs differ most from fp32 when PyTorch runs them in "
        "the bundle's precision (default: 0)",
    )
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = parser().parse_args(arguments)
    return run_command(PROGRAM, lambda: _compare(options))


def _compare(options: argparse.Namespace) -> int:
    from export.networks import NETWORKS
    from export.torch_runs import TorchRuns

    bundle = Bundle.open(options.bundle)
    names = tuple(bundle.manifest.networks)
    if options.only is not None:
        names = parse_list("--only", "network", options.only, names)
    if options.modules < 0:
        raise InputError(f"--modules {options.modules}: give a number of modules, 0 or more")
    checkpoint = same_checkpoint(options, bundle, names)
    geometry = bundle.manifest.geometry
    for name in names:
        entry = bundle.network(name)
        spec = NETWORKS[name].spec(geometry)
        inputs = sample_inputs(spec, geometry, usual_sizes(spec))
        reference = TorchRuns(checkpoint, NETWORKS[name], geometry, inputs)
        expected, compared = reference.outputs(), False
        for runner, outputs in runs(bundle, entry, inputs):
            compared = True
            print_output(f"{name:<18} {entry.precision.value} {runner}: {worst(outputs, expected)}")
        if not compared:
            print_output(f"{name:<18} {entry.precision.value}: no backend on this machine can run it")
        if options.modules and entry.precision is not Precision.FP32:
            for path, relative in reference.module_differences(entry.precision)[: options.modules]:
                print_output(f"{'':<18} {relative:.1e} {path}")
    return 0


def runs(bundle: Bundle, entry: NetworkEntry, inputs: Arrays) -> Iterator[tuple[str, Arrays]]:
    """Yield the name of each backend that can run the network on this machine, and its outputs."""
    inputs = {t.name: inputs[t.name].astype(t.dtype, copy=False) for t in entry.spec.inputs}
    bundle.verify(entry.all_files)
    weights = tuple(map(bundle.path, entry.weights))
    if entry.onnx is not None and entry.precision is not Precision.BF16:  # ONNX Runtime has no bf16 on CPUs
        yield "onnxruntime", outputs_of("onnxruntime", entry.spec, bundle.path(entry.onnx), weights, inputs)
    device = local_device() or CPU_DEVICE
    for engine in bundle.manifest.engines:
        name = engine.flavour.value
        if engine.network != entry.spec.name or device.capability not in engine.capabilities:
            continue
        if not is_installed(engine.flavour.module) or library_version(engine.flavour) != engine.version:
            warn(f"{engine.file} was built by {name} {engine.version}, which is not installed here: not compared")
            continue
        bundle.verify([engine.file])
        read = weights if engine.flavour.reads_weights else ()
        outputs = outputs_of(name, entry.spec, bundle.path(engine.file), read, inputs)
        yield f"{name} {engine.version} on {device.name}", outputs


def outputs_of(backend: str, spec: NetworkSpec, path: Path, weights: Sequence[Path], inputs: Arrays) -> Arrays:
    """Run a network's graph or engine, with the weights that it reads, on one of the runtime's backends."""
    from moma_rt.backends import create
    from moma_rt.memory.networks import run_once

    created = create(backend)
    return run_once(created, created.load(spec, path, weights), inputs)


def same_checkpoint(options: argparse.Namespace, bundle: Bundle, names: tuple[str, ...]) -> "Checkpoint":
    """Load the checkpoint that the bundle was made from.

    Raises:
        CheckpointError: the checkpoint was not given, or is a different one.
    """
    from export.checkpoints.model import roles_for

    needed = [source for source in bundle.manifest.sources if source.role in roles_for(names)]
    if options.base is None:
        seeds = {match[1] if (match := _RANDOM.fullmatch(source.name)) else None for source in needed}
        options.base = bundle.manifest.base
        # The trained weights of mini lie in the repository; whether the bundle is made of them is compared below.
        if options.base != "mini" or seeds != {None}:
            if len(seeds) != 1 or None in seeds:
                given = ", ".join(f"{source.role} from {source.name}" for source in needed)
                raise CheckpointError(f"{bundle.root} was made of {given}: give them again, as for export.build")
            options.weights = None if options.base == "tiny" else "random"
            options.seed = int(seeds.pop())
    checkpoint = checkpoint_of(options, names)
    found = {component.role: component.sha256 for component in checkpoint.components}
    for source in needed:
        if found.get(source.role) != source.sha256:
            raise CheckpointError(
                f"the {source.role} weights given are not those of {bundle.root}, which is made of {source.name} "
                f"({source.sha256[:12]})"
            )
    return checkpoint


if __name__ == "__main__":
    sys.exit(main())
