"""Builds or refits the engines that a bundle lacks, one network and one target at a time."""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from engines.entries import with_engine, without_missing_engines
from engines.plugins import NetworkKernels, choose, code_hash
from engines.store import ENGINES_FOLDER, Artifact, Notes, SharedStore, Store, Stored
from engines.targets import INDUCTOR, EngineTarget
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
from moma_rt.errors import BundleError, InputError
from moma_rt.files import sha256_file

REFITTED = "refitted"
# The first TensorRT whose parser knows ONNX's Attention.
_ATTENTION_SINCE = (10, 15)
# The narrowest head for which TensorRT has a fused attention.
_FUSED_HEAD_WIDTH = 16

Report = Callable[[str, str], None]


@dataclass(frozen=True)
class EnginePlan:
    """Which engines to build, and how.

    Attributes:
        targets: the devices to build for.
        names: the networks to build engines of; None for all.
        refit_from: a bundle whose refittable engines get this bundle's weights, where the library can do that.
        plugins: use the bundle's own attention kernels as TensorRT plugins, where possible.
    """

    targets: tuple[EngineTarget, ...]
    names: tuple[str, ...] | None = None
    options: EngineOptions = EngineOptions()
    refit_from: Path | None = None
    plugins: bool = True


def build_engines(root: Path, plan: EnginePlan, shared: SharedStore | None, report: Report) -> Bundle:
    """Build the engines that the bundle at `root` lacks, and add them to its manifest.

    Args:
        shared: a store of finished engines that bundles share, or None.
        report: called with a network's name and its current state.

    Raises:
        BundleError: `root` is not a bundle, a file of it was altered, or the library cannot compile a network.
        InputError: an inductor target, an option that the library does not have, a packed bundle, or a folder that
            cannot be written or is locked by another build.
    """
    if any(target.flavour is Flavour.INDUCTOR for target in plan.targets):
        raise InputError(
            f"--target {INDUCTOR}: its packages are compiled from PyTorch modules and not from ONNX graphs: "
            f"build them with python -m export.build ... --target {INDUCTOR}"
        )
    versions = {target: library_version(target.flavour) for target in plan.targets}
    for target, version in versions.items():
        check_options(target.flavour, version, plan.options)
    store = Store(root, shared)
    refuse_packed(read_manifest(root), root)
    with store.locked():
        # Read again: another build may have changed it before this one got the lock.
        before = read_manifest(root)
        manifest = without_missing_engines(root, before)
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
    """Refuse to build into a packed bundle, which lacks files.

    Raises:
        InputError: the bundle was packed for a target.
    """
    if manifest.packed_for:
        raise InputError(f"{root} was packed for {manifest.packed_for}: build in the whole bundle, and pack that again")


