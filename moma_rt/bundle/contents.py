"""Reads of a bundle's files by their names in the manifest. What cannot be read is a `BundleError` with the reason."""

import os
import stat
from pathlib import Path

from moma_rt.errors import BundleError
from moma_rt.files import entries, path_inside, sha256_file


def path_of(root: Path, name: str) -> Path:
    """The path of a file or folder; raises BundleError for a name that leads out of the bundle."""
    try:
        return path_inside(root, name)
    except ValueError as error:
        raise BundleError(f"{root}: unsafe manifest: {error}") from None


def state_of(root: Path, name: str) -> os.stat_result:
    """The state of a file.

    Raises:
        BundleError: it is missing, cannot be read, or is a folder, device or pipe.
    """
    try:
        found = path_of(root, name).stat()
    except OSError as error:
        raise _unreadable(root, name, error) from None
    if not stat.S_ISREG(found.st_mode):
        raise BundleError(f"{root}: {name} is not a file; build the bundle again")
    return found


def hash_of(root: Path, name: str) -> str:
    """Hexadecimal SHA-256 of a file.

    Raises:
        BundleError: it is missing, cannot be read, or is no file.
    """
    # First, because opening a pipe would wait for its other end.
    state_of(root, name)
    try:
        return sha256_file(path_of(root, name))
    except OSError as error:
        raise _unreadable(root, name, error) from None


def names_in(root: Path, folder: str) -> list[str]:
    """The files of a folder, by their names in the bundle, without those that operating systems leave in any folder.

    Raises:
        BundleError: it cannot be read.
    """
    try:
        return [f"{folder}/{path.name}" for path in entries(path_of(root, folder))]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise _unreadable(root, folder, error) from None


def _unreadable(root: Path, name: str, error: OSError) -> BundleError:
    """The error for a file or folder that could not be read, with the system's reason."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        return BundleError(f"{root}: {name} cannot be read: {error.strerror or error}")
    path = path_of(root, name)
    if path.is_symlink():
        return BundleError(
            f"{root}: {name} is missing: it is a link to {os.readlink(path)}, which is not there; copy bundles with "
            "the files that their links lead to (cp -rL)"
        )
    if not root.is_dir():
        return BundleError(f"{root}: the bundle is no longer there, so {name} cannot be read")
    return BundleError(f"{root}: {name} is missing; build the bundle again")
