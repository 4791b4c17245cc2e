"""Pack a bundle for one target: `python -m engines.pack BUNDLE --target T --out DIR`."""

import argparse
import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from engines.store import link_or_copy, partial_folder
from engines.targets import CPU, INDUCTOR, LOCAL, RTX, RTX_TARGETS, parse_targets
from moma_rt.bundle.engines import EngineEntry, Flavour, format_capabilities
from moma_rt.bundle.footprint import format_bytes
from moma_rt.bundle.manifest import (
    LANGUAGE_TOKENIZER,
    MANIFEST_NAME,
    TEXT_TOKENIZER,
    Bundle,
    Manifest,
    write_manifest,
)
from moma_rt.errors import BundleError, InputError, print_output, run_command
from moma_rt.files import PARTIAL_PREFIX, entries, move, remove_tree, sync

PROGRAM = "engines.pack"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog=f"python -m {PROGRAM}",
        description="Write a bundle that holds only what one target needs, with the same hashes. Its files are hard "
        "links to those of BUNDLE, or copies where the file system allows no links.",
    )
    p.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder that python -m export.build wrote")
    p.add_argument(
        "--target",
        required=True,
        metavar="TARGET",
        help=f"what to pack for: {CPU} (ONNX Runtime, on a CPU or a GPU); {RTX}, or one of its capabilities, such as "
        f"sm86; sm80, sm90, ... (TensorRT); {INDUCTOR}, or {INDUCTOR}:sm90",
    )
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write; must be new or empty")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = parser().parse_args(arguments)
    return run_command(PROGRAM, lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    bundle = Bundle.open(options.bundle)
    packed = pack(bundle, options.target, options.out)
    before, after = (sum(f.size for f in b.manifest.files.values()) for b in (bundle, packed))
    left_out = "; ".join(packed.manifest.left_out) or "nothing"
    print_output(f"{options.out}: {format_bytes(after)} of {format_bytes(before)}; left out: {left_out}")
    return 0


def pack(bundle: Bundle, target: str, out: Path) -> Bundle:
    """Write a bundle to `out` that holds what `target` needs of `bundle`.

    All files are hashed first, and the manifest appears last: without it, `out` is no bundle. Links are followed.

    Raises:
        InputError: `target` is unknown or several targets, or `out` is not empty or cannot be written.
        BundleError: the bundle lacks something that the target needs, or a file was altered.
    """
    manifest = packed_manifest(bundle, target)
    bundle.verify(manifest.files)
    try:
        with _new_folder(out) as partial:
            for name in manifest.files:
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                link_or_copy(bundle.path(name), partial / name)
            write_manifest(partial, manifest)
    except OSError as error:
        gone = [name for name in manifest.files if not os.path.isfile(bundle.path(name))]
        if gone:
            raise InputError(f"{bundle.root} changed while it was packed: {gone[0]} is gone; try again") from None
        raise InputError(f"--out {out}: cannot be written: {error.strerror or error}") from None
    return Bundle.open(out)


@contextlib.contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder in `out`, and move what it then holds to `out`; after an error, leave `out` as it was.

    Raises:
        InputError: `out` holds other files.
    """
    is_new = not out.is_dir()
    if not is_new:
        found = entries(out)
        if any(not path.name.startswith(PARTIAL_PREFIX) for path in found):
            raise InputError(f"--out {out}: holds other files; give a new or an empty folder")
        for path in found:
            remove_tree(path)
    out.mkdir(parents=True, exist_ok=True)
    moved: list[Path] = []
    try:
        # Inside, since `out` may be the root of a file system.
        with partial_folder(out) as partial:
            yield partial
            for path in sorted(entries(partial), key=lambda path: path.name == MANIFEST_NAME):
                moved.append(out / path.name)
                move(path, moved[-1], MANIFEST_NAME)
        sync(out)
    except BaseException:
        for path in moved:
            remove_tree(path)
        with contextlib.suppress(OSError):
            if is_new:
                out.rmdir()
        raise


def packed_manifest(bundle: Bundle, target: str) -> Manifest:
    """Return the manifest of what a target needs of a bundle.

    Raises:
        InputError: `target` is unknown or several targets.
        BundleError: the bundle lacks a network's engine for the target, or its graph.
    """
    (name, *others) = parse_targets(target)
    if others or name == LOCAL:
        raise InputError(f"--target {target!r}: a bundle is packed for one target by its name, such as sm86")
    manifest = bundle.manifest
    engines: tuple[EngineEntry, ...] = ()
    if name == CPU:
        for network in manifest.networks:
            bundle.graph(network)
    else:
        engines = tuple(_engines_for(name, manifest))
        covered = [_networks_covered(engine, engines) for engine in engines]
        most = max(covered, key=lambda networks: len(networks), default=set[str]())
        if missing := sorted(manifest.networks.keys() - most):
            raise BundleError(
                f"{bundle.root} has no engine of {', '.join(missing)} for {name}: build them first, or pack for "
                "another target"
            )
    keeps_graphs, keeps_weights = name == CPU, name == CPU or any(e.flavour.reads_weights for e in engines)
    networks = {
        network: dataclasses.replace(
            entry,
            onnx=entry.onnx if keeps_graphs else None,
            lowered=None,
            weights=entry.weights if keeps_weights else (),
        )
        for network, entry in manifest.networks.items()
    }
    kept = {file for entry in networks.values() for file in entry.all_files}
    folders = {engine.folder for engine in engines}
    kept |= {file for file in manifest.files if str(PurePosixPath(file).parent) in folders}
    kept |= {TEXT_TOKENIZER, LANGUAGE_TOKENIZER}
    packed = dataclasses.replace(
        manifest,
        networks=networks,
        engines=engines,
        kernels=(),
        files={file: entry for file, entry in manifest.files.items() if file in kept},
        packed_for=name,
    )
    return dataclasses.replace(packed, left_out=(*manifest.left_out, *_left_out(manifest, packed)))


def _engines_for(target: str, manifest: Manifest) -> list[EngineEntry]:
    """Return a target's engines, without those whose library version and devices do not cover every network.

    If that leaves none, return all.
    """
    found = [engine for engine in manifest.engines if _is_for(engine, target)]
    complete = [engine for engine in found if _networks_covered(engine, found) == manifest.networks.keys()]
    return complete or found


def _networks_covered(engine: EngineEntry, engines: Iterable[EngineEntry]) -> set[str]:
    """Return the networks that have an engine of the same library version for all devices of `engine`."""
    return {
        other.network
        for other in engines
        if all(other.serves(engine.flavour, engine.version, capability) for capability in engine.capabilities)
    }


def _is_for(engine: EngineEntry, target: str) -> bool:
    """Return whether a target uses this engine."""
    kind, _, capability = target.rpartition(":")
    is_package = engine.flavour is Flavour.INDUCTOR
    if target == INDUCTOR or kind == INDUCTOR:
        return is_package and (target == INDUCTOR or int(capability.removeprefix("sm")) in engine.capabilities)
    wanted = RTX_TARGETS if target == RTX else (int(target.removeprefix("sm")),)
    return not is_package and not set(engine.capabilities).isdisjoint(wanted)


def _left_out(whole: Manifest, packed: Manifest) -> list[str]:
    """Describe what a packed bundle lacks, one readable phrase each."""
    lines = []
    if any(entry.onnx for entry in whole.networks.values()) and not packed.has_graphs:
        lines.append("ONNX graphs")
    if any(entry.lowered for entry in whole.networks.values()):
        lines.append("graphs for TensorRT 10.3")
    if any(entry.weights for entry in whole.networks.values()) and not any(e.weights for e in packed.networks.values()):
        lines.append("weights files")
    if whole.kernels:
        lines.append(f"kernels for {format_capabilities(sorted({kernels.capability for kernels in whole.kernels}))}")
    gone = [engine for engine in whole.engines if engine not in packed.engines]
    lines += sorted(
        {f"engines of {e.flavour.value} {e.version} for {format_capabilities(e.capabilities)}" for e in gone}
    )
    return lines


if __name__ == "__main__":
    sys.exit(main())
