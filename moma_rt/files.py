"""Atomic writes, file hashes, and paths that must stay inside a folder."""

import contextlib
import hashlib
import os
import secrets
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

_CHUNK_BYTES = 1 << 22
_MAX_SUFFIX = 16


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path in `path`'s folder; on success fsync it and rename it to `path`, else delete it.

    The temporary file has the suffix of `path`, for writers that look at it (Pillow). An `OSError` of this function
    names `path`, not the temporary file.
    """
    with atomic_write_all([path]) as temporaries:
        yield temporaries[0]


@contextlib.contextmanager
def atomic_write_all(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """Like `atomic_write`, for several files: all are written before one is renamed, so a failed write leaves none."""
    with contextlib.ExitStack() as stack:
        temporaries = [stack.enter_context(_temporary(path)) for path in paths]
        modes = [stat.S_IMODE(temporary.stat().st_mode) for temporary in temporaries]
        yield temporaries
        for path, temporary, mode in zip(paths, temporaries, modes, strict=True):
            with _name_in_errors(path):
                # Restored, since some writers replace the file by one that only its owner may read.
                temporary.chmod(mode)
                fsync(temporary)
        for path, temporary in zip(paths, temporaries, strict=True):
            with _name_in_errors(path):
                temporary.replace(path)
        for folder in {path.parent for path in paths}:
            # A folder that is writable but not readable cannot be opened.
            with contextlib.suppress(PermissionError):
                fsync(folder)


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """Make an empty file beside `path`, with the default mode; delete it at the end if it still exists."""
    # A long suffix is dropped, so that the temporary name stays within the file system's limit.
    suffix = path.suffix if len(path.suffix) <= _MAX_SUFFIX else ""
    temporary = path.parent / f".partial-{secrets.token_hex(8)}{suffix}"
    with _name_in_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _name_in_errors(path: Path) -> Iterator[None]:
    """Make an `OSError` name `path`."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


def fsync(path: Path) -> None:
    """Flush a file or folder to its device."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def resolve_inside(root: Path, relative: str) -> Path:
    """Return `root / relative`, which must stay inside `root` when links are followed.

    Raises:
        ValueError: the path is absolute, has a ``..``, or leads out of `root` through a link.
    """
    pure = PurePosixPath(relative)
    if pure.is_absolute() or ".." in pure.parts or "\\" in relative or "\0" in relative or not pure.parts:
        raise ValueError(f"path {relative!r} leaves its folder")
    path = root / pure
    if not path.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"path {relative!r} leads out of its folder through a link")
    return path