def needs_lowered_graph(flavour: Flavour, version: str, precision: Precision, geometry: Geometry) -> bool:
    """Return whether a library needs the graph without `Attention`: it cannot parse it or has no kernel for it."""
    if flavour is Flavour.TENSORRT and version_tuple(version)[:2] < _ATTENTION_SINCE:
        return True
    narrowest = min(layer.channels // layer.heads for layer in geometry.self_attention)
    return precision is Precision.FP32 or narrowest < _FUSED_HEAD_WIDTH


@dataclass(frozen=True)
class _Job:
    """What one engine is compiled from: a network, one of its two graphs, and the kernels for its custom operators."""

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
        """The graph file and its weights files."""
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
        """Return the manifest with an engine of `network`, which is built unless there is one."""
        name = network.spec.name
        self.report(name, "checking")
        job, reason = self._job_for(network)
        served = [engine for engine in manifest.engines if self._serves(engine, job)]
        if served and self.store.find(self._artifact(name, served[0].key)) is not None:
            self.report(name, f"kept for {self.target}")
            return manifest
        if reason:
            self.report(name, f"note: its own kernels are not used for {self.target}: {reason}")
        artifact = self._artifact(name, self._key(job))
        stored = self.store.find(artifact)
        if stored is not None:
            self.report(name, f"kept for {self.target}: another bundle had it")
        else:
            start = time.monotonic()
            self.bundle.verify(job.read_files)
            stored = self.store.add(artifact, self._writer(job))
            self.report(name, f"{stored.notes['how']} for {self.target} in {time.monotonic() - start:.1f} s")
        return self._manifest_with(manifest, job, artifact, stored)

    def _job_for(self, network: NetworkEntry) -> tuple[_Job, str]:
        """Choose a network's graph and kernels; also return why the bundle's kernels for it are not used, or ""."""
        kernels, reason = None, ""
        if self.plan.plugins:
            # Only TensorRT takes kernels, and it builds for a single capability.
            capability = self.target.capabilities[0]
            kernels, reason = choose(self.bundle, network, self.target.flavour, self.version, capability)
        geometry = self.bundle.manifest.geometry
        # `Attention` only occurs inside the custom operators' functions, which the kernels replace.
        lowered = kernels is None and needs_lowered_graph(
            self.target.flavour, self.version, network.precision, geometry
        )
        graph = network.lowered if lowered else network.onnx
        if graph is None:
            why = self.bundle.manifest.explain_missing
            raise BundleError(f"{self.bundle.root} has no graph of {network.spec.name} for {self.target}, {why}")
        return _Job(network, graph, kernels), reason

    def _serves(self, engine: EngineEntry, job: _Job) -> bool:
        return (
            (engine.network, engine.source, engine.kernels) == (job.name, job.network.key, job.kernels_hash)
            and engine.refittable >= self.plan.options.refittable
            and (not self.plan.options.layers or f"{engine.folder}/{LAYERS_NAME}" in self.bundle.manifest.files)
            and all(engine.serves(self.target.flavour, self.version, c) for c in self.target.capabilities)
        )

    def _artifact(self, name: str, key: str) -> Artifact:
        return Artifact(ENGINES_FOLDER, name, key)

    def _key(self, job: _Job) -> str:
        """Hash all that determines an engine: graph, weights, library, code, options, kernels and devices."""
        files, options = self.bundle.manifest.files, self.plan.options
        identity = {
            "graph": files[job.onnx].sha256,
            "weights": [files[name].sha256 for name in job.network.weights],
            "network": job.network.spec.to_json(),
            "library": [self.target.flavour.value, self.version],
            "capabilities": self.target.capabilities,
            "options": [options.refittable, options.layers],
            "code": sha256_file(Path(__file__).with_name("tensorrt.py")),
            "kernels": None if job.kernels is None else [job.kernels_hash, code_hash()],
            # A refitted engine is not the same as a compiled one.
            "refitted": self.plan.refit_from is not None and self.target.flavour is Flavour.TENSORRT,
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def _request(self, job: _Job) -> EngineRequest:
        options = self.plan.options
        if self.target.flavour is Flavour.TENSORRT and self.store.shared is not None:
            place = self.store.shared.root / f"timing-{self.version}-sm{self.target.capabilities[0]}.cache"
            options = dataclasses.replace(options, timing_cache=place)
        onnx, root, spec = self.bundle.path(job.onnx), self.bundle.path(WEIGHTS_FOLDER), job.network.spec
        return EngineRequest(self.target.flavour, self.target.capabilities, onnx, root, spec, options, job.kernels)

    def _writer(self, job: _Job) -> Callable[[Path], Notes]:
        """Return a function that writes an engine into a folder: refits if asked for and possible, else compiles."""
        name, request = job.name, self._request(job)

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
        refit_source = self._refit_source(job, self.plan.refit_from)
        if refit_source is None:
            self.report(name, f"note: {self.plan.refit_from} has no refittable engine of it, so it is built anew")
            return build
        engine, file = refit_source

        def refit(folder: Path) -> Notes:
            self.report(name, "refitting")
            try:
                refit_engine(file, request, folder)
            except BundleError as error:
                self.report(name, f"note: {error}; it is built anew")
                return build(folder)
            return {"how": REFITTED, **dataclasses.asdict(EngineFacts(engine.weight_bytes, engine.activation_bytes))}

        return refit

    def _refit_source(self, job: _Job, root: Path) -> tuple[EngineEntry, Path] | None:
        """Find an engine in the bundle at `root` that differs from the wanted one in its weights only."""
        bundle = Bundle.open(root)
        other = bundle.manifest.networks.get(job.name)
        if other is None or (other.spec, other.precision) != (job.network.spec, job.network.precision):
            return None
        for engine in bundle.manifest.engines:
            if engine.refittable and self._serves(dataclasses.replace(engine, source=job.network.key), job):
                bundle.verify([engine.file])
                return engine, bundle.path(engine.file)
        return None

    def _manifest_with(self, manifest: Manifest, job: _Job, artifact: Artifact, stored: Stored) -> Manifest:
        """Return the manifest with a stored engine in place of those it supersedes."""
        entry = EngineEntry(
            network=job.name,
            flavour=self.target.flavour,
            version=self.version,
            capabilities=self.target.capabilities,
            # A refitted engine can be refitted again even without --refittable.
            refittable=self.plan.options.refittable or stored.notes["how"] == REFITTED,
            source=job.network.key,
            key=artifact.key,
            file=stored.path(ENGINE_NAME),
            weight_bytes=stored.notes["weight_bytes"],
            activation_bytes=stored.notes["activation_bytes"],
            kernels=job.kernels_hash,
        )
        return with_engine(manifest, entry, stored)
