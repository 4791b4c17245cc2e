"""A bundle: the folder that an export writes and a runtime loads.

    manifest.json               format, geometry, an entry per folder, SHA-256 and size of every file
    networks/<name>-<key>/      the ONNX graph, and the same graph lowered for older TensorRT, both without weights
    weights/<group>-<key>/      weights.safetensors, which several networks and every backend may read
    kernels/<name>_sm80-<key>/  a network's own kernels for TensorRT's plugins, if they were compiled
    engines/<name>-<key>/       a network compiled by TensorRT, TensorRT-RTX or inductor, if engines were built
    tokenizers/                 text.json (CLIP) and language.json (Llama), in the `tokenizers` format

The manifest is written last and atomically: a folder without one is an unfinished build, not a bundle.
"""

import hashlib
import json
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from moma_rt.bundle.contents import hash_of, names_in, path_of, state_of
from moma_rt.bundle.engines import EngineEntry, KernelsEntry
from moma_rt.bundle.specs import Geometry, NetworkSpec, Precision
from moma_rt.errors import BundleError
from moma_rt.files import atomic_write
from moma_rt.messages import short_repr

FORMAT_VERSION = 5
MANIFEST_NAME = "manifest.json"
# Graphs name weights relative to this folder.
WEIGHTS_FOLDER = "weights"
# Written beside the files of a network, an engine or kernels; only the next build reads it.
RECORD_NAME = "record.json"
TEXT_TOKENIZER = "tokenizers/text.json"
LANGUAGE_TOKENIZER = "tokenizers/language.json"


@dataclass(frozen=True)
class FileEntry:
    """The expected hexadecimal SHA-256 of a file and its size in bytes."""

    sha256: str
    size: int


@dataclass(frozen=True)
class NetworkEntry:
    """One network of a bundle: its graphs, and the weights files that they and inductor packages read.

    Attributes:
        key: identifies the network's sources, its code and the libraries that exported it.
        structure: identifies the same without the weights' values; equal for two bases of one geometry.
        onnx, lowered: its graph in current operators and in those of TensorRT 10.3; both None in a bundle whose engines
            need no graph.
        weights: paths of safetensors files in the bundle. The graphs name the files relative to the folder `weights`.
    """

    spec: NetworkSpec
    precision: Precision
    key: str
    structure: str
    onnx: str | None
    lowered: str | None
    weights: tuple[str, ...]

    @property
    def graphs(self) -> tuple[str, ...]:
        """The graphs that the bundle has."""
        return tuple(dict.fromkeys(file for file in (self.onnx, self.lowered) if file is not None))

    @property
    def folders(self) -> tuple[str, ...]:
        """The folders of its files."""
        return tuple(dict.fromkeys(str(PurePosixPath(file).parent) for file in self.all_files))

    @property
    def all_files(self) -> tuple[str, ...]:
        """Every file of the network: the graphs and the weights."""
        return (*self.graphs, *self.weights)

    def made(self, engine: EngineEntry) -> bool:
        """Whether an engine was built from this network; for an engine without weights, from one of this structure."""
        return engine.source == (self.structure if engine.flavour.reads_weights else self.key)


