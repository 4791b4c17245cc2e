"""`python -m engines.build BUNDLE --target ...`: the engines of a bundle, built where they can be.

On the device this needs TensorRT and NumPy only: graphs for older TensorRT versions lie in the bundle already.
"""

import argparse
import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from engines.store import ENGINES_FOLDER, Artifact, Notes, SharedStore, Store, Stored
from engines.targets import EngineTarget, Machine, listed, parse_targets, resolve
from engines.tensorrt import (
    ENGINE_NAME,
    LAYERS_NAME,
    EngineFacts,
    EngineOptions,
    EngineRequest,
    build_engine,
    check_options,
    refit_engine,
    version_tuple,
)
from moma_rt.bundle import Bundle, Manifest, NetworkEntry, read_manifest, write_manifest
from moma_rt.engines import EngineEntry, Flavour
from moma_rt.errors import BundleError, InputError, print_output, run_command
from moma_rt.files import sha256_file
from moma_rt.libraries import library_version
from moma_rt.specs import Geometry, Precision

PROGRAM = "engines.build"
REFITTED = "refitted"
# The first TensorRT whose parser knows ONNX's Attention.
_ATTENTION_SINCE = (10, 15)
# The narrowest head for which TensorRT has a fused attention.
_FUSED_HEAD_WIDTH = 16
# Of what a network is at, on a terminal: a line that wraps cannot be replaced.
_SHOWN = 56

Report = Callable[[str, str], None]


@dataclass(frozen=True)
class EnginePlan:
    """Which engines to build: of which networks (None: all), for which targets.

    `refit_from` is a bundle whose engines are to be given this bundle's weights where the library can do that.
    """

    targets: tuple[EngineTarget, ...]
    names: tuple[str, ...] | None = None
    options: EngineOptions = EngineOptions()
    refit_from: Path | None = None


def build_engines(root: Path, plan: EnginePlan, shared: SharedStore | None, report: Report) -> Bundle:
    """Build the engines that the bundle at `root` lacks, and name them in its manifest.

    Args:
        report: called with a network's name and what is being done for it.

    Raises:
        BundleError: no bundle, an altered file, or a network that the library cannot compile.
        InputError: an option that the library does not have, or a folder that cannot be written.
    """
    versions = {target: library_version(target.flavour) for target in plan.targets}
    for target, version in versions.items():
        check_options(target.flavour, version, plan.options)
    store = Store(root, shared)
    read_manifest(root)
    with store.locked():
        # Again: what was read before may be of the build that held the lock.
        before = read_manifest(root)
        manifest = _without_lost_engines(root, before)
        if manifest != before:
            write_manifest(root, manifest)
        bundle = Bundle.open(root)
        names = plan.names if plan.names is not None else tuple(manifest.networks)
        for target in plan.targets:
            builder = _Builder(bundle, target, versions[target], plan, store, report)
            for name in names:
                manifest = builder.add(bundle.network(name), manifest)
        write_manifest(root, manifest)
        store.remove_unused(manifest)
    return Bundle.open(root)


def _without_lost_engines(root: Path, manifest: Manifest) -> Manifest:
    """The manifest without engines whose files are gone or cut: on a device they can be built again."""

    def is_whole(name: str) -> bool:
        path, file = Bundle(root, manifest).path(name), manifest.files.get(name)
        return file is not None and path.is_file() and path.stat().st_size == file.size

    return _with_engines(manifest, [engine for engine in manifest.engines if is_whole(engine.file)])


def _with_engines(manifest: Manifest, engines: Iterable[EngineEntry]) -> Manifest:
    """The manifest with these engines alone, in order, and without the files of those that are not among them."""
    order = list(manifest.networks)
    kept = sorted(engines, key=lambda e: (order.index(e.network), e.flavour.value, e.capabilities))
    gone = {e.folder for e in manifest.engines} - {e.folder for e in kept}
    files = {name: file for name, file in manifest.files.items() if str(PurePosixPath(name).parent) not in gone}
    return dataclasses.replace(manifest, engines=tuple(kept), files=files)


