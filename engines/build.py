"""Build the engines of a bundle: `python -m engines.build BUNDLE --target ...`.

Needs only TensorRT, NumPy and filelock on the target: the bundle already holds graphs for older TensorRT versions.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from engines.builder import REFITTED, EnginePlan, build_engines
from engines.store import SharedStore
from engines.targets import EngineTarget, Machine, parse_list, parse_targets, resolve
from engines.tensorrt import EngineOptions
from moma_rt.bundle.manifest import read_manifest
from moma_rt.errors import InputError, print_output, run_command

PROGRAM = "engines.build"
AUTO, OFF = "auto", "off"
# Progress on a terminal is cut to this length, since a line that wraps cannot be overwritten.
_STATE_LENGTH = 56


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog=f"python -m {PROGRAM}",
        description="Build the engines of an exported bundle. Finished engines are kept, so an interrupted build "
        "continues where it stopped. On the target device this needs only tensorrt, numpy and filelock.",
    )
    p.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder that python -m export.build wrote")
    add_engine_options(p, default="local")
    p.add_argument("--only", metavar="NETWORKS", help="build engines of these networks only, separated by commas")
    return p


def add_engine_options(p: argparse.ArgumentParser, default: str) -> None:
    """Add the options that `engines.build` and `export.build` share."""
    p.add_argument(
        "--target",
        default=default,
        metavar="TARGETS",
        help="what to build for, separated by commas: cpu (ONNX Runtime; nothing to build); sm75, sm86, sm89, sm120, "
        "sm121, or rtx for all of these but sm75 (TensorRT-RTX; on any machine); local, or sm80, sm87, sm90, ... "
        "(TensorRT; only on such a device); inductor (PyTorch; for this machine's GPU, or its CPU if it has none), or "
        "inductor:sm80, inductor:sm90, ... (PyTorch; for such a GPU, on any machine), both only with export.build; "
        "default: %(default)s",
    )
    p.add_argument(
        "--store",
        type=Path,
        metavar="DIR",
        help="folder through which bundles share finished graphs, weights and engines; default: .store beside the "
        "bundle",
    )
    p.add_argument(
        "--refittable", action="store_true", help="build engines whose weights can be replaced later (TensorRT only)"
    )
    p.add_argument(
        "--refit-from",
        type=Path,
        metavar="BUNDLE",
        help="put the new weights into refittable engines of this bundle, instead of compiling (TensorRT only)",
    )
    p.add_argument(
        "--plugins",
        choices=(AUTO, OFF),
        default=AUTO,
        help="whether TensorRT uses the bundle's own attention kernels as plugins: auto (where it can) or off "
        "(default: %(default)s)",
    )
    p.add_argument("--layers", action="store_true", help="also write each engine's layers to layers.json (needs a GPU)")


def engine_plan(
    options: argparse.Namespace, names: tuple[str, ...] | None, targets: tuple[EngineTarget, ...]
) -> EnginePlan:
    """Turn the options of `add_engine_options` into a plan; `targets` are those that this machine builds for.

    Raises:
        InputError: `--layers` on a machine without a GPU.
        BundleError: `--refit-from` names no bundle.
    """
    if options.layers and Machine.here().device is None:
        raise InputError("--layers: an engine's layers can be listed only on a machine with an NVIDIA GPU")
    if options.refit_from is not None:
        read_manifest(options.refit_from)
    engine_options = EngineOptions(options.refittable, options.layers)
    return EnginePlan(targets, names, engine_options, options.refit_from, options.plugins == AUTO)


def shared_store(options: argparse.Namespace, out: Path) -> SharedStore:
    """Return the store that the options name, by default `.store` beside the bundle at `out`."""
    return SharedStore(options.store if options.store is not None else out.resolve().parent / ".store")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = parser().parse_args(arguments)
    return run_command(PROGRAM, lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    names = None
    if options.only is not None:
        names = parse_list("--only", "network", options.only, tuple(read_manifest(options.bundle).networks))
    plan = engine_plan(options, names, resolve(parse_targets(options.target), Machine.here()))
    bundle = build_engines(options.bundle, plan, shared_store(options, options.bundle), _report)
    print_output(f"{options.bundle}: {len(bundle.manifest.engines)} engines")
    return 0


def _report(name: str, state: str) -> None:
    """Print one line per network, and on a terminal its progress, each line of which overwrites the one before."""
    is_terminal = sys.stderr.isatty()
    erase = "\r\033[K" if is_terminal else ""
    if state.startswith(("kept", "built", REFITTED, "note")):
        print(f"{erase}{name:<18} {state}", file=sys.stderr)
    elif is_terminal:
        print(f"{erase}{name}: {state[:_STATE_LENGTH]}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
