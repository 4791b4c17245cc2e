"""Compile the kernels of SD1.5's attention layers to PTX, without a GPU: `python -m kernels.compile --out DIR`."""

import argparse
import contextlib
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kernels.dispatch import HAS_TRITON
from kernels.launch import CAPABILITIES, DEFAULT_CAPABILITIES

if TYPE_CHECKING:
    from kernels.ptx import CompiledKernel

_PARTIAL_PREFIX = ".partial-"
_STRAY = ("thumbs.db", "desktop.ini", "lost+found", "@eadir", "$recycle.bin", "system volume information")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m kernels.compile",
        description="Compile both operators' kernels to PTX, for every attention layer of SD1.5 at 512², in fp16 and "
        "bf16, and print each kernel's threads, shared memory, registers and spills. Needs no GPU.",
    )
    default = ",".join(map(str, DEFAULT_CAPABILITIES))
    p.add_argument(
        "--capabilities",
        default=default,
        metavar="LIST",
        help="compute capabilities to compile for, separated by commas, out of "
        f"{', '.join(map(str, CAPABILITIES))} (default: %(default)s)",
    )
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write; must be new or empty")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    p = parser()
    options = p.parse_args(arguments)
    asked = dict.fromkeys(text.strip() for text in options.capabilities.split(","))
    unknown = [text for text in asked if text not in map(str, CAPABILITIES)]
    if unknown:
        p.error(f"--capabilities: no {', '.join(map(repr, unknown))}; there are: {', '.join(map(str, CAPABILITIES))}")
    if not HAS_TRITON:
        p.error("Triton is not installed: pip install triton")
    # Imported late, because kernels.ptx needs Triton.
    from kernels.ptx import DTYPES, SD15_LAYERS, CompileError, write_kernels

    out, capabilities = options.out, [int(text) for text in asked]
    report = _show_progress if sys.stderr.isatty() else _ignore
    try:
        if out.exists() and (not out.is_dir() or any(not _is_stray(path.name) for path in out.iterdir())):
            p.error(f"--out {out}: is not an empty folder; give a new or an empty one")
        with _new_folder(out) as partial:
            compiled = write_kernels(partial, SD15_LAYERS, DTYPES, capabilities, report)
    except CompileError as error:
        p.error(str(error))
    except OSError as error:
        p.error(f"--out {out}: cannot be written: {error.strerror or error}")
    _print_table(compiled)
    return 0


def _is_stray(name: str) -> bool:
    """Whether an operating system or a killed run of this program may have left a file of this name in the folder."""
    return name.startswith(".") or name.casefold() in _STRAY


@contextlib.contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder in `out`, and move its files to `out`, the list of kernels last.

    After an error, `out` is as it was before.
    """
    from kernels.ptx import INDEX_NAME

    is_new = not out.is_dir()
    out.mkdir(parents=True, exist_ok=True)
    for left in out.glob(f"{_PARTIAL_PREFIX}*"):
        shutil.rmtree(left, ignore_errors=True)
    moved: list[Path] = []
    try:
        # Inside, since `out` may be the root of a file system.
        with tempfile.TemporaryDirectory(prefix=_PARTIAL_PREFIX, dir=out, ignore_cleanup_errors=True) as partial:
            yield Path(partial)
            for path in sorted(Path(partial).iterdir(), key=lambda path: path.name == INDEX_NAME):
                moved.append(out / path.name)
                # Copied where the file system cannot rename, without permissions, which it may not have.
                shutil.move(path, moved[-1], copy_function=shutil.copyfile)
    except BaseException:
        for path in moved:
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            if is_new:
                out.rmdir()
        raise


def _show_progress(text: str) -> None:
    print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def _ignore(_: str) -> None:
    """Show no progress where stderr is not a terminal."""


def _print_table(compiled: "Iterable[CompiledKernel]") -> None:
    print(f"{'kernel':<64} {'threads':>7} {'shared':>7} {'registers':>9} {'spilled':>7}")
    for k in compiled:
        print(f"{k.file:<64} {k.threads:>7} {k.shared_bytes:>7} {k.registers:>9} {k.spill_bytes:>7}")


if __name__ == "__main__":
    sys.exit(main())
