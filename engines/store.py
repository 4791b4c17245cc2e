"""Content-addressed folders of networks, weights, kernels and engines, which appear only when they are complete.

A folder is named after its network and its key, a hash of everything that determines its content, so every build can
reuse what another one finished. A bundle holds the folders that its manifest names; a shared store beside the bundles
holds each folder once, as hard links. The manifest is replaced atomically, and folders that it no longer names are
deleted after that: a build may be killed at any moment, the previous bundle stays intact, and the next build reuses the
folders that were finished.
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
# The only folders that are ever deleted; others belong to the user.
_OWNED_FOLDER = re.compile(rf"[a-z0-9_]+-[0-9a-f]{{{_KEY_LENGTH}}}|{re.escape(PARTIAL_PREFIX)}.*")

Notes = dict[str, Any]


@dataclass(frozen=True)
class Artifact:
    """Identifies a folder's content by kind (one of the top-level folders), network name and key."""

    kind: str
    name: str
    key: str

    @property
    def folder(self) -> str:
        """The folder, relative to the root of a bundle or of the shared store."""
        return f"{self.kind}/{self.name}-{self.key[:_KEY_LENGTH]}"


@dataclass(frozen=True)
class Stored:
    """A complete folder: its files by their paths in the bundle, and its writer's notes, which are JSON values."""

    folder: str
    files: dict[str, FileEntry]
    notes: Notes

    def path(self, name: str) -> str:
        """The path in the bundle of the folder's file `name`."""
        return f"{self.folder}/{name}"


class SharedStore:
    """Holds every folder of the bundles beside it once, as hard links."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def prepare(self) -> None:
        """Create the store's top-level folders.

        Raises:
            InputError: they cannot be created.
        """
        try:
            for kind in _KINDS:
                (self.root / kind).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--store {self.root}: cannot be written: {error.strerror}") from None

    def fetch(self, artifact: Artifact, folder: Path) -> bool:
        """Link an artifact's files into `folder`; False if the store has no intact copy. Deletes a damaged copy."""
        published = self.root / artifact.folder
        if _read_intact(published, artifact) is None:
            # A folder without a record may be one that another build is publishing.
            if (published / RECORD_NAME).is_file():
                shutil.rmtree(published, ignore_errors=True)
            return False
        _link_files(published, folder)
        return True

    def publish(self, artifact: Artifact, folder: Path) -> None:
        """Link a complete folder into the store, unless the store has it."""
        published = self.root / artifact.folder
        if published.is_dir():
            return
        partial = Path(tempfile.mkdtemp(prefix=PARTIAL_PREFIX, dir=published.parent))
        try:
            _link_files(folder, partial)
            _rename_complete(partial, published)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def prune(self) -> int:
        """Delete folders that no bundle links and leftovers of killed builds; returns the number of bytes freed.

        No build may run at the same time. Folders that were copied, where links are impossible, are deleted as well.
        """
        freed = 0
        for folder in (path for kind in _KINDS for path in self._folders(kind)):
            sizes = [path.stat() for path in folder.iterdir()]
            if folder.name.startswith(PARTIAL_PREFIX) or all(size.st_nlink == 1 for size in sizes):
                freed += sum(size.st_size for size in sizes if size.st_nlink == 1)
                shutil.rmtree(folder, ignore_errors=True)
        return freed

    def _folders(self, kind: str) -> list[Path]:
        return [path for path in (self.root / kind).glob("*") if path.is_dir() and _OWNED_FOLDER.fullmatch(path.name)]


