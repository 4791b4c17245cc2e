"""The lock of a bundle that is being built."""

import contextlib
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from filelock import Timeout, UnixFileLock, WindowsFileLock

from moma_rt.errors import InputError
from moma_rt.messages import warn


@contextlib.contextmanager
def build_lock(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, which stays; the operating system releases the lock when the process ends.

    Where the file system has no locks, such as NFS without a lock manager, warn and go on without.

    Raises:
        InputError: another build holds the lock.
        OSError: the file cannot be written.
    """
    if path.is_symlink():
        # Leads to what is not this bundle's, such as a blob of Hugging Face's hub.
        path.unlink()
    if path.is_file() and not os.access(path, os.W_OK):
        # A copied bundle may be read-only.
        with contextlib.suppress(OSError):
            path.chmod(path.stat().st_mode | stat.S_IWUSR)
    # Here, because a failure to open says nothing about locks.
    path.open("ab").close()
    native = WindowsFileLock if sys.platform == "win32" else UnixFileLock
    # Not filelock's substitute, a file that exists while the lock is held: it stays if a build on another machine dies.
    lock = native(path, timeout=0, fallback_to_soft=False, preserve_lock_file=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock)
        except Timeout:
            raise InputError(
                f"{path.parent}: another build is writing it; wait for it or choose another folder"
            ) from None
        except OSError as error:
            reason = error.strerror or error
            warn(f"{path.parent} cannot be locked ({reason}): make sure that no other build writes it")
        yield
