"""Delete what no bundle uses from a shared store: `python -m engines.prune STORE`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from engines.store import NETWORKS_FOLDER, SharedStore
from moma_rt.errors import InputError, print_output, run_command

PROGRAM = "engines.prune"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog=f"python -m {PROGRAM}",
        description="Delete the graphs, weights, kernels and engines in a shared store that no bundle links any more. "
        "Do not run a build at the same time.",
    )
    p.add_argument("store", type=Path, metavar="STORE", help="folder of the store, such as bundles/.store")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = parser().parse_args(arguments)
    return run_command(PROGRAM, lambda: _prune(options.store))


def _prune(root: Path) -> int:
    if not (root / NETWORKS_FOLDER).is_dir():
        raise InputError(f"{root} is no store: it has no folder {NETWORKS_FOLDER}")
    if (root / "manifest.json").exists():
        raise InputError(f"{root} is a bundle, not the store beside it")
    print_output(f"{root}: {SharedStore(root).prune() / 1e6:,.1f} MB freed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
