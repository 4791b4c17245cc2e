"""Content-addressed folders of networks, weights, kernels and engines, which appear only when they are complete.

A folder is named after its network and its key, a hash of everything that determines its content, so every build can
reuse what another one finished. A bundle holds the folders that its manifest names; a shared store beside the bundles
holds each folder once, as hard links. The manifest is replaced atomically, and folders that it no longer names are
deleted after that: a build may be killed at any moment, the previous bundle stays intact, and the next build reuses the
folders that were finished.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.lock import build_lock
from moma_rt.bundle.manifest import MANIFEST_NAME, RECORD_NAME, TEXT_TOKENIZER, WEIGHTS_FOLDER, FileEntry, Manifest
from moma_rt.errors import InputError
from moma_rt.files import PARTIAL_PREFIX, copy, entries, move, remove_tree, set_mode, sha256_file, sync
from moma_rt.messages import warn

NETWORKS_FOLDER = "networks"
ENGINES_FOLDER = "engines"
KERNELS_FOLDER = "kernels"
LOCK_NAME = ".lock"
_KINDS = (NETWORKS_FOLDER, WEIGHTS_FOLDER, ENGINES_FOLDER, KERNELS_FOLDER)
_KEY_LENGTH = 16
_HASH_KEY = "sha256"
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
        self.root = Path(os.path.abspath(root))

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
                remove_tree(published)
            return False
        try:
            _link_files(published, folder)
        except OSError:
            # The folder is made anew, which also tells whether this disk is full.
            return False
        return True

    def publish(self, artifact: Artifact, folder: Path) -> None:
        """Link a complete folder into the store, unless the store has it; if that fails, warn."""
        published = self.root / artifact.folder
        if published.is_dir():
            return
        try:
            with partial_folder(published.parent) as partial:
                _link_files(folder, partial)
                _rename_complete(partial, published, artifact)
        except OSError as error:
            reason = error.strerror or error
            warn(f"--store {self.root}: cannot be written ({reason}): other bundles must build again what this one has")

    def prune(self) -> int:
        """Delete folders that no bundle links and leftovers of killed builds; returns the number of bytes freed.

        No build may run at the same time. Folders that were copied, where links are impossible, are deleted as well.
        """
        freed = 0
        for folder in (path for kind in _KINDS for path in self._folders(kind)):
            sizes = [path.stat() for path in entries(folder)]
            if folder.name.startswith(PARTIAL_PREFIX) or all(size.st_nlink == 1 for size in sizes):
                freed += sum(size.st_size for size in sizes if size.st_nlink == 1)
                remove_tree(folder)
        return freed

    def _folders(self, kind: str) -> list[Path]:
        return [path for path in (self.root / kind).glob("*") if path.is_dir() and _OWNED_FOLDER.fullmatch(path.name)]


class Store:
    """The folders of the bundle at `root`; missing ones are taken from `shared` where it has them."""

    def __init__(self, root: Path, shared: SharedStore | None = None) -> None:
        self.root = Path(os.path.abspath(root))
        self.shared = shared

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the bundle for one build; the operating system releases the lock when the process ends.

        Raises:
            InputError: the folder cannot be written, holds other files than a bundle, or is locked by another build.
        """
        stack = contextlib.ExitStack()
        try:
            if self.root.is_dir() and entries(self.root) and not self._is_bundle():
                raise InputError(f"{self.root}: holds other files and no bundle; give a new or an empty folder")
            for kind in _KINDS:
                (self.root / kind).mkdir(parents=True, exist_ok=True)
            if self.shared is not None:
                self.shared.prepare()
            stack.enter_context(build_lock(self.root / LOCK_NAME))
        except OSError as error:
            raise InputError(f"{self.root}: cannot be written: {error.strerror or error}") from None
        with stack:
            self._remove_partial()
            try:
                yield
            except OSError as error:
                # A write to an open file fails without its name.
                error.filename = error.filename or str(self.root)
                raise

    def find(self, artifact: Artifact) -> Stored | None:
        """Return the folder that an earlier build finished, here or in the shared store; None if none is intact."""
        stored = _read_intact(self.root / artifact.folder, artifact)
        if stored is None and self.shared is not None:
            with partial_folder(self.root / artifact.kind) as partial:
                if self.shared.fetch(artifact, partial):
                    _rename_complete(partial, self.root / artifact.folder, artifact)
                    stored = _read_intact(self.root / artifact.folder, artifact, trusted=True)
        return stored

    def add(self, artifact: Artifact, write: Callable[[Path], Notes]) -> Stored:
        """Let `write` fill a temporary folder, hash and flush its files, and rename it to its final name.

        Args:
            write: fills the folder that it is given and returns notes for its record, as JSON values.
        """
        with partial_folder(self.root / artifact.kind) as partial:
            notes = write(partial)
            files = {}
            for path in entries(partial):
                sync(path)
                # Other bundles hard-link this file, so a change here would change them too.
                set_mode(path, 0o444)
                files[path.name] = FileEntry(sha256_file(path), path.stat().st_size)
            record = {"files": {name: dataclasses.asdict(file) for name, file in files.items()}, "notes": notes}
            record = json.loads(json.dumps(record))
            text = json.dumps({**record, _HASH_KEY: _hash_of(record)}, indent=1)
            (partial / RECORD_NAME).write_text(text + "\n", encoding="utf-8")
            sync(partial / RECORD_NAME)
            _rename_complete(partial, self.root / artifact.folder, artifact)
        if self.shared is not None:
            self.shared.publish(artifact, self.root / artifact.folder)
        return Stored(artifact.folder, {f"{artifact.folder}/{name}": file for name, file in files.items()}, notes)

    def remove_unused(self, manifest: Manifest) -> None:
        """Delete the folders that `manifest` does not name."""
        used = {engine.folder for engine in manifest.engines} | {kernels.folder for kernels in manifest.kernels}
        used.update(*(network.folders for network in manifest.networks.values()))
        self._remove(lambda folder: folder not in used)

    def _is_bundle(self) -> bool:
        return (self.root / MANIFEST_NAME).is_file() or (self.root / LOCK_NAME).is_file()

    def _remove_partial(self) -> None:
        """Delete partial folders, manifests and tokenizers that a killed build left."""
        self._remove(lambda folder: Path(folder).name.startswith(PARTIAL_PREFIX))
        for folder in (self.root, (self.root / TEXT_TOKENIZER).parent):
            for path in folder.glob(f"{PARTIAL_PREFIX}*"):
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)

    def _remove(self, is_unwanted: Callable[[str], bool]) -> None:
        for kind in _KINDS:
            for path in list((self.root / kind).iterdir()):
                if _OWNED_FOLDER.fullmatch(path.name) and is_unwanted(f"{kind}/{path.name}"):
                    remove_tree(path)