class Store:
    """The folders of the bundle at `root`; missing ones are taken from `shared` where it has them."""

    def __init__(self, root: Path, shared: SharedStore | None = None) -> None:
        self.root = root
        self.shared = shared

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the bundle for one build; the operating system releases the lock when the process ends.

        Raises:
            InputError: the folder cannot be written, holds other files than a bundle, or is locked by another build.
        """
        try:
            if self.root.is_dir() and any(self.root.iterdir()) and not self._is_bundle():
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
        """Return the folder that an earlier build finished, here or in the shared store; None if none is intact."""
        stored = _read_intact(self.root / artifact.folder, artifact)
        if stored is None and self.shared is not None:
            with self._partial(artifact) as partial:
                if self.shared.fetch(artifact, partial):
                    _rename_complete(partial, self.root / artifact.folder)
                    stored = _read_intact(self.root / artifact.folder, artifact, trusted=True)
        return stored

    def add(self, artifact: Artifact, write: Callable[[Path], Notes]) -> Stored:
        """Let `write` fill a temporary folder, hash and fsync its files, and rename it to its final name.

        Args:
            write: fills the folder that it is given and returns notes for its record, as JSON values.
        """
        with self._partial(artifact) as partial:
            notes = write(partial)
            files = {}
            for path in sorted(partial.iterdir()):
                # Other bundles hard-link this file, so a change here would change them too.
                path.chmod(0o444)
                fsync(path)
                files[path.name] = FileEntry(sha256_file(path), path.stat().st_size)
            record = {"files": {name: dataclasses.asdict(file) for name, file in files.items()}, "notes": notes}
            (partial / RECORD_NAME).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            fsync(partial / RECORD_NAME)
            _rename_complete(partial, self.root / artifact.folder)
        if self.shared is not None:
            self.shared.publish(artifact, self.root / artifact.folder)
        return Stored(artifact.folder, {f"{artifact.folder}/{name}": file for name, file in files.items()}, notes)

    def remove_unused(self, manifest: Manifest) -> None:
        """Delete the folders that `manifest` does not name."""
        used = {owner.folder for owner in (*manifest.engines, *manifest.kernels)}
        used.update(*(network.folders for network in manifest.networks.values()))
        self._remove(lambda folder: folder not in used)

    @contextlib.contextmanager
    def _partial(self, artifact: Artifact) -> Iterator[Path]:
        partial = Path(tempfile.mkdtemp(prefix=PARTIAL_PREFIX, dir=self.root / artifact.kind))
        try:
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _is_bundle(self) -> bool:
        return (self.root / MANIFEST_NAME).is_file() or (self.root / LOCK_NAME).is_file()

    def _remove_partial(self) -> None:
        """Delete partial folders, manifests and tokenizers that a killed build left."""
        self._remove(lambda folder: Path(folder).name.startswith(PARTIAL_PREFIX))
        for folder in (self.root, (self.root / TEXT_TOKENIZER).parent):
            for path in folder.glob(f"{PARTIAL_PREFIX}*"):
                path.unlink(missing_ok=True)

    def _remove(self, is_unwanted: Callable[[str], bool]) -> None:
        for kind in _KINDS:
            for path in list((self.root / kind).iterdir()):
                if _OWNED_FOLDER.fullmatch(path.name) and is_unwanted(f"{kind}/{path.name}"):
                    shutil.rmtree(path, ignore_errors=True)


def _read_intact(path: Path, artifact: Artifact, *, trusted: bool = False) -> Stored | None:
    """Read the folder at `path`; None unless its record is readable and every file matches it.

    Files are hashed, because damage may leave a file's size unchanged; `trusted` skips that for files just verified.
    """
    try:
        record = json.loads((path / RECORD_NAME).read_text(encoding="utf-8"))
        files = {str(name): FileEntry(**file) for name, file in record["files"].items()}
        for name, file in files.items():
            file_path = path / name
            if file_path.parent != path or file_path.stat().st_size != file.size:
                return None
            if not trusted and sha256_file(file_path) != file.sha256:
                return None
        return Stored(artifact.folder, {f"{artifact.folder}/{n}": file for n, file in files.items()}, record["notes"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _link_files(source: Path, target: Path) -> None:
    for path in source.iterdir():
        link_or_copy(path, target / path.name)


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link `source` as `target`; where that is impossible, such as across file systems, copy and fsync it."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
        fsync(target)


def _rename_complete(partial: Path, path: Path) -> None:
    """Rename a complete folder to its final name, replacing a damaged one."""
    partial.chmod(0o755)
    fsync(partial)
    shutil.rmtree(path, ignore_errors=True)
    try:
        partial.rename(path)
    except OSError:
        # Another build was faster. Its folder has the same content, because the name is a hash of all inputs.
        if not path.is_dir():
            raise
    fsync(path.parent)
