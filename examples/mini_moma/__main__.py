"""`python -m examples.mini_moma STAGE`: train the small MoMA, a command a stage."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from moma_rt.errors import run_command

PROGRAM = "examples.mini_moma"
# Stage, module, help; modules are imported when needed, since PyTorch takes seconds.
_STAGES = (
    ("data", "examples.mini_moma.data", "render icons, compose pictures, train the tokenizers"),
    ("vae", "examples.mini_moma.vae", "train the VAE and encode all pictures"),
    ("train", "examples.mini_moma.train", "train everything else, and write the checkpoints"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {PROGRAM}",
        description="Train the small MoMA: data, then vae, then train. An interrupted stage resumes when run again.",
    )
    parser.add_argument("stage", choices=[name for name, _, _ in _STAGES], help="what to do")
    parser.add_argument("--data", type=Path, default=Path("build/mini"), metavar="DIR", help="where all of it is kept")
    parser.add_argument("--processes", type=int, default=2, help="processes of one thread each (default: 2)")
    argv = list(sys.argv[1:] if arguments is None else arguments)
    stage = next((s for s in _STAGES if s[0] in argv), None)
    module = importlib.import_module(stage[1]) if stage else None
    if module is not None:
        module.add_options(parser)
    options = parser.parse_args(argv)
    assert module is not None
    return run_command(PROGRAM, lambda: module.run(options) or 0)


if __name__ == "__main__":
    sys.exit(main())
