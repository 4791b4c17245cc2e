"""Build a bundle from a checkpoint, one network at a time, reusing what an earlier run finished."""

import contextlib
import dataclasses
import gc
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType

from tokenizers import Tokenizer

import moma_rt
from engines.builder import refuse_packed
from engines.plugins import NETWORK as WITH_KERNELS
from engines.store import NETWORKS_FOLDER, Artifact, Notes, SharedStore, Store, Stored
from export import tokenizers
from export.attention_kernels import KernelExporter
from export.checkpoints.model import LANGUAGE, NETWORK_ROLES, ROLES, TEXT_ENCODER, Checkpoint
from export.geometry import geometry_of
from export.keys import network_key, structure_key
from export.network_weights import WEIGHTS_NAME, ExternalWeights, WeightGroup, weight_groups
from export.networks import NETWORKS, Network, Precisions
from export.onnx_export import LOWERED_NAME, MODEL_NAME, ExportRequest, export_network
from export.overflow import LIMIT, VAE_NETWORKS, peaks
from moma_rt.bundle.engines import format_capabilities
from moma_rt.bundle.manifest import (
    LANGUAGE_TOKENIZER,
    MANIFEST_NAME,
    TEXT_TOKENIZER,
    WEIGHTS_FOLDER,
    Bundle,
    FileEntry,
    Manifest,
    NetworkEntry,
    Source,
    read_manifest,
    write_manifest,
)
from moma_rt.bundle.specs import Geometry, Precision
from moma_rt.errors import BundleError, CheckpointError, InputError
from moma_rt.files import PARTIAL_PREFIX, path_inside, replace, sha256_file

_TOKENIZER_ROLES = MappingProxyType({TEXT_TOKENIZER: TEXT_ENCODER, LANGUAGE_TOKENIZER: LANGUAGE})

Report = Callable[[str, str], None]


@dataclass(frozen=True)
class ExportPlan:
    """The networks to export, their precisions, and the devices to compile the denoiser's kernels for.

    `kernels` are compute capabilities, in addition to those the bundle already has kernels for; None removes all
    kernels. `graphs`: whether to export ONNX graphs, which AOTInductor packages do not need; existing graphs stay.
    """

    names: tuple[str, ...]
    precisions: Precisions = Precisions()
    kernels: tuple[int, ...] | None = None
    graphs: bool = True


def build_bundle(
    checkpoint: Checkpoint, plan: ExportPlan, out: Path, report: Report, shared: SharedStore | None = None
) -> Bundle:
    """Export the planned networks and write `out` as a bundle.

    Networks of an earlier build in `out` stay in the bundle unless their checkpoints have changed.

    Args:
        report: called with a network's name and what is being done to it.
        shared: a store of finished parts that bundles share.

    Raises:
        InputError: `out` cannot be written, or another build is writing it.
        CheckpointError: a tokenizer or weights are unusable, or the VAE makes NaN or infinity even in fp32.
    """
    geometry, store = geometry_of(checkpoint), Store(out, shared)
    with contextlib.suppress(BundleError):  # no bundle yet, or one that will be overwritten
        refuse_packed(read_manifest(out), out)
    # Exporting takes minutes, so first make the tokenizers, which can fail.
    made_tokenizers = _tokenizers(checkpoint)
    with _disk_errors(out, store), store.locked():
        before = _networks_before(out)
        previous = _previous(out, checkpoint, geometry)
        geometry = previous.geometry
        plan = dataclasses.replace(plan, precisions=_within_range(checkpoint, geometry, plan, store, report))
        exporter = _Exporter(checkpoint, geometry, plan, store, report)
        built = {name: exporter.stored(NETWORKS[name]) for name in plan.names}
        files = {name: file for _, of_network in built.values() for name, file in of_network.items()}
        entries = {**previous.networks, **{name: entry for name, (entry, _) in built.items()}}
        kernels = {}
        if plan.kernels is not None and WITH_KERNELS in entries:
            compiler = KernelExporter(entries[WITH_KERNELS], geometry, store, report)
            kernels = compiler.stored(plan.kernels, previous.kernels)
        files |= {name: file for stored in kernels.values() for name, file in stored.files.items()}
        files |= _write_tokenizers(made_tokenizers, out)
        sources = {c.role: Source(c.role, c.name, c.sha256) for c in checkpoint.components}
        manifest = Manifest(
            checkpoint.base,
            f"moma-rt {moma_rt.__version__}",
            geometry,
            {name: entries[name] for name in NETWORKS if name in entries},
            {**previous.files, **files},
            tuple({**{s.role: s for s in previous.sources}, **sources}.values()),
            tuple(e for e in previous.engines if e.network in entries and entries[e.network].made(e)),
            tuple(kernels),
        )
        manifest = _without_unused(manifest)
        write_manifest(out, manifest)
        for name, why in _dropped(previous, manifest, before):
            report(name, f"dropped: {why}")
        store.remove_unused(manifest)
        for name in {TEXT_TOKENIZER, LANGUAGE_TOKENIZER} - manifest.files.keys():
            (out / name).unlink(missing_ok=True)
        return Bundle.open(out)