@dataclass(frozen=True)
class Source:
    """The origin of weights: their role, their file or folder name, and a hash of their content."""

    role: str
    name: str
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Everything the runtime knows about a bundle before it opens a network."""

    base: str
    created_by: str
    geometry: Geometry
    networks: dict[str, NetworkEntry]
    files: dict[str, FileEntry]
    sources: tuple[Source, ...]
    engines: tuple[EngineEntry, ...] = ()
    kernels: tuple[KernelsEntry, ...] = ()
    # The target of a packed bundle, such as "sm86", and what was left out for it.
    packed_for: str = ""
    left_out: tuple[str, ...] = ()

    @property
    def has_graphs(self) -> bool:
        """Whether every network can be run as ONNX."""
        return all(network.onnx is not None for network in self.networks.values())

    @property
    def explain_missing(self) -> str:
        """Why something is not in the bundle and what to do, as the end of a sentence."""
        if self.packed_for:
            return f"since it was packed for {self.packed_for}: pack the whole bundle again for the target you need"
        return "since it was built for inductor alone: build it with --target cpu as well"

    def to_json(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "base": self.base,
            "created_by": self.created_by,
            "geometry": self.geometry.to_json(),
            "networks": {
                name: {
                    "spec": entry.spec.to_json(),
                    "precision": entry.precision.value,
                    "key": entry.key,
                    "structure": entry.structure,
                    "onnx": entry.onnx,
                    "lowered": entry.lowered,
                    "weights": list(entry.weights),
                }
                for name, entry in self.networks.items()
            },
            "engines": [engine.to_json() for engine in self.engines],
            "kernels": [kernels.to_json() for kernels in self.kernels],
            "files": {name: {"sha256": f.sha256, "size": f.size} for name, f in self.files.items()},
            "sources": [{"role": s.role, "name": s.name, "sha256": s.sha256} for s in self.sources],
            "packed_for": self.packed_for,
            "left_out": list(self.left_out),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Manifest":
        networks = {
            str(name): NetworkEntry(
                NetworkSpec.from_json(entry["spec"]),
                Precision(entry["precision"]),
                str(entry["key"]),
                str(entry["structure"]),
                None if entry["onnx"] is None else str(entry["onnx"]),
                None if entry["lowered"] is None else str(entry["lowered"]),
                tuple(str(file) for file in _list(entry["weights"])),
            )
            for name, entry in data["networks"].items()
        }
        files = {str(name): FileEntry(str(f["sha256"]), int(f["size"])) for name, f in data["files"].items()}
        sources = tuple(Source(s["role"], s["name"], s["sha256"]) for s in data["sources"])
        geometry = Geometry.from_json(data["geometry"])
        engines = tuple(EngineEntry.from_json(e) for e in data["engines"])
        kernels = tuple(KernelsEntry.from_json(k) for k in data["kernels"])
        return cls(
            str(data["base"]),
            str(data["created_by"]),
            geometry,
            networks,
            files,
            sources,
            engines,
            kernels,
            _line(data["packed_for"]),
            tuple(_line(left_out) for left_out in _list(data["left_out"])),
        )


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its folder and its manifest. Files are hashed when they are first used.

    `root` is absolute and without links, so that neither a change of the working folder nor of a link moves the bundle.
    A file in it may be a link that leads out of it, as in a cache of Hugging Face's hub: its content is verified.
    """

    root: Path
    manifest: Manifest

    @classmethod
    def open(cls, root: str | Path) -> "Bundle":
        """Read the manifest of `root` and check that every file it names is there with its size.

        Raises:
            BundleError: no manifest, another format version, a malformed manifest, or a missing, unreadable or
                truncated file.
        """
        try:
            place = Path(os.path.realpath(root))
        except (OSError, ValueError) as error:
            raise BundleError(f"{root} cannot be opened: {error}") from None
        bundle = cls(place, read_manifest(place))
        bundle._check_sizes()
        return bundle

    def _check_sizes(self) -> None:
        used = {file for entry in self.manifest.networks.values() for file in entry.all_files}
        used |= {engine.file for engine in self.manifest.engines} | {kernels.file for kernels in self.manifest.kernels}
        for name in sorted(used - self.manifest.files.keys()):
            raise BundleError(f"{self.root}: the manifest uses {name!r} but gives no hash for it")
        # Before their folders, so that an unsafe name is reported as the manifest has it.
        for name in sorted(self.manifest.files):
            self.path(name)
        # A graph reads files of these folders by name, so a file without a hash would be used unchecked.
        for folder in sorted({f for network in self.manifest.networks.values() for f in network.folders}):
            for name in names_in(self.root, folder):
                if name not in used and name != f"{folder}/{RECORD_NAME}":
                    raise BundleError(f"{self.root}: {name} is in no network of the manifest; delete it")
        for name, entry in self.manifest.files.items():
            size = state_of(self.root, name).st_size
            if size != entry.size:
                raise BundleError(
                    f"{self.root}: {name} has {size} bytes, the manifest says {entry.size}; build the bundle again"
                )

    def path(self, name: str) -> Path:
        """The path of a file that the manifest names; raises BundleError for a path outside the bundle."""
        return path_of(self.root, name)

    def verify(self, names: Iterable[str]) -> None:
        """Check the hashes of the named files.

        Raises:
            BundleError: the manifest does not list a file or has another hash of it, or the file is missing or cannot
                be read.
        """
        for name in names:
            entry = self.manifest.files.get(name)
            if entry is None:
                raise BundleError(f"{self.root}: the manifest does not list {name}; build the bundle again")
            found = hash_of(self.root, name)
            if found != entry.sha256:
                raise BundleError(
                    f"{self.root}: {name} was altered: its SHA-256 is {found[:12]}…, "
                    f"the manifest says {entry.sha256[:12]}…"
                )

    def network(self, name: str) -> NetworkEntry:
        """The entry of a network; raises a BundleError that lists the bundle's networks."""
        entry = self.manifest.networks.get(name)
        if entry is None:
            have = ", ".join(sorted(self.manifest.networks)) or "none"
            raise BundleError(f"{self.root} has no {name} network (it has: {have}); build it with --only {name}")
        return entry

    def graph(self, name: str) -> str:
        """The file of a network's ONNX graph.

        Raises:
            BundleError: the bundle has no such network, or only engines of it.
        """
        graph = self.network(name).onnx
        if graph is None:
            raise BundleError(f"{self.root} has no ONNX graph of {name}, {self.manifest.explain_missing}")
        return graph

    def has(self, *names: str) -> bool:
        """Whether the bundle has all the named networks."""
        return all(name in self.manifest.networks for name in names)

    def has_sources(self, *roles: str) -> bool:
        """Whether the bundle was made from weights of all these roles."""
        return {source.role for source in self.manifest.sources}.issuperset(roles)

    def fingerprint(self, *roles: str) -> str:
        """A hash of the weights of the named roles: equal for all bundles made from the same weights.

        Raises:
            BundleError: the bundle was not made from weights of one of the roles.
        """
        hashes = {source.role: source.sha256 for source in self.manifest.sources}
        for role in roles:
            if role not in hashes:
                raise BundleError(f"{self.root} has nothing made of the {role} weights (it has: {', '.join(hashes)})")
        return hashlib.sha256("".join(hashes[role] for role in roles).encode()).hexdigest()


