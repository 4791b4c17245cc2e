"""The networks' folders of a bundle: each appears under its final name only when it is complete.

A folder is named after its network and its key, a hash of everything that determines its content. The manifest is
replaced atomically, and what no manifest names any more is deleted after that. So a build may be killed at any moment:
the previous bundle stays whole, and the next run continues with what was finished.
"""

import contextlib
import dataclasses
import fcntl
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moma_rt.bundle import MANIFEST_NAME, RECORD_NAME, FileEntry, Manifest, NetworkEntry
from moma_rt.errors import InputError
from moma_rt.files import fsync, sha256_file
from moma_rt.specs import NetworkSpec, Precision

NETWORKS_FOLDER = "networks"
PARTIAL_PREFIX = ".partial-"
LOCK_NAME = ".lock"
_KEY_LENGTH = 16
# What this store may delete; whatever else lies beside it is somebody's.
_OWN_FOLDER = re.compile(rf"[a-z_]+-[0-9a-f]{{{_KEY_LENGTH}}}|{re.escape(PARTIAL_PREFIX)}.*")


@dataclass(frozen=True)
class StoredNetwork:
    """A complete network: its manifest entry and its files."""

    entry: NetworkEntry
    files: dict[str, FileEntry]


@dataclass(frozen=True)
class NetworkRequest:
    """What a network's folder must hold. `onnx` is the graph's file name in the folder."""

    spec: NetworkSpec
    precision: Precision
    key: str
    onnx: str


class NetworkStore:
    """The `networks` folder of the bundle at `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._folder = root / NETWORKS_FOLDER

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the bundle for one build; the lock goes with the process, however it ends.

        Raises:
            InputError: the folder cannot be written, holds something else than a bundle, or another build holds it.
        """
        try:
            if self.root.is_dir() and any(self.root.iterdir()) and not self._is_ours():
                raise InputError(f"--out {self.root}: holds other files and no bundle; give a new or an empty folder")
            self._folder.mkdir(parents=True, exist_ok=True)
            stream = (self.root / LOCK_NAME).open("w")
        except OSError as error:
            raise InputError(f"--out {self.root}: cannot be written: {error.strerror}") from None
        with stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise InputError(
                    f"--out {self.root}: another build is writing it; wait for it or choose another folder"
                ) from None
            self._remove(lambda path: path.name.startswith(PARTIAL_PREFIX))
            yield

    def find(self, request: NetworkRequest) -> StoredNetwork | None:
        """What an earlier run finished; None if there is nothing, or if its files are not all there."""
        try:
            record: dict[str, Any] = json.loads((self._place(request) / RECORD_NAME).read_text(encoding="utf-8"))
            files = {name: FileEntry(**file) for name, file in record["files"].items()}
            if all((self.root / name).stat().st_size == file.size for name, file in files.items()):
                return StoredNetwork(self._entry(request, files), files)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            pass
        return None

    def add(self, request: NetworkRequest, write: Callable[[Path], None]) -> StoredNetwork:
        """Let `write` fill a temporary folder; hash and flush what it wrote, and give the folder its final name."""
        place = self._place(request)
        partial = Path(tempfile.mkdtemp(prefix=PARTIAL_PREFIX, dir=self._folder))
        try:
            write(partial)
            files = {}
            for path in sorted(partial.iterdir()):
                path.chmod(0o644)
                fsync(path)
                name = f"{NETWORKS_FOLDER}/{place.name}/{path.name}"
                files[name] = FileEntry(sha256_file(path), path.stat().st_size)
            record = {"files": {name: dataclasses.asdict(file) for name, file in files.items()}}
            (partial / RECORD_NAME).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            fsync(partial / RECORD_NAME)
            partial.chmod(0o755)
            fsync(partial)
            shutil.rmtree(place, ignore_errors=True)
            partial.rename(place)
            fsync(self._folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return StoredNetwork(self._entry(request, files), files)

    def remove_unused(self, manifest: Manifest) -> None:
        """Delete the folders that `manifest` does not name."""
        used = {Path(entry.onnx).parent.name for entry in manifest.networks.values()}
        self._remove(lambda path: path.name not in used)

    def _is_ours(self) -> bool:
        return (self.root / MANIFEST_NAME).is_file() or (self.root / LOCK_NAME).is_file()

    def _place(self, request: NetworkRequest) -> Path:
        return self._folder / f"{request.spec.name}-{request.key[:_KEY_LENGTH]}"

    def _entry(self, request: NetworkRequest, files: dict[str, FileEntry]) -> NetworkEntry:
        onnx = f"{NETWORKS_FOLDER}/{self._place(request).name}/{request.onnx}"
        return NetworkEntry(request.spec, request.precision, request.key, onnx, tuple(sorted(files)))

    def _remove(self, unwanted: Callable[[Path], bool]) -> None:
        for path in list(self._folder.iterdir()):
            if _OWN_FOLDER.fullmatch(path.name) and unwanted(path):
                shutil.rmtree(path, ignore_errors=True)