def _dropped(previous: Manifest, manifest: Manifest, networks: set[str]) -> Iterator[tuple[str, str]]:
    """Yield the network and the reason for each entry of the previous manifest that the new one lacks."""
    for engine in previous.engines:
        if engine not in manifest.engines:
            yield (
                engine.network,
                f"the engine for {format_capabilities(engine.capabilities)}, which this export does not use",
            )
    for kernels in previous.kernels:
        if kernels.capability not in {k.capability for k in manifest.kernels}:
            yield kernels.network, f"the kernels for sm{kernels.capability}, which this export does not use"
    for name in sorted(networks - manifest.networks.keys()):
        yield name, "its checkpoints or its files have changed"


@dataclass(frozen=True)
class _Exporter:
    """Exports single networks of a checkpoint into a store."""

    checkpoint: Checkpoint
    geometry: Geometry
    plan: ExportPlan
    store: Store
    report: Report

    def stored(self, network: Network) -> tuple[NetworkEntry, dict[str, FileEntry]]:
        """Return a network's manifest entry and its files, exporting what the store lacks or has damaged."""
        precision = self.plan.precisions.of(network.name)
        spec, components = network.spec(self.geometry, precision), self.checkpoint.components
        key, structure = network_key(components, spec, precision), structure_key(components, spec, precision)
        start = time.monotonic()
        self.report(network.name, "checking")
        groups = weight_groups(network, self.checkpoint, self.geometry, precision)
        weights = [self._weights(network.name, group) for group in groups]
        made = [group.name for group, (_, is_new) in zip(groups, weights, strict=True) if is_new]
        stored = [group for group, _ in weights]
        external = ExternalWeights(self.store.root / WEIGHTS_FOLDER, tuple(group.location for group in groups))
        # Frees the weights that were read for writing.
        del groups
        request = ExportRequest(self.checkpoint, network, self.geometry, precision, external)
        graphs, is_new = self._graphs(request, Artifact(NETWORKS_FOLDER, network.name, key))
        stored += [] if graphs is None else [graphs]
        made += ["graph"] if is_new else []
        seconds = time.monotonic() - start
        self.report(network.name, f"built in {seconds:.1f} s: {', '.join(made)}" if made else "kept")
        entry = NetworkEntry(
            spec,
            precision,
            key,
            structure,
            None if graphs is None else graphs.path(MODEL_NAME),
            None if graphs is None else graphs.path(LOWERED_NAME),
            tuple(group.path(WEIGHTS_NAME) for group, _ in weights),
        )
        return entry, {name: file for each in stored for name, file in each.files.items()}

    def _weights(self, network: str, group: WeightGroup) -> tuple[Stored, bool]:
        """Return a weights file, and whether this call wrote it."""
        found = self.store.find(group.artifact)
        if found is not None:
            return found, False

        def write(folder: Path) -> Notes:
            self.report(network, f"writing the weights of {group.name}")
            group.write(folder)
            gc.collect()
            self.report(network, "hashing")
            return {}

        return self.store.add(group.artifact, write), True

    def _graphs(self, request: ExportRequest, artifact: Artifact) -> tuple[Stored | None, bool]:
        """Return both graphs of a network, None if the bundle has none, and whether this call exported them."""
        # Without `plan.graphs`, keep this bundle's graphs but take none from other bundles.
        is_wanted = self.plan.graphs or (self.store.root / artifact.folder).is_dir()
        found = self.store.find(artifact) if is_wanted else None
        if found is not None or not self.plan.graphs:
            return found, False

        def write(folder: Path) -> Notes:
            self.report(request.network.name, "tracing")
            export_network(request, folder)
            gc.collect()
            return {}

        return self.store.add(artifact, write), True


def _within_range(
    checkpoint: Checkpoint, geometry: Geometry, plan: ExportPlan, store: Store, report: Report
) -> Precisions:
    """Return the plan's precisions, with fp32 for the halves of a VAE that leaves half precision's range."""

    def is_exported(name: str) -> bool:
        spec = NETWORKS[name].spec(geometry, Precision.FP16)
        key = network_key(checkpoint.components, spec, Precision.FP16)
        return store.find(Artifact(NETWORKS_FOLDER, name, key)) is not None

    halves = [name for name in VAE_NETWORKS if name in plan.names and plan.precisions.of(name) is Precision.FP16]
    # A half in the store was found to be in range when it was exported.
    unknown = tuple(name for name in halves if not is_exported(name))
    if not unknown:
        return plan.precisions
    for name in unknown:
        report(name, "looking for values that half precision cannot hold")
    wide = set()
    for name, peak in peaks(checkpoint, geometry, unknown).items():
        if not math.isfinite(peak):
            raise CheckpointError(
                f"the VAE {checkpoint.vae.name} cannot be used: its {name[4:]} makes NaN or infinity even in fp32"
            )
        if peak > LIMIT:
            wide.add(name)
            report(name, f"note: stays in fp32, since its values reach {peak:.3g} and half precision ends at 65,504")
    gc.collect()
    return dataclasses.replace(plan.precisions, wide=frozenset(wide))


