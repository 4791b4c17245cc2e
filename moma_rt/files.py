"""Files that are complete or absent, on file systems that lack calls as well; file hashes; names inside a folder.

What a file system lacks is left out: permissions, hard links, flushing, renaming. A `MomaWarning` says so where
something may be lost by it. Finished work is never thrown away for it; a full or broken device is an `OSError`.
"""

import contextlib
import errno
import functools
import hashlib
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from moma_rt.messages import warn

PARTIAL_PREFIX = ".partial-"
_CHUNK_BYTES = 1 << 22
_MAX_SUFFIX = 16
# What a call reports that could not keep the data. Other errors mean that the file system does not have the call.
_DEVICE_ERRORS = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Left in any folder by macOS, Windows, file systems on a network, desktops and editors; the names are their own.
_STRAY = re.compile(
    r"\.nfs[0-9a-f]+|\.fuse_hidden.*|\.smbdelete.*|\.afpdeleted.*|\.goutputstream-.*"
    r"|\._.*|\.ds_store|\.(appledouble|lsoverride|spotlight-v100|trashes|fseventsd|temporaryitems|apdisk)"
    r"|\.documentrevisions-v100|\.volumeicon\.icns|icon\r"
    r"|(eh)?thumbs(_vista)?\.db(:encryptable)?|desktop\.ini|\$recycle\.bin|system volume information"
    r"|\.directory|\.trash-.*|lost\+found|@eadir|#recycle|\.snapshot|\.stfolder|\.stversions|\.dropbox(\.attr|\.cache)?"
    r"|\.ipynb_checkpoints|__macosx|\.localized|#snapshot|.*:zone\.identifier|.*~|~\$.*|\..*\.sw[a-p]|\.#.*|#.*#",
    re.IGNORECASE | re.DOTALL,
)


@contextlib.contextmanager
def atomic_write(path: Path, *, through_links: bool = True) -> Iterator[Path]:
    """Yield a temporary path in `path`'s folder; on success flush it and rename it to `path`, else delete it.

    The temporary file has the suffix of `path`, for writers that look at it (Pillow). A file that is replaced leaves
    its permissions and, where allowed, its owner to the new one; its other hard links keep the old content. If `path`
    is a symbolic link, the file that it leads to is replaced; with `through_links=False`, the link itself. An `OSError`
    of this function names `path`, not the temporary file.
    """
    with atomic_write_all([path], through_links=through_links) as temporaries:
        yield temporaries[0]


@contextlib.contextmanager
def atomic_write_all(paths: Sequence[Path], *, through_links: bool = True) -> Iterator[list[Path]]:
    """Like `atomic_write`, for several files: all are written before one is renamed, so a failed write leaves none."""
    with contextlib.ExitStack() as stack:
        outputs = [stack.enter_context(_output(path, through_links)) for path in paths]
        yield [output.temporary for output in outputs]
        for output in outputs:
            with _name_in_errors(output.path):
                sync(output.temporary)
                output.set_access()
        for output in outputs:
            with _name_in_errors(output.path):
                replace(output.temporary, output.place)
        for folder in {output.place.parent for output in outputs}:
            sync(folder)


@dataclass(frozen=True)
class _Output:
    """A file to write: its path as given and without links, its temporary file, and its final mode and owner."""

    path: Path
    place: Path
    temporary: Path
    mode: int
    owner: tuple[int, int] | None

    def set_access(self) -> None:
        """Give the temporary file its final owner and mode, since some writers replace it by one with another mode."""
        found = self.temporary.stat()
        if sys.platform != "win32" and self.owner not in (None, (found.st_uid, found.st_gid)):
            with contextlib.suppress(OSError):
                os.chown(self.temporary, -1, self.owner[1])
                os.chown(self.temporary, self.owner[0], -1)
        if stat.S_IMODE(found.st_mode) != self.mode:
            set_mode(self.temporary, self.mode)


