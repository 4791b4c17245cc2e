"""The last stage: train the context encoder, then everything together, and write the checkpoints."""

import argparse
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from examples.mini_moma.checkpoint import write_checkpoint
from examples.mini_moma.context import ContextTask
from examples.mini_moma.joint import JointTask, Recipe
from examples.mini_moma.loop import Plan, averaged_weights, train
from examples.mini_moma.model import MiniMoma, Tokens, original_weights
from examples.mini_moma.vae import load_vae

_CONTEXT_STEPS = 3000


def add_options(p: argparse.ArgumentParser) -> None:
    """Add the options of this stage."""
    p.add_argument("--steps", type=int, default=12000, help="optimizer steps of 16 pictures a process (default: 12000)")
    p.add_argument("--context-steps", type=int, default=_CONTEXT_STEPS, help="steps of the context encoder alone")
    p.add_argument("--minutes", type=float, help="stop after so many minutes; run it again to go on")
    p.add_argument("--out", type=Path, default=Path("assets/mini"), metavar="DIR", help="where the checkpoints go")
    p.add_argument("--write-only", action="store_true", help="write the checkpoints of the weights so far, and stop")


def run(options: argparse.Namespace) -> None:
    """Train, then write the EMA of all weights to `options.out`.

    Raises:
        InputError: an earlier stage has not been run, or training was stopped.
    """
    data: Path = options.data
    # Before hours of training.
    tokens, vae = Tokens(data), load_vae(data)
    plan = Plan("joint", data, options.steps, rate=2e-3, decay=0.4, processes=options.processes)
    if not options.write_only:
        started, minutes = time.monotonic(), options.minutes
        context_plan = replace(plan, name="context", steps=options.context_steps, decay=0.5, minutes=minutes)
        context = train(partial(ContextTask, data), context_plan)
        if minutes is not None:
            minutes = max(0.0, minutes - (time.monotonic() - started) / 60)
        train(partial(JointTask, data, context, Recipe()), replace(plan, minutes=minutes))
    model = MiniMoma(tokens)
    average = averaged_weights(plan)
    model.load_state_dict({n.removeprefix("model."): t for n, t in average.items() if n.startswith("model.")})
    with torch.no_grad():
        weights = {**original_weights(model), "vae": vae.state_dict()}
        write_checkpoint(options.out, weights, data / "tokenizers" / "text", data / "tokenizers" / "language")
    print(f"{options.out}: the checkpoints, in the original's formats")
