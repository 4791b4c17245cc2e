"""Folders that appear under their final names only when they are complete: networks, weights, kernels and engines.

A folder is named after its network and its key, a hash of everything that determines its content, so what one build
finished serves any other. A bundle holds the folders its manifest names; a shared store beside the bundles holds all
of them once, as hard links. The manifest is replaced atomically, and what no manifest names any more is deleted after
that: a build may be killed at any moment, the previous bundle stays whole, and the next run continues with what was
finished.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moma_rt.bundle.manifest import MANIFEST_NAME, RECORD_NAME, TEXT_TOKENIZER, WEIGHTS_FOLDER, FileEntry, Manifest
from moma_rt.errors import InputError
from moma_rt.files import fsync, sha256_file

NETWORKS_FOLDER = "networks"
ENGINES_FOLDER = "engines"
KERNELS_FOLDER = "kernels"
PARTIAL_PREFIX = ".partial-"
LOCK_NAME = ".lock"
_KINDS = (NETWORKS_FOLDER, WEIGHTS_FOLDER, ENGINES_FOLDER, KERNELS_FOLDER)
_KEY_LENGTH = 16
# What this store may delete; whatever else lies beside it is somebody's.
_OWN_FOLDER = re.compile(rf"[a-z0-9_]+-[0-9a-f]{{{_KEY_LENGTH}}}|{re.escape(PARTIAL_PREFIX)}.*")

Notes = dict[str, Any]


@dataclass(frozen=True)
class Artifact:
    """What a folder must hold: a network's graphs, weights, kernels or an engine (`kind` is the folder of these)."""

    kind: str
    name: str
    key: str

    @property
    def place(self) -> str:
        """The folder, from the root of a bundle or of the shared store."""
        return f"{self.kind}/{self.name}-{self.key[:_KEY_LENGTH]}"


@dataclass(frozen=True)
class Stored:
    """A complete folder: its files by their path in the bundle, and what its writer noted about them."""

    place: str
    files: dict[str, FileEntry]
    notes: Notes

    def path(self, name: str) -> str:
        """The path in the bundle of one of its files."""
        return f"{self.place}/{name}"


class SharedStore:
    """What all bundles beside it hold, each folder once."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def prepare(self) -> None:
        """Make the folders.

        Raises:
            InputError: they cannot be made.
        """
        try:
            for kind in _KINDS:
                (self.root / kind).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--store {self.root}: cannot be written: {error.strerror}") from None

    def fetch(self, artifact: Artifact, folder: Path) -> bool:
        """Link an intact artifact's files into `folder`; False if there is none. A damaged one is deleted."""
        place = self.root / artifact.place
        if _read(place, artifact) is None:
            # Only what is there and damaged: another build may be publishing it just now.
            if (place / RECORD_NAME).is_file():
                shutil.rmtree(place, ignore_errors=True)
            return False
        _link_files(place, folder)
        return True

    def publish(self, artifact: Artifact, folder: Path) -> None:
        """Keep a complete folder for other bundles, unless it is there already."""
        place = self.root / artifact.place
        if place.is_dir():
            return
        partial = Path(tempfile.mkdtemp(prefix=PARTIAL_PREFIX, dir=place.parent))
        try:
            _link_files(folder, partial)
            _complete(partial, place)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def prune(self) -> int:
        """Delete what no bundle links any more, and what killed builds left; the number of bytes that became free.

        No build may run meanwhile. Where files were copied, since no links could be made, all are deleted.
        """
        freed = 0
        for folder in (path for kind in _KINDS for path in self._folders(kind)):
            sizes = [path.stat() for path in folder.iterdir()]
            if folder.name.startswith(PARTIAL_PREFIX) or all(size.st_nlink == 1 for size in sizes):
                freed += sum(size.st_size for size in sizes if size.st_nlink == 1)
                shutil.rmtree(folder, ignore_errors=True)
        return freed

    def _folders(self, kind: str) -> list[Path]:
        return [path for path in (self.root / kind).glob("*") if path.is_dir() and _OWN_FOLDER.fullmatch(path.name)]


