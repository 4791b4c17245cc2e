"""Compile the kernels of SD1.5's attention layers to PTX, without a GPU: `python -m kernels.compile --out DIR`."""

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kernels.dispatch import HAS_TRITON
from kernels.launch import CAPABILITIES, DEFAULT_CAPABILITIES

if TYPE_CHECKING:
    from kernels.ptx import CompiledKernel


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

    # A folder cannot be renamed to a symlink.
    out = Path(os.path.realpath(options.out))
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            p.error(f"--out {options.out}: is not an empty folder; give a new or an empty one")
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=out.parent))
    except OSError as error:
        p.error(f"--out {options.out}: cannot be written: {error.strerror}")
    try:
        report = _show_progress if sys.stderr.isatty() else _ignore
        compiled = write_kernels(partial, SD15_LAYERS, DTYPES, [int(text) for text in asked], report)
        partial.chmod(0o755)
        for path in (*partial.iterdir(), partial):
            _fsync(path)
        try:
            partial.rename(out)
        except OSError as error:
            p.error(f"--out {options.out}: cannot be written: {error.strerror}")
    except CompileError as error:
        p.error(str(error))
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _print_table(compiled)
    return 0


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
