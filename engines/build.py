"""`python -m engines.build BUNDLE --target ...`: the engines of a bundle, built where they can be.

On the device this needs TensorRT and NumPy only: graphs for older TensorRT versions lie in the bundle already.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from engines.builder import REFITTED, EnginePlan, build_engines
from engines.store import SharedStore
from engines.targets import EngineTarget, Machine, listed, parse_targets, resolve
from engines.tensorrt import EngineOptions
from moma_rt.bundle.manifest import read_manifest
from moma_rt.errors import InputError, print_output, run_command

PROGRAM = "engines.build"
AUTO, OFF = "auto", "off"
# Of what a network is at, on a terminal: a line that wraps cannot be replaced.
_SHOWN = 56


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog=f"python -m {PROGRAM}",
        description="Build the engines of an exported bundle. Those that are finished are kept, so an interrupted "
        "build continues where it stopped. On the device itself this needs tensorrt and numpy only.",
    )
    p.add_argument("bundle", type=Path, metavar="BUNDLE", help="the folder that python -m export.build made")
    add_engine_options(p, default="local")
    p.add_argument("--only", metavar="NETWORKS", help="engines of these networks only, separated by commas")
    return p


def add_engine_options(p: argparse.ArgumentParser, default: str) -> None:
    """The options that both builds have."""
    p.add_argument(
        "--target",
        default=default,
        metavar="TARGETS",
        help="separated by commas: cpu (the ONNX files, nothing to build); sm75, sm86, sm89, sm120, sm121, or rtx for "
        "all but the first (TensorRT-RTX, on any machine); local, or sm80, sm87, sm90, ... (TensorRT, on such a "
        "device); inductor (PyTorch, for this machine's GPU or else its CPU), inductor:sm80, inductor:sm90, ... (for "
        "such a GPU, on any machine), both with export.build; default: %(default)s",
    )
    p.add_argument(
        "--store",
        type=Path,
        metavar="DIR",
        help="where finished graphs, weights and engines are shared between bundles; default: .store beside the bundle",
    )
    p.add_argument("--refittable", action="store_true", help="engines whose weights can be replaced (TensorRT)")
    p.add_argument(
        "--refit-from", type=Path, metavar="BUNDLE", help="give refittable engines of this bundle the new weights"
    )
    p.add_argument(
        "--plugins",
        choices=(AUTO, OFF),
        default=AUTO,
        help="the bundle's own kernels, as TensorRT's plugins: auto, where it can take them, or off "
        "(default: %(default)s)",
    )
    p.add_argument("--layers", action="store_true", help="also write each engine's layers.json (on a device)")


def engine_plan(
    options: argparse.Namespace, names: tuple[str, ...] | None, targets: tuple[EngineTarget, ...]
) -> EnginePlan:
    """What the options of `add_engine_options` ask for, of the targets that this machine is to build for.

    Raises:
        InputError: layers, where there is no device.
        BundleError: no bundle to refit from.
    """
    if options.layers and Machine.here().device is None:
        raise InputError("--layers: an engine's layers can be listed only where there is an NVIDIA GPU")
    if options.refit_from is not None:
        read_manifest(options.refit_from)
    engine_options = EngineOptions(options.refittable, options.layers)
    return EnginePlan(targets, names, engine_options, options.refit_from, options.plugins == AUTO)


def shared_store(options: argparse.Namespace, out: Path) -> SharedStore:
    """The store that the options name."""
    return SharedStore(options.store if options.store is not None else out.resolve().parent / ".store")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = parser().parse_args(arguments)
    return run_command(PROGRAM, lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    names = None
    if options.only is not None:
        names = listed("--only", "network", options.only, tuple(read_manifest(options.bundle).networks))
    plan = engine_plan(options, names, resolve(parse_targets(options.target), Machine.here()))
    bundle = build_engines(options.bundle, plan, shared_store(options, options.bundle), _report)
    print_output(f"{options.bundle}: {len(bundle.manifest.engines)} engines")
    return 0


def _report(name: str, state: str) -> None:
    """A line a network; on a terminal also what is being done, on a line that the next one replaces."""
    is_terminal = sys.stderr.isatty()
    erase = "\r\033[K" if is_terminal else ""
    if state.startswith(("kept", "built", REFITTED, "note")):
        print(f"{erase}{name:<18} {state}", file=sys.stderr)
    elif is_terminal:
        print(f"{erase}{name}: {state[:_SHOWN]}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