class Store:
    """The folders of the bundle at `root`, which `shared` provides where it has them."""

    def __init__(self, root: Path, shared: SharedStore | None = None) -> None:
        self.root = root
        self.shared = shared

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the bundle for one build; the lock goes with the process, however it ends.

        Raises:
            InputError: the folder cannot be written, holds something else than a bundle, or another build holds it.
        """
        try:
            if self.root.is_dir() and any(self.root.iterdir()) and not self._is_ours():
                raise InputError(f"{self.root}: holds other files and no bundle; give a new or an empty folder")
            for kind in _KINDS:
                (self.root / kind).mkdir(parents=True, exist_ok=True)
            if self.shared is not None:
                self.shared.prepare()
            stream = (self.root / LOCK_NAME).open("w")
        except OSError as error:
            raise InputError(f"{self.root}: cannot be written: {error.strerror}") from None
        with stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise InputError(
                    f"{self.root}: another build is writing it; wait for it or choose another folder"
                ) from None
            self._remove_partial()
            yield

    def find(self, artifact: Artifact) -> Stored | None:
        """What an earlier run finished, here or in another bundle; None if there is nothing, or nothing intact."""
        stored = _read(self.root / artifact.place, artifact)
        if stored is None and self.shared is not None:
            with self._partial(artifact) as partial:
                if self.shared.fetch(artifact, partial):
                    _complete(partial, self.root / artifact.place)
                    stored = _read(self.root / artifact.place, artifact, trusted=True)
        return stored

    def add(self, artifact: Artifact, write: Callable[[Path], Notes]) -> Stored:
        """Let `write` fill a temporary folder; hash and flush what it wrote, and give the folder its final name.

        Args:
            write: fills the folder it is given and returns what is to be noted beside it, as JSON has it.
        """
        with self._partial(artifact) as partial:
            notes = write(partial)
            files = {}
            for path in sorted(partial.iterdir()):
                # Linked from other bundles too: a change in one would be one in all.
                path.chmod(0o444)
                fsync(path)
                files[path.name] = FileEntry(sha256_file(path), path.stat().st_size)
            record = {"files": {name: dataclasses.asdict(file) for name, file in files.items()}, "notes": notes}
            (partial / RECORD_NAME).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            fsync(partial / RECORD_NAME)
            _complete(partial, self.root / artifact.place)
        if self.shared is not None:
            self.shared.publish(artifact, self.root / artifact.place)
        return Stored(artifact.place, {f"{artifact.place}/{name}": file for name, file in files.items()}, notes)

    def remove_unused(self, manifest: Manifest) -> None:
        """Delete the folders that `manifest` does not name."""
        used = {owner.folder for owner in (*manifest.engines, *manifest.kernels)}
        used.update(*(network.folders for network in manifest.networks.values()))
        self._remove(lambda place: place not in used)

    @contextlib.contextmanager
    def _partial(self, artifact: Artifact) -> Iterator[Path]:
        partial = Path(tempfile.mkdtemp(prefix=PARTIAL_PREFIX, dir=self.root / artifact.kind))
        try:
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _is_ours(self) -> bool:
        return (self.root / MANIFEST_NAME).is_file() or (self.root / LOCK_NAME).is_file()

    def _remove_partial(self) -> None:
        """Delete what a killed build was writing: a folder, a manifest or a tokenizer."""
        self._remove(lambda place: Path(place).name.startswith(PARTIAL_PREFIX))
        for folder in (self.root, (self.root / TEXT_TOKENIZER).parent):
            for path in folder.glob(f"{PARTIAL_PREFIX}*"):
                path.unlink(missing_ok=True)

    def _remove(self, unwanted: Callable[[str], bool]) -> None:
        for kind in _KINDS:
            for path in list((self.root / kind).iterdir()):
                if _OWN_FOLDER.fullmatch(path.name) and unwanted(f"{kind}/{path.name}"):
                    shutil.rmtree(path, ignore_errors=True)


def _read(place: Path, artifact: Artifact, *, trusted: bool = False) -> Stored | None:
    """The folder at `place`; None unless its record can be read and every file is what the record says.

    A disk's error or a hand's may have left a file's size alone, so contents are hashed unless they were just now.
    """
    try:
        record = json.loads((place / RECORD_NAME).read_text(encoding="utf-8"))
        files = {str(name): FileEntry(**file) for name, file in record["files"].items()}
        for name, file in files.items():
            path = place / name
            if path.parent != place or path.stat().st_size != file.size:
                return None
            if not trusted and sha256_file(path) != file.sha256:
                return None
        return Stored(artifact.place, {f"{artifact.place}/{n}": file for n, file in files.items()}, record["notes"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _link_files(source: Path, target: Path) -> None:
    for path in source.iterdir():
        link_or_copy(path, target / path.name)


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name; where that cannot be, on another file system for one, copy and flush it."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
        fsync(target)


def _complete(partial: Path, place: Path) -> None:
    """Give a folder its final name, in place of a damaged one."""
    partial.chmod(0o755)
    fsync(partial)
    shutil.rmtree(place, ignore_errors=True)
    try:
        partial.rename(place)
    except OSError:
        # Another build was first; what it put there is the same, since the name is a hash of all it is made of.
        if not place.is_dir():
            raise
    fsync(place.parent)
