"""`python -m engines.build BUNDLE --target ...`: the engines of a bundle, built where they can be.

On the device this needs TensorRT and NumPy only: graphs for older TensorRT versions lie in the bundle already.
"""

import argparse
import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from engines.entries import with_engine, without_lost_engines
from engines.plugins import NetworkKernels, choose, code_hash
from engines.store import ENGINES_FOLDER, Artifact, Notes, SharedStore, Store, Stored
from engines.targets import INDUCTOR, EngineTarget, Machine, listed, parse_targets, resolve
from engines.tensorrt import (
    ENGINE_NAME,
    LAYERS_NAME,
    EngineFacts,
    EngineOptions,
    EngineRequest,
    build_engine,
    check_options,
    refit_engine,
)
from moma_rt.backends.libraries import library_version, version_tuple
from moma_rt.bundle.engines import EngineEntry, Flavour
from moma_rt.bundle.manifest import WEIGHTS_FOLDER, Bundle, Manifest, NetworkEntry, read_manifest, write_manifest
from moma_rt.bundle.specs import Geometry, Precision
from moma_rt.errors import BundleError, InputError, print_output, run_command
from moma_rt.files import sha256_file

PROGRAM = "engines.build"
REFITTED = "refitted"
AUTO, OFF = "auto", "off"
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

    `refit_from` is a bundle whose engines are to be given this bundle's weights where the library can do that;
    `plugins`: TensorRT is to take the bundle's own kernels where it can.
    """

    targets: tuple[EngineTarget, ...]
    names: tuple[str, ...] | None = None
    options: EngineOptions = EngineOptions()
    refit_from: Path | None = None
    plugins: bool = True


def build_engines(root: Path, plan: EnginePlan, shared: SharedStore | None, report: Report) -> Bundle:
    """Build the engines that the bundle at `root` lacks, and name them in its manifest.

    Args:
        report: called with a network's name and what is being done for it.

    Raises:
        BundleError: no bundle, an altered file, or a network that the library cannot compile.
        InputError: a library that has no part in it, an option that it does not have, or a folder that cannot be
            written.
    """
    if any(target.flavour is Flavour.INDUCTOR for target in plan.targets):
        raise InputError(
            f"--target {INDUCTOR}: its engines are compiled of the checkpoints' configurations and not of ONNX files: "
            f"build them with python -m export.build ... --target {INDUCTOR}"
        )
    versions = {target: library_version(target.flavour) for target in plan.targets}
    for target, version in versions.items():
        check_options(target.flavour, version, plan.options)
    store = Store(root, shared)
    refuse_packed(read_manifest(root), root)
    with store.locked():
        # Again: what was read before may be of the build that held the lock.
        before = read_manifest(root)
        manifest = without_lost_engines(root, before)
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


def refuse_packed(manifest: Manifest, root: Path) -> None:
    """Refuse to build into a bundle of which something was left out.

    Raises:
        InputError: it was packed for a target.
    """
    if manifest.packed_for:
        raise InputError(f"{root} was packed for {manifest.packed_for}: build in the whole bundle, and pack that again")


def wants_lowered(flavour: Flavour, version: str, precision: Precision, geometry: Geometry) -> bool:
    """Whether a library needs the graph without `Attention`, since it does not know it or has no kernel for it."""
    if flavour is Flavour.TENSORRT and version_tuple(version)[:2] < _ATTENTION_SINCE:
        return True
    narrowest = min(layer.channels // layer.heads for layer in geometry.self_attention)
    return precision is Precision.FP32 or narrowest < _FUSED_HEAD_WIDTH


@dataclass(frozen=True)
class _Work:
    """What an engine is compiled of: a network, one of its two graphs, and the kernels that take its operators."""

    network: NetworkEntry
    onnx: str
    kernels: NetworkKernels | None

    @property
    def name(self) -> str:
        return self.network.spec.name

    @property
    def kernels_hash(self) -> str | None:
        return self.kernels.sha256 if self.kernels is not None else None

    @property
    def read_files(self) -> list[str]:
        """The graph and its weights."""
        return [self.onnx, *self.network.weights]


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
        self.report(name, "checking")
        work, explain_missing = self._work(network)
        served = [engine for engine in manifest.engines if self._serves(engine, work)]
        if served and self.store.find(self._artifact(name, served[0].key)) is not None:
            self.report(name, f"kept for {self.target}")
            return manifest
        if explain_missing:
            self.report(name, f"note: its own kernels are not used for {self.target}: {explain_missing}")
        artifact = self._artifact(name, self._key(work))
        stored = self.store.find(artifact)
        if stored is not None:
            self.report(name, f"kept for {self.target}: another bundle had it")
        else:
            start = time.monotonic()
            self.bundle.verified(work.read_files)
            stored = self.store.add(artifact, self._writer(work))
            self.report(name, f"{stored.notes['how']} for {self.target} in {time.monotonic() - start:.1f} s")
        return self._with(manifest, work, artifact, stored)

    def _work(self, network: NetworkEntry) -> tuple[_Work, str]:
        """What to compile, and why the bundle's kernels for it are not in it, where that is to be said."""
        kernels, explain_missing = None, ""
        if self.plan.plugins:
            # TensorRT, which alone takes them, builds for one capability.
            capability = self.target.capabilities[0]
            kernels, explain_missing = choose(self.bundle, network, self.target.flavour, self.version, capability)
        geometry = self.bundle.manifest.geometry
        # With its operators' kernels, the full graph has no `Attention` left: that stands in their functions alone.
        lowered = kernels is None and wants_lowered(self.target.flavour, self.version, network.precision, geometry)
        graph = network.lowered if lowered else network.onnx
        if graph is None:
            why = self.bundle.manifest.explain_missing
            raise BundleError(f"{self.bundle.root} has no graph of {network.spec.name} for {self.target}, {why}")
        return _Work(network, graph, kernels), explain_missing

    def _serves(self, engine: EngineEntry, work: _Work) -> bool:
        return (
            (engine.network, engine.source, engine.kernels) == (work.name, work.network.key, work.kernels_hash)
            and engine.refittable >= self.plan.options.refittable
            and (not self.plan.options.layers or f"{engine.folder}/{LAYERS_NAME}" in self.bundle.manifest.files)
            and all(engine.serves(self.target.flavour, self.version, c) for c in self.target.capabilities)
        )

    def _artifact(self, name: str, key: str) -> Artifact:
        return Artifact(ENGINES_FOLDER, name, key)

    def _key(self, work: _Work) -> str:
        """Names what an engine is: the graph and weights, what compiled them, and for what."""
        files, options = self.bundle.manifest.files, self.plan.options
        identity = {
            "graph": files[work.onnx].sha256,
            "weights": [files[name].sha256 for name in work.network.weights],
            "network": work.network.spec.to_json(),
            "library": [self.target.flavour.value, self.version],
            "capabilities": self.target.capabilities,
            "options": [options.refittable, options.layers],
            "code": sha256_file(Path(__file__).with_name("tensorrt.py")),
            "kernels": None if work.kernels is None else [work.kernels_hash, code_hash()],
            # What a refitting gave is not what compiling gives.
            "refitted": self.plan.refit_from is not None and self.target.flavour is Flavour.TENSORRT,
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def _request(self, work: _Work) -> EngineRequest:
        options = self.plan.options
        if self.target.flavour is Flavour.TENSORRT and self.store.shared is not None:
            place = self.store.shared.root / f"timing-{self.version}-sm{self.target.capabilities[0]}.cache"
            options = dataclasses.replace(options, timing_cache=place)
        onnx, root, spec = self.bundle.path(work.onnx), self.bundle.path(WEIGHTS_FOLDER), work.network.spec
        return EngineRequest(self.target.flavour, self.target.capabilities, onnx, root, spec, options, work.kernels)

    def _writer(self, work: _Work) -> Callable[[Path], Notes]:
        """What fills an engine's folder, by refitting where that was asked for and is possible."""
        name, request = work.name, self._request(work)

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
        donor = self._donor(work, self.plan.refit_from)
        if donor is None:
            self.report(name, f"note: {self.plan.refit_from} has no refittable engine of it, so it is built anew")
            return build
        engine, file = donor

        def refit(folder: Path) -> Notes:
            self.report(name, "refitting")
            try:
                refit_engine(file, request, folder)
            except BundleError as error:
                self.report(name, f"note: {error}; it is built anew")
                return build(folder)
            return {"how": REFITTED, **dataclasses.asdict(EngineFacts(engine.weight_bytes, engine.activation_bytes))}

        return refit

    def _donor(self, work: _Work, root: Path) -> tuple[EngineEntry, Path] | None:
        """An engine of another bundle that differs from the one wanted in nothing but its weights."""
        bundle = Bundle.open(root)
        other = bundle.manifest.networks.get(work.name)
        if other is None or (other.spec, other.precision) != (work.network.spec, work.network.precision):
            return None
        for engine in bundle.manifest.engines:
            if engine.refittable and self._serves(dataclasses.replace(engine, source=work.network.key), work):
                bundle.verified([engine.file])
                return engine, bundle.path(engine.file)
        return None

    def _with(self, manifest: Manifest, work: _Work, artifact: Artifact, stored: Stored) -> Manifest:
        """The manifest with an engine in place of those it supersedes."""
        entry = EngineEntry(
            network=work.name,
            flavour=self.target.flavour,
            version=self.version,
            capabilities=self.target.capabilities,
            # What was refitted can be again, whether or not that was asked for.
            refittable=self.plan.options.refittable or stored.notes["how"] == REFITTED,
            source=work.network.key,
            key=artifact.key,
            file=stored.path(ENGINE_NAME),
            weight_bytes=stored.notes["weight_bytes"],
            activation_bytes=stored.notes["activation_bytes"],
            kernels=work.kernels_hash,
        )
        return with_engine(manifest, entry, stored)


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
