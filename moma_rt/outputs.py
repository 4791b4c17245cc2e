"""The files that the command line writes: checked before any work starts, written completely or not at all."""

import contextlib
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moma_rt.errors import InputError

IMAGE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


@dataclass(frozen=True)
class OutputFiles:
    """The files that `moma-rt generate` writes."""

    pictures: list[Path]
    masks: list[Path]
    sheet: Path | None

    def all(self) -> list[Path]:
        return [*self.pictures, *self.masks, *([] if self.sheet is None else [self.sheet])]


def output_files(out: Path, mask: Path | None, sheet: Path | None, count: int) -> OutputFiles:
    """The files for `count` pictures: `out` and `mask` are numbered if there are several.

    Raises:
        InputError: a suffix that is not one of `IMAGE_FORMATS`.
    """
    for path in (out, mask, sheet):
        if path is not None and path.suffix.lower() not in IMAGE_FORMATS:
            suffix = path.suffix or "a file without suffix"
            raise InputError(f"{path}: cannot write {suffix}; use {', '.join(IMAGE_FORMATS)}")
    return OutputFiles(numbered(out, count), [] if mask is None else numbered(mask, count), sheet)


def numbered(path: Path, count: int) -> list[Path]:
    """`path` itself for one file, else path-0, path-1 and so on before the suffix."""
    return [path] if count == 1 else [path.with_stem(f"{path.stem}-{i}") for i in range(count)]


def check_outputs(outputs: Sequence[Path], inputs: Sequence[Path], bundle: Path) -> None:
    """Refuse files that cannot be written, or that would overwrite an input, another output or part of the bundle.

    Raises:
        InputError: names the file and the reason.
    """
    from moma_rt.bundle.manifest import MANIFEST_NAME

    # Not Path.resolve: before Python 3.13 it raises RuntimeError for links in a circle.
    inside = Path(_place(bundle)) if os.path.isfile(bundle / MANIFEST_NAME) else None
    taken = {_place(path) for path in inputs}
    folders = {str(folder) for path in outputs for folder in Path(_place(path)).parents}
    for path in outputs:
        _check_writable(path)
        place = _place(path)
        if place in taken:
            raise InputError(f"{path} is given twice: each file must have its own name")
        if place in folders:
            raise InputError(f"{path} is given as a file and as the folder of another")
        if inside is not None and Path(place).is_relative_to(inside):
            raise InputError(f"{path} is inside the bundle {bundle}: write it elsewhere")
        taken.add(place)


def _place(path: Path) -> str:
    """The same text for all names of a file: without links, and in one case where names have none (Windows)."""
    return os.path.normcase(os.path.realpath(path))


def _check_writable(path: Path) -> None:
    """Refuse a path that cannot be written, before minutes are spent on its content."""
    with writing(path):
        try:
            mode = path.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            mode = stat.S_IFREG
        if stat.S_ISDIR(mode):
            raise InputError(f"{path} is a folder: give a file to write")
        if not stat.S_ISREG(mode):
            raise InputError(f"{path} is a device or pipe: give a file to write")
        # A link stays, and the file that it leads to is written.
        folder = next((p for p in Path(os.path.realpath(path)).parents if p.exists()), Path("/"))
        if not folder.is_dir():
            raise InputError(f"cannot write {path}: {folder} is not a folder")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise InputError(f"cannot write {path}: no permission to write in {folder}")


@contextlib.contextmanager
def writing(path: Path | None = None) -> Iterator[None]:
    """Turn an OSError into an InputError that names `path`, or the file that the error names."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write {path or error.filename or 'a file'}: {error.strerror or error}") from None