@contextlib.contextmanager
def _output(path: Path, through_links: bool) -> Iterator[_Output]:
    """Make an empty temporary file beside the file at `path`; delete it at the end if it still exists."""
    place = path
    if through_links and path.is_symlink():
        place = Path(os.path.realpath(path))
        if place.is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    # A long suffix is dropped, so that the temporary name stays within the file system's limit.
    suffix = place.suffix if len(place.suffix) <= _MAX_SUFFIX else ""
    temporary = place.parent / f"{PARTIAL_PREFIX}{secrets.token_hex(8)}{suffix}"
    with _name_in_errors(path):
        place.parent.mkdir(parents=True, exist_ok=True)
        replaced = None
        with contextlib.suppress(FileNotFoundError):
            replaced = place.stat() if through_links else place.lstat()
        if replaced is not None and not (stat.S_ISREG(replaced.st_mode) or stat.S_ISLNK(replaced.st_mode)):
            code = errno.EISDIR if stat.S_ISDIR(replaced.st_mode) else errno.EINVAL
            raise OSError(code, "is a folder" if code == errno.EISDIR else "is a device or pipe, not a file")
        kept = replaced is not None and stat.S_ISREG(replaced.st_mode)
        mode = stat.S_IMODE(replaced.st_mode) & 0o777 if replaced is not None and kept else 0o666
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode | stat.S_IWUSR))
    try:
        if replaced is None or not kept:
            yield _Output(path, place, temporary, stat.S_IMODE(temporary.stat().st_mode), None)
        else:
            yield _Output(path, place, temporary, mode, (replaced.st_uid, replaced.st_gid))
    finally:
        # Windows deletes no file that is open, such as one whose writer failed.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _name_in_errors(path: Path) -> Iterator[None]:
    """Make an `OSError` name `path`."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        # Deleted rather than None, which str(error) would show.
        with contextlib.suppress(AttributeError):
            del error.filename2
        raise


def replace(temporary: Path, path: Path) -> None:
    """Rename a complete file to `path`, replacing a file there; where that cannot be, overwrite it in place.

    That is so for a single file that is mounted into a container, for one that another process has open on Windows, and
    on file systems that cannot rename.
    """
    try:
        temporary.replace(path)
    except OSError as error:
        if error.errno in _DEVICE_ERRORS or path.is_dir() or not temporary.is_file():
            raise
        _overwrite(temporary, path, error)
        warn(f"{path} was overwritten in place, since it cannot be replaced: {error.strerror or error}")


def _overwrite(temporary: Path, path: Path, reason: OSError) -> None:
    """Overwrite a file in place; if that fails half-way, keep the complete file under another name."""
    is_new = not path.exists()
    try:
        stream = path.open("xb" if is_new else "r+b")
    except OSError:
        # Nothing was changed.
        raise reason from None
    try:
        with stream, temporary.open("rb") as complete:
            shutil.copyfileobj(complete, stream, _CHUNK_BYTES)
            stream.truncate()
        sync(path)
    except OSError as error:
        if is_new:
            path.unlink(missing_ok=True)
            raise
        kept = path.with_name(f"{path.stem}.complete{path.suffix}")
        with contextlib.suppress(OSError):
            temporary.replace(kept)
            error.strerror = f"{error.strerror or error}; the complete file is {kept}"
        raise


def copy(source: Path, target: Path) -> None:
    """Write the content of `source` to `target` and flush it. An `OSError` names `target`, which is then deleted."""
    is_open = False
    try:
        with source.open("rb") as stream, target.open("wb") as written:
            is_open = True
            shutil.copyfileobj(stream, written, _CHUNK_BYTES)
        sync(target)
    except OSError as error:
        if is_open:
            with contextlib.suppress(OSError):
                target.unlink(missing_ok=True)
            error.filename = str(target)
        raise


def move(source: Path, target: Path, last: str) -> None:
    """Rename a file or a complete folder; where the file system renames no folders, move its files one by one.

    Args:
        last: the name of the file whose presence makes the folder complete; it is moved last.
    """
    try:
        source.rename(target)
    except OSError:
        if not source.is_dir():
            copy(source, target)
            set_mode(target, stat.S_IMODE(source.stat().st_mode))
            return
        target.mkdir(exist_ok=True)
        for path in sorted(source.iterdir(), key=lambda path: path.name == last):
            move(path, target / path.name, last)
        sync(target)


def set_mode(path: Path, mode: int) -> None:
    """Set a file's permissions; where the file system has none of its own, warn."""
    try:
        path.chmod(mode)
    except FileNotFoundError:
        raise
    except OSError as error:
        _warn_once(
            f"the file system cannot set permissions ({error.strerror or error}): files keep those that it gives them"
        )


def sync(path: Path) -> None:
    """Flush a file or folder to its device; where the file system cannot, warn.

    Raises:
        OSError: the content of a file could not be written.
    """
    is_folder = path.is_dir()
    try:
        # Windows flushes only what is open for writing, and opens no folder. A writable folder need not be readable.
        handle = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    except OSError as error:
        if is_folder or isinstance(error, PermissionError):
            return
        raise
    try:
        os.fsync(handle)
    except OSError as error:
        if not is_folder and error.errno in _DEVICE_ERRORS:
            raise
        what = "folder" if is_folder else "file"
        _warn_once(
            f"the file system cannot flush a {what} ({error.strerror or error}): "
            "what was written last may be missing after a power failure"
        )
    finally:
        os.close(handle)


@functools.cache
def _warn_once(text: str) -> None:
    """Warn once per process: a build writes hundreds of files to one file system."""
    warn(text)


def remove_tree(path: Path) -> None:
    """Delete a folder as far as possible."""

    def retry(function: object, name: str, _: object) -> None:
        # Windows deletes no read-only file.
        with contextlib.suppress(OSError):
            if function in (os.unlink, os.remove) and not os.path.islink(name):
                os.chmod(name, stat.S_IREAD | stat.S_IWRITE)
                os.unlink(name)

    if sys.version_info >= (3, 12):
        shutil.rmtree(path, onexc=retry)
    else:
        shutil.rmtree(path, onerror=retry)


def entries(folder: Path) -> list[Path]:
    """The paths in a folder, sorted, without files that operating systems and editors leave in any folder."""
    return sorted(path for path in folder.iterdir() if not is_stray(path.name))


def is_stray(name: str) -> bool:
    """Whether a file of this name is left by an operating system, a file system or an editor, such as .DS_Store."""
    return _STRAY.fullmatch(name) is not None


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def path_inside(root: Path, relative: str) -> Path:
    """Return `root / relative`, which must not lead out of `root` by its text; links on the way are the user's own.

    Raises:
        ValueError: the path is absolute, or has a ``..``, a backslash, or a colon, which Windows takes for a drive.
    """
    pure = PurePosixPath(relative)
    if (
        pure.is_absolute()
        or ".." in pure.parts
        or not pure.parts
        or any(character in relative for character in "\\:\0")
    ):
        raise ValueError(f"path {relative!r} leaves its folder")
    return root / pure
