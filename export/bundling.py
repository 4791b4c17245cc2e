"""From a checkpoint to a bundle, a network at a time: what is finished is kept, what is interrupted leaves nothing.

A network's folder is named after its key, a hash of everything that determines its content, and appears under that
name only when it is complete. The manifest is replaced atomically at the end, and what no manifest names any more is
deleted after that. So a build may be killed at any moment: the previous bundle stays whole, and the next run
continues.
"""

import contextlib
import dataclasses
import fcntl
import gc
import hashlib
import importlib.metadata
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import moma_rt
from export import tokenizers
from export.checkpoints.model import NETWORK_ROLES, TEXT_ENCODER, Checkpoint, Component
from export.geometry import geometry_of
from export.networks import NETWORKS, Network
from export.onnx_export import MODEL_NAME, export_network
from moma_rt.bundle import (
    LANGUAGE_TOKENIZER,
    TEXT_TOKENIZER,
    Bundle,
    FileEntry,
    Manifest,
    NetworkEntry,
    Source,
    write_manifest,
)
from moma_rt.errors import BundleError, InputError
from moma_rt.files import fsync, sha256_file
from moma_rt.specs import Geometry, NetworkSpec, Precision

NETWORKS_FOLDER = "networks"
RECORD_NAME = "network.json"
PARTIAL_PREFIX = ".partial-"
_KEY_LENGTH = 16
# Libraries whose version may change a graph.
_LIBRARIES = ("torch", "diffusers", "transformers", "onnx", "onnxscript")
# Sources whose change may change a graph.
_CODE = ("export/models", "export/networks.py", "export/onnx_export.py", "kernels", "moma_rt/schedules.py")

Report = Callable[[str, str], None]


@dataclass(frozen=True)
class BuiltNetwork:
    """A network's folder is complete: its manifest entry, its files, and whether this run made it."""

    entry: NetworkEntry
    files: dict[str, FileEntry]
    seconds: float | None

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files.values())


def build_bundle(checkpoint: Checkpoint, names: tuple[str, ...], out: Path, report: Report) -> Bundle:
    """Export the named networks and write `out` as a bundle.

    Networks that an earlier build left in `out` stay part of it as long as they come from the same sources.

    Args:
        report: called with a network's name and what is being done to it.

    Raises:
        InputError: `out` cannot be written, or another build is writing it.
    """
    geometry = geometry_of(checkpoint)
    with _locked(out):
        _remove_partial(out)
        previous = _previous(out, checkpoint)
        if geometry.language is None and previous is not None:
            geometry = dataclasses.replace(geometry, language=previous.geometry.language)
        built = {name: _build_network(NETWORKS[name], checkpoint, geometry, out, report) for name in names}
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
        _remove_unused(out, manifest)
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


def _build_network(network: Network, c: Checkpoint, geometry: Geometry, out: Path, report: Report) -> BuiltNetwork:
    spec = network.spec(geometry)
    key = network_key(network, c.components, spec)
    folder = out / NETWORKS_FOLDER / f"{network.name}-{key[:_KEY_LENGTH]}"
    finished = _read_record(folder, out)
    if finished is not None:
        report(network.name, "kept")
        return finished
    start = time.monotonic()
    partial = Path(tempfile.mkdtemp(prefix=PARTIAL_PREFIX, dir=folder.parent))
    try:
        report(network.name, "reading weights")
        module = network.module(c, geometry)
        report(network.name, "tracing")
        export_network(module, network, geometry, partial)
        del module
        gc.collect()
        report(network.name, "hashing")
        files = {}
        for path in sorted(partial.iterdir()):
            path.chmod(0o644)
            fsync(path)
            files[f"{NETWORKS_FOLDER}/{folder.name}/{path.name}"] = FileEntry(sha256_file(path), path.stat().st_size)
        entry = NetworkEntry(
            spec, Precision.FP32, key, f"{NETWORKS_FOLDER}/{folder.name}/{MODEL_NAME}", tuple(sorted(files))
        )
        built = BuiltNetwork(entry, files, time.monotonic() - start)
        _write_record(partial / RECORD_NAME, built)
        partial.chmod(0o755)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        fsync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    report(network.name, f"built in {built.seconds:.1f} s")
    return built


def _write_record(path: Path, built: BuiltNetwork) -> None:
    record = {
        "spec": built.entry.spec.to_json(),
        "precision": built.entry.precision.value,
        "key": built.entry.key,
        "onnx": built.entry.onnx,
        "files": {name: dataclasses.asdict(file) for name, file in built.files.items()},
    }
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    fsync(path)


def _read_record(folder: Path, out: Path) -> BuiltNetwork | None:
    """What an earlier run finished in `folder`; None if there is nothing, or if its files are not all there."""
    try:
        record: dict[str, Any] = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))
        files = {name: FileEntry(**file) for name, file in record["files"].items()}
        spec, precision = NetworkSpec.from_json(record["spec"]), Precision(record["precision"])
        entry = NetworkEntry(spec, precision, record["key"], record["onnx"], tuple(sorted(files)))
        if all((out / name).stat().st_size == file.size for name, file in files.items()):
            return BuiltNetwork(entry, files, None)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


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


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold the folder for one build; the lock goes with the process, however it ends."""
    try:
        (out / NETWORKS_FOLDER).mkdir(parents=True, exist_ok=True)
        stream = (out / ".lock").open("w")
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written: {error.strerror}") from None
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"--out {out}: another build is writing it; wait for it or choose another folder") from None
        yield


def _remove_partial(out: Path) -> None:
    for path in (out / NETWORKS_FOLDER).glob(f"{PARTIAL_PREFIX}*"):
        shutil.rmtree(path, ignore_errors=True)


def _remove_unused(out: Path, manifest: Manifest) -> None:
    used = {Path(entry.onnx).parent.name for entry in manifest.networks.values()}
    for path in (out / NETWORKS_FOLDER).iterdir():
        if path.name not in used:
            shutil.rmtree(path, ignore_errors=True)


def _code_hash() -> str:
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for name in _CODE:
        place = root / name
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
