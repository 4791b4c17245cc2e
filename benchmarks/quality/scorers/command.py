"""Train the scorers of the evaluation on renders, in minutes of one core: `python -m benchmarks.quality.scorers`.

Writes reader.onnx, embedder.onnx, and scorers.json with their accuracy on renders of held-out subjects. Pictures are
softened in training as a small VAE would, since generated pictures are softer than renders.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moma_rt.errors import InputError, print_output, run_command
from moma_rt.files import atomic_write_all

PROGRAM = "benchmarks.quality.scorers"
_FOLDER = Path(__file__).parent


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog=f"python -m {PROGRAM}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--data",
        type=Path,
        default=Path("build/mini"),
        metavar="DIR",
        help="folder that `python -m examples.mini_moma data` wrote (default: build/mini)",
    )
    p.add_argument(
        "--out", type=Path, default=_FOLDER, metavar="DIR", help="folder to write to (default: this package)"
    )
    p.add_argument("--reader-steps", type=int, default=700, metavar="N", help="steps of the reader (default: 700)")
    p.add_argument("--embedder-steps", type=int, default=600, metavar="N", help="steps of the embedder (default: 600)")
    p.add_argument("--seed", type=int, default=0, help="seed of renders and training (default: 0)")
    p.add_argument("--threads", type=int, default=1, metavar="N", help="threads of PyTorch (default: 1)")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = parser().parse_args(arguments)
    return run_command(PROGRAM, lambda: _train(options))


def _train(options: argparse.Namespace) -> int:
    # Only now: --help needs no PyTorch.
    import numpy as np
    import torch

    from benchmarks.quality.scorers.samples import draw_backgrounds, render
    from benchmarks.quality.scorers.scorer import CARD, EMBEDDER, READER
    from benchmarks.quality.scorers.training import Plan, embedder_onnx, reader_onnx, train_embedder, train_reader
    from examples.mini_moma.icons import heldout_names, load_icons

    for name in ("reader_steps", "embedder_steps", "threads"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(options, name)}: at least 1 is needed")
    torch.set_num_threads(options.threads)
    started, cpu_started = time.monotonic(), time.process_time()
    held_out = heldout_names()
    icons = [icon for icon in load_icons(options.data) if icon.name not in held_out]
    rng = np.random.default_rng(options.seed)
    # Twice, in other colours and contexts.
    samples = render([*icons, *icons], rng, draw_backgrounds(rng))
    plan = Plan(options.reader_steps, options.embedder_steps, options.seed)
    reader = train_reader(samples, plan)
    embedder = train_embedder(samples, reader, plan)
    with atomic_write_all([options.out / name for name in (READER, EMBEDDER, CARD)]) as paths:
        networks = reader_onnx(reader), embedder_onnx(embedder)
        for path, content in zip(paths, networks, strict=False):
            path.write_bytes(content)
        card = {
            "trained_on": {"icons": len(icons), "pictures": int(samples.grounds_nk.size), "seed": options.seed},
            "steps": {"reader": plan.reader_steps, "embedder": plan.embedder_steps},
            "cpu_seconds": round(time.process_time() - cpu_started),
            "accuracy": _accuracies(networks),
        }
        paths[2].write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    print_output(json.dumps(card, indent=1))
    print_output(f"{options.out}: {sum(map(len, networks)) / 1e6:.2f} MB, in {time.monotonic() - started:.0f} s")
    return 0


def _accuracies(networks: Sequence[bytes]) -> dict[str, Any]:
    """Measure the networks on the evaluation's subjects, which they were not trained on."""
    import tempfile

    import numpy as np

    from benchmarks.quality.scorers.accuracy import accuracy
    from benchmarks.quality.scorers.samples import render_all
    from benchmarks.quality.scorers.scorer import CARD, EMBEDDER, READER, Scorers
    from benchmarks.quality.scorers.softening import Softener
    from benchmarks.quality.subjects import load_subjects

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, content in zip((READER, EMBEDDER, CARD), (*networks, b"{}"), strict=True):
            (folder / file).write_bytes(content)
        scorers = Scorers(folder)
    samples = render_all(load_subjects(), np.random.default_rng(99))
    return {
        "subjects": len(samples.photos_nhwc),
        "renders": accuracy(scorers, samples),
        "softened_renders": accuracy(scorers, samples, Softener(99)),
    }


if __name__ == "__main__":
    sys.exit(main())
