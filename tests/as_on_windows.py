"""Takes away what Python lacks on Windows, and lets calls fail that fail there, for a whole process.

Put a `sitecustomize.py` that calls `install` on the path of a child process. What cannot be imitated on another system:
backslashes, Windows' own locks, and whatever libraries do differently there.
"""

import builtins
import errno
import fcntl
import io
import os
import signal
import stat
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

POSIX_MODULES = frozenset(
    {"fcntl", "resource", "pwd", "grp", "spwd", "crypt", "termios", "pty", "tty", "syslog", "readline", "nis", "posix"}
)
_PACKAGES = ("moma_rt", "engines", "kernels", "export")
_CALLS = (
    *("chown", "fchmod", "fchown", "fork", "forkpty", "getegid", "geteuid", "getgid", "getgroups", "getloadavg"),
    *("getpgid", "getresuid", "getuid", "killpg", "lchown", "link", "mkfifo", "mknod", "nice", "posix_fadvise"),
    *("posix_fallocate", "pread", "pwrite", "register_at_fork", "sched_getaffinity", "sched_setaffinity", "setpgid"),
    *("setsid", "setuid", "statvfs", "sysconf", "uname", "wait3", "wait4", "waitid"),
    *("O_CLOEXEC", "O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK", "O_SYNC", "WNOHANG"),
)
_SIGNALS = ("SIGALRM", "SIGHUP", "SIGKILL", "SIGPIPE", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXFSZ", "setitimer")
_FORBIDDEN_CHARACTERS = frozenset('<>:"|?*\\')
_DEVICES = frozenset(
    {"con", "prn", "aux", "nul", *(f"com{i}" for i in range(1, 10)), *(f"lpt{i}" for i in range(1, 10))}
)


def install(root: str) -> None:
    """Imitate Windows: for files below `root`, and for modules and calls that this project's packages use."""
    # Libraries look at sys.platform, and use on Linux what Linux has: only this project's packages find it missing.
    _hide_modules()
    for owner, names in ((os, _CALLS), (signal, _SIGNALS)):
        _hide_attributes(owner, names)
    # Before shutil is imported, which looks at it.
    os.supports_dir_fd = set()
    _limit_calls(Path(root))
    # An encoding that is not given is that of the user's language there.
    warnings.filterwarnings("error", category=EncodingWarning, module=rf"({'|'.join(_PACKAGES)})\b")


def _caller(depth: int = 2) -> str:
    """The package of the code that called the caller of this."""
    return str(sys._getframe(depth).f_globals.get("__name__", "")).partition(".")[0]


def _hide_modules() -> None:
    import_module = builtins.__import__

    def limited(name: str, globals: Any = None, *rest: Any, **named: Any) -> Any:
        package = str((globals or {}).get("__name__", "")).partition(".")[0]
        if name in POSIX_MODULES and package in _PACKAGES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return import_module(name, globals, *rest, **named)

    builtins.__import__ = limited


def _hide_attributes(module: Any, names: tuple[str, ...]) -> None:
    """Let a module lack attributes, if it is asked by one of this project's packages."""

    class Lacking(type(module)):
        def __getattribute__(self, name: str) -> Any:
            if name in names and _caller() in _PACKAGES:
                raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
            return super().__getattribute__(name)

    module.__class__ = Lacking


def _limit_calls(root: Path) -> None:
    def below(path: Any) -> bool:
        try:
            return isinstance(path, str | os.PathLike) and root in Path(os.path.abspath(os.fsdecode(path))).parents
        except (TypeError, ValueError):
            return False

    def check_name(path: Any) -> None:
        name = os.path.basename(os.fsdecode(path))
        is_device = name.partition(".")[0].casefold() in _DEVICES
        if not _FORBIDDEN_CHARACTERS.isdisjoint(name) or name.endswith((" ", ".")) or is_device:
            raise OSError(errno.EINVAL, "The filename, directory name, or volume label syntax is incorrect", str(path))

    def denied(path: Any, why: str) -> PermissionError:
        return PermissionError(errno.EACCES, why, str(path))

    def in_use(path: Any) -> bool:
        """Whether this process has a file, or a file of a folder, open or mapped."""
        place = os.path.realpath(path)
        found = [_link(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
        with real_open("/proc/self/maps", encoding="utf-8") as maps:
            found += [line.rstrip("\n").split(maxsplit=5)[-1] for line in maps]
        return any(name == place or name.startswith(f"{place}/") for name in found)

    def check_removable(path: Any) -> None:
        if in_use(path):
            raise denied(path, "The process cannot access the file because it is being used by another process")
        if not os.path.islink(path) and os.path.isfile(path) and not os.stat(path).st_mode & stat.S_IWRITE:
            raise denied(path, "Access is denied")

    def wrap(name: str, check: Callable[..., None]) -> None:
        call = getattr(os, name)

        def limited(path: Any, *rest: Any, **named: Any) -> Any:
            if below(path):
                check(path, *rest)
            return call(path, *rest, **named)

        setattr(os, name, limited)

    def check_open(path: Any, flags: int, *_: Any) -> None:
        if os.path.isdir(path):
            raise denied(path, "Permission denied")
        if flags & os.O_CREAT:
            check_name(path)
        if flags & (os.O_WRONLY | os.O_RDWR) and os.path.isfile(path) and not os.stat(path).st_mode & stat.S_IWRITE:
            raise denied(path, "Permission denied")

    def check_rename(source: Any, target: Any) -> None:
        check_name(target)
        if in_use(source):
            raise denied(source, "The process cannot access the file because it is being used by another process")
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, "Cannot create a file when that file already exists", str(source))

    def check_replace(source: Any, target: Any) -> None:
        check_name(target)
        if in_use(source) or os.path.isdir(target):
            raise denied(source, "Access is denied")
        if os.path.lexists(target):
            check_removable(target)

    def check_symlink(*_: Any) -> None:
        raise OSError(errno.EINVAL, "A required privilege is not held by the client")

    real_open, fsync = io.open, os.fsync

    def limited_open(file: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
        if below(file):
            kind = os.O_RDWR | os.O_CREAT if set(mode) & set("wax+") else os.O_RDONLY
            check_open(file, kind)
        # The wrapper must not hide where a missing encoding is.
        return real_open(file, mode, *rest, **{**named, **_encoding(mode, rest, named)})

    def limited_fsync(handle: int) -> None:
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        fsync(handle)

    for name, check in (
        *(("open", check_open), ("mkdir", lambda path, *_: check_name(path)), ("rename", check_rename)),
        *(("replace", check_replace), ("unlink", check_removable), ("remove", check_removable)),
        ("symlink", check_symlink),
    ):
        wrap(name, check)
    io.open = builtins.open = limited_open
    os.fsync = limited_fsync


def _encoding(mode: str, rest: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    """Refuse to open a text without an encoding for this project's packages."""
    if "b" not in mode and len(rest) < 2 and named.get("encoding") is None and _caller(3) in _PACKAGES:
        raise EncodingWarning("'encoding' argument not specified")
    return {}


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""