@contextlib.contextmanager
def partial_folder(parent: Path) -> Iterator[Path]:
    """Make a temporary folder, which a build that finds it after a crash deletes; delete it unless it was renamed."""
    # Not one of tempfile's, which only its owner may read.
    partial = parent / f"{PARTIAL_PREFIX}{secrets.token_hex(8)}"
    partial.mkdir()
    try:
        yield partial
    finally:
        remove_tree(partial)


def _hash_of(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _read_intact(path: Path, artifact: Artifact, *, trusted: bool = False) -> Stored | None:
    """Read the folder at `path`; None unless its record is readable and every file matches it.

    Files are hashed, because damage may leave a file's size unchanged; `trusted` skips that for files just verified.
    """
    try:
        record = json.loads((path / RECORD_NAME).read_text(encoding="utf-8"))
        # Records of earlier versions have no hash. The comparison notices an altered key of it.
        if record.pop(_HASH_KEY, None) not in (None, _hash_of(record)) or record.keys() != {"files", "notes"}:
            return None
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
    for path in entries(source):
        link_or_copy(path, target / path.name)


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link `source` as `target`; where that is impossible, such as across file systems, copy and flush it."""
    # A link to a symbolic link would be one more of these on some systems.
    place = Path(os.path.realpath(source))
    try:
        os.link(place, target)
    except (OSError, AttributeError):
        copy(place, target)
        set_mode(target, stat.S_IMODE(place.stat().st_mode) & 0o777)


def _rename_complete(partial: Path, path: Path, artifact: Artifact) -> None:
    """Rename a complete folder to its final name, replacing a damaged one."""
    sync(partial)
    remove_tree(path)
    # Otherwise another build was faster. Its folder has the same content, because the name is a hash of all inputs.
    if _read_intact(path, artifact) is None:
        try:
            move(partial, path, RECORD_NAME)
        except OSError:
            if _read_intact(path, artifact) is not None:
                return
            remove_tree(path)
            raise
    sync(path.parent)
