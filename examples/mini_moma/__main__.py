"""`python -m examples.mini_moma STAGE`: train the small MoMA, a command a stage."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from moma_rt.errors import InputError, run_command

PROGRAM = "examples.mini_moma"
# Stage, module, help; modules are imported when needed, since PyTorch takes seconds.
_STAGES = (
    ("data", "examples.mini_moma.data", "render icons, compose pictures, train the tokenizers"),
    ("vae", "examples.mini_moma.vae", "train the VAE and encode all pictures"),
    ("train", "examples.mini_moma.train", "train everything else, and write the checkpoints"),
)
# The smallest values of options that some stages have.
_LEAST = (("processes", 1), ("steps", 1), ("context_steps", 1), ("minutes", 0))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    return run_command(PROGRAM, lambda: _run(argv))


def _run(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog=f"python -m {PROGRAM}",
        description="Train the small MoMA: data, then vae, then train. An interrupted stage resumes when run again.",
    )
    stages = parser.add_subparsers(required=True, metavar="STAGE")
    for stage, module, text in _STAGES:
        p = stages.add_parser(stage, help=text, description=f"{text[0].upper()}{text[1:]}.")
        p.add_argument("--data", type=Path, default=Path("build/mini"), metavar="DIR", help="where all of it is kept")
        p.add_argument("--processes", type=int, default=2, help="processes of one thread each (default: 2)")
        # The parser has no options of its own that could stand before the stage.
        if stage in argv[:1]:
            found = importlib.import_module(module)
            found.add_options(p)
            p.set_defaults(run=found.run)
    options = parser.parse_args(argv)
    for name, least in _LEAST:
        value = getattr(options, name, None)
        if value is not None and not value >= least:
            raise InputError(f"--{name.replace('_', '-')} must be at least {least}, not {value}")
    options.run(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