def _tokenizers(checkpoint: Checkpoint) -> dict[str, Tokenizer]:
    """Make the tokenizers that the checkpoint's networks need, keyed by their file names in the bundle."""
    made = {}
    if TEXT_ENCODER in checkpoint.roles:
        folder, embeddings = checkpoint.text_tokenizer, int(checkpoint.text_encoder.config["vocab_size"])
        made[TEXT_TOKENIZER] = (
            tokenizers.text_tokenizer(folder, embeddings)
            if folder is not None
            else tokenizers.synthetic_text_tokenizer()
        )
    if checkpoint.language is not None:
        folder, embeddings = checkpoint.language_tokenizer, int(checkpoint.language.config["vocab_size"])
        made[LANGUAGE_TOKENIZER] = (
            tokenizers.language_tokenizer(folder, embeddings)
            if folder is not None
            else tokenizers.synthetic_language_tokenizer()
        )
    return made


def _write_tokenizers(made: dict[str, Tokenizer], out: Path) -> dict[str, FileEntry]:
    """Write the tokenizers to the bundle and return their manifest entries.

    Their file names are fixed, so the old manifest is deleted before a file that it describes is replaced.
    """
    files = {}
    for name, tokenizer in made.items():
        path = out / name
        staged = path.with_name(PARTIAL_PREFIX + path.name)
        tokenizers.save(tokenizer, staged)
        files[name] = FileEntry(sha256_file(staged), staged.stat().st_size)
        if path.is_file() and sha256_file(path) != files[name].sha256:
            (out / MANIFEST_NAME).unlink(missing_ok=True)
        replace(staged, path)
    return files


def _networks_before(out: Path) -> set[str]:
    try:
        return set(read_manifest(out).networks)
    except BundleError:
        return set()


def _previous(out: Path, checkpoint: Checkpoint, geometry: Geometry) -> Manifest:
    """Return the part of an earlier build's manifest that is still valid.

    A network stays if base, sizes and checkpoints are the same and its files are complete. The returned geometry is
    `geometry`, with the earlier build's language model if the checkpoint has none.
    """
    nothing = Manifest(checkpoint.base, "", geometry, {}, {}, ())
    try:
        manifest = read_manifest(out)
        files = {name: file for name, file in manifest.files.items() if _has_size(path_inside(out, name), file)}
    except (BundleError, ValueError):
        return nothing
    language = geometry.language or manifest.geometry.language
    geometry = dataclasses.replace(geometry, language=language)
    if manifest.base != checkpoint.base or dataclasses.replace(manifest.geometry, language=language) != geometry:
        return nothing
    given = {c.role: c.sha256 for c in checkpoint.components}
    changed = {source.role for source in manifest.sources if given.get(source.role, source.sha256) != source.sha256}
    networks = {
        name: entry
        for name, entry in manifest.networks.items()
        if name in NETWORKS
        and not NETWORK_ROLES[name] & changed
        and entry.spec == NETWORKS[name].spec(geometry, entry.precision)
        and files.keys() >= set(entry.all_files)
    }
    engines = tuple(engine for engine in manifest.engines if engine.file in files)
    return dataclasses.replace(manifest, geometry=geometry, networks=networks, files=files, engines=engines)


def _without_unused(manifest: Manifest) -> Manifest:
    """Return the manifest without unused files and sources, sorted so that it does not depend on the build's steps."""
    files = {file for entry in manifest.networks.values() for file in entry.all_files}
    folders = {entry.folder for entry in (*manifest.engines, *manifest.kernels)}
    files |= {file for file in manifest.files if str(PurePosixPath(file).parent) in folders}
    roles = frozenset().union(*(NETWORK_ROLES[name] for name in manifest.networks))
    files |= {tokenizer for tokenizer, role in _TOKENIZER_ROLES.items() if role in roles}
    return dataclasses.replace(
        manifest,
        files={name: file for name, file in sorted(manifest.files.items()) if name in files},
        sources=tuple(sorted((s for s in manifest.sources if s.role in roles), key=lambda s: ROLES.index(s.role))),
    )


def _has_size(path: Path, file: FileEntry) -> bool:
    return os.path.isfile(path) and path.stat().st_size == file.size


@contextlib.contextmanager
def _disk_errors(out: Path, store: Store) -> Iterator[None]:
    """Turn an OSError of the bundle's files into an InputError; that of another file, such as a checkpoint, stays."""
    try:
        yield
    except OSError as error:
        roots = [store.root, *([] if store.shared is None else [store.shared.root])]
        if isinstance(error.filename, str) and not any(Path(error.filename).is_relative_to(root) for root in roots):
            raise
        raise InputError(f"--out {out}: cannot be written: {error.strerror or error}") from None