def wants_lowered(flavour: Flavour, version: str, precision: Precision, geometry: Geometry) -> bool:
    """Whether a library needs the graph without `Attention`, since it does not know it or has no kernel for it."""
    if flavour is Flavour.TENSORRT and version_tuple(version)[:2] < _ATTENTION_SINCE:
        return True
    narrowest = min(layer.channels // layer.heads for layer in geometry.self_attention)
    return precision is Precision.FP32 or narrowest < _FUSED_HEAD_WIDTH


@dataclass(frozen=True)
class _Builder:
    """Builds the engines of one target."""

    bundle: Bundle
    target: EngineTarget
    version: str
    plan: EnginePlan
    store: Store
    report: Report

    def add(self, network: NetworkEntry, manifest: Manifest) -> Manifest:
        """The manifest with an engine of `network`, built now if there was none."""
        name = network.spec.name
        served = [engine for engine in manifest.engines if self._serves(engine, network)]
        self.report(name, "checking")
        if served and self.store.find(self._artifact(network, served[0].key)) is not None:
            self.report(name, f"kept for {self.target}")
            return manifest
        lowered = wants_lowered(self.target.flavour, self.version, network.precision, self.bundle.manifest.geometry)
        onnx = network.lowered if lowered else network.onnx
        artifact = self._artifact(network, self._key(network, onnx))
        stored = self.store.find(artifact)
        if stored is not None:
            self.report(name, f"kept for {self.target}: another bundle had it")
        else:
            start = time.monotonic()
            self.bundle.verified(f for f in network.all_files if f not in {network.onnx, network.lowered} - {onnx})
            stored = self.store.add(artifact, self._writer(network, self._request(network, onnx)))
            self.report(name, f"{stored.notes['how']} for {self.target} in {time.monotonic() - start:.1f} s")
        return self._with(manifest, network, artifact, stored)

    def _serves(self, engine: EngineEntry, network: NetworkEntry) -> bool:
        return (
            (engine.network, engine.source) == (network.spec.name, network.key)
            and engine.refittable >= self.plan.options.refittable
            and (not self.plan.options.layers or f"{engine.folder}/{LAYERS_NAME}" in self.bundle.manifest.files)
            and all(engine.serves(self.target.flavour, self.version, c) for c in self.target.capabilities)
        )

    def _artifact(self, network: NetworkEntry, key: str) -> Artifact:
        return Artifact(ENGINES_FOLDER, network.spec.name, key)

    def _key(self, network: NetworkEntry, onnx: str) -> str:
        """Names what an engine is: the graph and weights, what compiled them, and for what."""
        files, options = self.bundle.manifest.files, self.plan.options
        weights = [files[name].sha256 for name in network.files if name not in (network.onnx, network.lowered)]
        identity = {
            "graph": files[onnx].sha256,
            "weights": weights,
            "network": network.spec.to_json(),
            "library": [self.target.flavour.value, self.version],
            "capabilities": self.target.capabilities,
            "options": [options.refittable, options.layers],
            "code": sha256_file(Path(__file__).with_name("tensorrt.py")),
            # What a refitting gave is not what compiling gives.
            "refitted": self.plan.refit_from is not None and self.target.flavour is Flavour.TENSORRT,
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def _request(self, network: NetworkEntry, onnx: str) -> EngineRequest:
        options = self.plan.options
        if self.target.flavour is Flavour.TENSORRT and self.store.shared is not None:
            place = self.store.shared.root / f"timing-{self.version}-sm{self.target.capabilities[0]}.cache"
            options = dataclasses.replace(options, timing_cache=place)
        return EngineRequest(
            self.target.flavour, self.target.capabilities, self.bundle.path(onnx), network.spec, options
        )

    def _writer(self, network: NetworkEntry, request: EngineRequest) -> Callable[[Path], Notes]:
        """What fills an engine's folder, by refitting where that was asked for and is possible."""
        name = network.spec.name

        def build(folder: Path) -> Notes:
            self.report(name, "compiling")
            facts = build_engine(request, folder, lambda text: self.report(name, text))
            self.report(name, "hashing")
            return {"how": "built", **dataclasses.asdict(facts)}

        if self.plan.refit_from is None:
            return build
        if self.target.flavour is Flavour.TENSORRT_RTX:
            self.report(name, "note: TensorRT-RTX cannot refit ahead of time, so it is built anew")
            return build
        donor = self._donor(network, self.plan.refit_from)
        if donor is None:
            self.report(name, f"note: {self.plan.refit_from} has no refittable engine of it, so it is built anew")
            return build
        engine, file = donor

        def refit(folder: Path) -> Notes:
            self.report(name, "refitting")
            try:
                refit_engine(self.target.flavour, file, request.onnx, folder)
            except BundleError as error:
                self.report(name, f"note: {error}; it is built anew")
                return build(folder)
            return {"how": REFITTED, **dataclasses.asdict(EngineFacts(engine.weight_bytes, engine.activation_bytes))}

        return refit

    def _donor(self, network: NetworkEntry, root: Path) -> tuple[EngineEntry, Path] | None:
        """An engine of another bundle that differs from the one wanted in nothing but its weights."""
        bundle = Bundle.open(root)
        other = bundle.manifest.networks.get(network.spec.name)
        if other is None or (other.spec, other.precision) != (network.spec, network.precision):
            return None
        for engine in bundle.manifest.engines:
            if engine.refittable and self._serves(dataclasses.replace(engine, source=network.key), network):
                bundle.verified([engine.file])
                return engine, bundle.path(engine.file)
        return None

    def _with(self, manifest: Manifest, network: NetworkEntry, artifact: Artifact, stored: Stored) -> Manifest:
        """The manifest with an engine in place of those it supersedes."""
        name = network.spec.name
        entry = EngineEntry(
            network=name,
            flavour=self.target.flavour,
            version=self.version,
            capabilities=self.target.capabilities,
            # What was refitted can be again, whether or not that was asked for.
            refittable=self.plan.options.refittable or stored.notes["how"] == REFITTED,
            source=network.key,
            key=artifact.key,
            file=stored.path(ENGINE_NAME),
            weight_bytes=stored.notes["weight_bytes"],
            activation_bytes=stored.notes["activation_bytes"],
        )
        kept = [
            engine
            for engine in manifest.engines
            if (engine.network, engine.flavour) != (name, self.target.flavour)
            or not set(engine.capabilities) <= set(self.target.capabilities)
        ]
        found = _with_engines(manifest, [*kept, entry])
        return dataclasses.replace(found, files=dict(sorted({**found.files, **stored.files}.items())))


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
        "device); default: %(default)s",
    )
    p.add_argument(
        "--store",
        type=Path,
        metavar="DIR",
        help="where finished networks and engines are shared between bundles; default: .store beside the bundle",
    )
    p.add_argument("--refittable", action="store_true", help="engines whose weights can be replaced (TensorRT)")
    p.add_argument(
        "--refit-from", type=Path, metavar="BUNDLE", help="give refittable engines of this bundle the new weights"
    )
    p.add_argument("--layers", action="store_true", help="also write each engine's layers.json (on a device)")


def engine_plan(options: argparse.Namespace, names: tuple[str, ...] | None) -> EnginePlan:
    """What the options of `add_engine_options` ask for.

    Raises:
        InputError: a target that cannot be built on this machine.
        BundleError: no bundle to refit from.
    """
    machine = Machine.here()
    targets = resolve(parse_targets(options.target), machine)
    if options.layers and machine.device is None:
        raise InputError("--layers: an engine's layers can be listed only where there is an NVIDIA GPU")
    if options.refit_from is not None:
        read_manifest(options.refit_from)
    return EnginePlan(targets, names, EngineOptions(options.refittable, options.layers), options.refit_from)


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
    plan = engine_plan(options, names)
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