def _list(value: object) -> list[object]:
    if not isinstance(value, list):
        raise ValueError(f"{short_repr(value)} is not a list")
    return value


def _line(text: object) -> str:
    if not isinstance(text, str) or (text and not text.isprintable()):
        raise ValueError(f"{short_repr(text)} is not a line of text")
    return text


def read_manifest(root: Path) -> Manifest:
    """Read the manifest of the bundle at `root`; the files that it names may be missing.

    Raises:
        BundleError: no manifest, another format version, or an unreadable or malformed manifest.
    """
    path = root / MANIFEST_NAME
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise BundleError(f"{root} is not a bundle: its {MANIFEST_NAME} is not a file")
    except (FileNotFoundError, NotADirectoryError):
        raise BundleError(
            f"{root} is not a bundle: it has no {MANIFEST_NAME} (python -m export.build makes one)"
        ) from None
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror or error}") from None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        version = int(data["format_version"])
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror or error}") from None
    # Deep nesting raises RecursionError, an infinite number OverflowError.
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise BundleError(f"{path} cannot be read as a manifest: {error}") from None
    if version < 1:
        raise BundleError(f"{path} cannot be read as a manifest: format_version is {version}, there is none below 1")
    if version != FORMAT_VERSION:
        advice = "upgrade it" if version > FORMAT_VERSION else "build the bundle again"
        raise BundleError(f"{root} has bundle format {version}; this moma-rt reads format {FORMAT_VERSION}: {advice}")
    try:
        return Manifest.from_json(data)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise BundleError(f"{path} is malformed: {type(error).__name__}: {error}") from None


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Write `root/manifest.json` atomically: the last step of a build. A link there is replaced, not followed."""
    with atomic_write(root / MANIFEST_NAME, through_links=False) as path:
        path.write_text(json.dumps(manifest.to_json(), indent=1) + "\n", encoding="utf-8")
