"""`python -m kernels.compile`: the kernels of SD1.5's attention layers to PTX, without a GPU."""

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
        description="Compile both operators' kernels for every attention layer of SD1.5 at 512², in fp16 and bf16, to "
        "PTX. No GPU is needed.",
    )
    default = ",".join(map(str, DEFAULT_CAPABILITIES))
    p.add_argument(
        "--capabilities",
        default=default,
        metavar="LIST",
        help=f"separated by commas, of {', '.join(map(str, CAPABILITIES))} (default: %(default)s)",
    )
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="a folder that does not exist yet")
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
    # Now, for it imports Triton.
    from kernels.ptx import DTYPES, SD15_LAYERS, CompileError, write_kernels

    out = options.out.absolute()
    if out.exists():
        p.error(f"--out {options.out}: exists already")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=out.parent))
    except OSError as error:
        p.error(f"--out {options.out}: cannot be written: {error.strerror}")
    try:
        say = _progress if sys.stderr.isatty() else _silent
        compiled = write_kernels(partial, SD15_LAYERS, DTYPES, [int(text) for text in asked], say)
        partial.chmod(0o755)
        for path in (*partial.iterdir(), partial):
            _fsync(path)
        partial.rename(out)
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


def _progress(text: str) -> None:
    print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def _silent(_: str) -> None:
    """Where nobody watches."""


def _print_table(compiled: "Iterable[CompiledKernel]") -> None:
    print(f"{'kernel':<64} {'threads':>7} {'shared':>7} {'registers':>9} {'spilled':>7}")
    for k in compiled:
        print(f"{k.file:<64} {k.threads:>7} {k.shared_bytes:>7} {k.registers:>9} {k.spill_bytes:>7}")


if __name__ == "__main__":
    sys.exit(main())
