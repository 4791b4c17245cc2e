"""From a checkpoint to a bundle, a network at a time: what an earlier run finished is kept."""

import dataclasses
import gc
import hashlib
import importlib.metadata
import json
import time
from collections.abc import Callable
from pathlib import Path

import moma_rt
from engines.store import NetworkRequest, NetworkStore, StoredNetwork
from export import tokenizers
from export.checkpoints.model import NETWORK_ROLES, TEXT_ENCODER, Checkpoint, Component
from export.geometry import geometry_of
from export.networks import NETWORKS, Network
from export.onnx_export import MODEL_NAME, export_network
from moma_rt.bundle import LANGUAGE_TOKENIZER, TEXT_TOKENIZER, Bundle, FileEntry, Manifest, Source, write_manifest
from moma_rt.errors import BundleError
from moma_rt.files import sha256_file
from moma_rt.specs import Geometry, NetworkSpec, Precision

# Libraries whose version may change a graph.
_LIBRARIES = ("torch", "diffusers", "transformers", "onnx", "onnxscript")
# Sources whose change may change a graph.
_CODE = ("export/models", "export/networks.py", "export/onnx_export.py", "kernels", "moma_rt/schedules.py")

Report = Callable[[str, str], None]


def build_bundle(checkpoint: Checkpoint, names: tuple[str, ...], out: Path, report: Report) -> Bundle:
    """Export the named networks and write `out` as a bundle.

    Networks that an earlier build left in `out` stay part of it as long as they come from the same sources.

    Args:
        report: called with a network's name and what is being done to it.

    Raises:
        InputError: `out` cannot be written, or another build is writing it.
    """
    geometry, store = geometry_of(checkpoint), NetworkStore(out)
    with store.locked():
        previous = _previous(out, checkpoint)
        if geometry.language is None and previous is not None:
            geometry = dataclasses.replace(geometry, language=previous.geometry.language)
        built = {name: _stored(NETWORKS[name], checkpoint, geometry, store, report) for name in names}
        entries = {name: network.entry for name, network in built.items()}
        files = {name: file for network in built.values() for name, file in network.files.items()}
        files |= _write_tokenizers(checkpoint, out)
        sources = {c.role: Source(c.role, c.name, c.sha256) for c in checkpoint.components}
        if previous is not None:
            entries = {**previous.networks, **entries}
            sources = {**{s.role: s for s in previous.sources}, **sources}
            kept = {file for entry in entries.values() for file in entry.files} | {TEXT_TOKENIZER, LANGUAGE_TOKENIZER}
            files = {**{n: f for n, f in previous.files.items() if n in kept}, **files}
        in_order = {name: entries[name] for name in NETWORKS if name in entries}
        created_by = f"moma-rt {moma_rt.__version__}"
        manifest = Manifest(checkpoint.base, created_by, geometry, in_order, files, tuple(sources.values()))
        write_manifest(out, manifest)
        store.remove_unused(manifest)
        return Bundle.open(out)


def network_key(network: Network, components: tuple[Component, ...], spec: NetworkSpec) -> str:
    """Names what a network computes: its sources, its tensors, the code that traces it, the libraries it runs on."""
    roles = NETWORK_ROLES[network.name]
    identity = {
        "network": spec.to_json(),
        "sources": {c.role: [c.sha256, c.config] for c in components if c.role in roles},
        "code": _code_hash(),
        "libraries": {name: importlib.metadata.version(name) for name in _LIBRARIES},
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()


def _stored(
    network: Network, checkpoint: Checkpoint, geometry: Geometry, store: NetworkStore, report: Report
) -> StoredNetwork:
    spec = network.spec(geometry)
    request = NetworkRequest(spec, Precision.FP32, network_key(network, checkpoint.components, spec), MODEL_NAME)
    finished = store.find(request)
    if finished is not None:
        report(network.name, "kept")
        return finished

    def write(folder: Path) -> None:
        report(network.name, "reading weights")
        module = network.module(checkpoint, geometry)
        report(network.name, "tracing")
        export_network(module, network, geometry, folder)
        del module
        gc.collect()
        report(network.name, "hashing")

    start = time.monotonic()
    built = store.add(request, write)
    report(network.name, f"built in {time.monotonic() - start:.1f} s")
    return built


def _write_tokenizers(checkpoint: Checkpoint, out: Path) -> dict[str, FileEntry]:
    """The tokenizers of what the checkpoint holds: a bundle's prompts are read with nothing but these."""
    made = {}
    if TEXT_ENCODER in checkpoint.roles:
        folder = checkpoint.text_tokenizer
        made[TEXT_TOKENIZER] = (
            tokenizers.text_tokenizer(folder) if folder is not None else tokenizers.synthetic_text_tokenizer()
        )
    if checkpoint.language is not None:
        folder = checkpoint.language_tokenizer
        made[LANGUAGE_TOKENIZER] = (
            tokenizers.language_tokenizer(folder) if folder is not None else tokenizers.synthetic_language_tokenizer()
        )
    files = {}
    for name, tokenizer in made.items():
        tokenizers.save(tokenizer, out / name)
        files[name] = FileEntry(sha256_file(out / name), (out / name).stat().st_size)
    return files


def _previous(out: Path, checkpoint: Checkpoint) -> Manifest | None:
    """The manifest of an earlier build whose networks may stay: of the same base, from no other sources."""
    try:
        manifest = Bundle.open(out).manifest
    except BundleError:
        return None
    sources = {source.role: source.sha256 for source in manifest.sources}
    same = all(sources.get(c.role, c.sha256) == c.sha256 for c in checkpoint.components)
    return manifest if same and manifest.base == checkpoint.base else None


def _code_hash() -> str:
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for name in _CODE:
        place = root / name
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
