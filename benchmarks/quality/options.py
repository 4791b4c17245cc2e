"""Options that the evaluation's commands share, and what they open."""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from benchmarks.quality.cases import CONTEXT, KEYS, TEXTURE, Setup
from benchmarks.quality.evaluation import Selection
from benchmarks.quality.subjects import COUNT
from engines.targets import parse_list
from moma_rt import backends
from moma_rt.errors import InputError
from moma_rt.runtime import Runtime
from moma_rt.schedulers.tables import SCHEDULERS, schedule

NONE = "none"


def add_bundle_options(p: argparse.ArgumentParser) -> None:
    """Add the bundle and how it runs."""
    p.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder of the bundle to evaluate")
    p.add_argument("--backend", default=backends.AUTO, metavar="NAME", help="backend of the runtime (default: auto)")
    p.add_argument("--threads", type=int, metavar="N", help="CPU threads of the runtime (default: all cores)")
    p.add_argument(
        "--max-batch",
        type=int,
        default=1,
        metavar="N",
        help="pictures that share a batch; pays off on a GPU, and pictures may then differ by rounding (default: 1)",
    )


def add_setup_options(p: argparse.ArgumentParser) -> None:
    """Add how pictures are made."""
    usual = Setup()
    p.add_argument("--steps", type=int, default=usual.steps, help=f"denoising steps (default: {usual.steps})")
    p.add_argument(
        "--guidance-scale",
        type=float,
        metavar="SCALE",
        help=f"guidance scale (default: {usual.guidance_scale:g}; 1 for schedulers of few steps)",
    )
    p.add_argument(
        "--scheduler", choices=SCHEDULERS, default=usual.scheduler, help=f"scheduler (default: {usual.scheduler})"
    )
    p.add_argument(
        "--strength",
        type=float,
        default=usual.strength,
        help=f"strength of the reference in a new context (default: {usual.strength:g})",
    )
    p.add_argument(
        "--texture-strength",
        type=float,
        default=usual.texture_strength,
        metavar="STRENGTH",
        help=f"the same for a new texture (default: {usual.texture_strength:g})",
    )


def setup_of(options: argparse.Namespace) -> Setup:
    """Return how pictures are made.

    Raises:
        InputError: the scheduler does not make that many steps.
    """
    scale = usual_guidance(options.scheduler) if options.guidance_scale is None else options.guidance_scale
    schedule(options.scheduler, options.steps, scale)
    return Setup(options.steps, scale, options.scheduler, options.strength, options.texture_strength)


def usual_guidance(scheduler: str) -> float:
    """Return the guidance scale for a scheduler: 1 for those of few steps, whose weights include it."""
    return 1.0 if scheduler in FEW_STEPS else Setup().guidance_scale


# The schedulers for bases that were distilled to few steps.
FEW_STEPS = ("lcm", "tcd", "ddim_trailing")


def subject_count(count: int) -> int:
    """Check --subjects.

    Raises:
        InputError: there are not so many.
    """
    if not 1 <= count <= COUNT:
        raise InputError(f"--subjects {count}: it must be 1 to {COUNT}")
    return count


def selection_of(options: argparse.Namespace) -> Selection:
    """Return the subjects, contexts and materials to evaluate.

    Raises:
        InputError: there are not so many subjects, a name is unknown, or nothing is left.
    """
    return Selection(
        subject_count(options.subjects),
        names("--contexts", "context", options.contexts, KEYS[CONTEXT]),
        names("--textures", "texture", options.textures, KEYS[TEXTURE]),
    )


def names(option: str, kind: str, text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """Parse names separated by commas, or "none".

    Raises:
        InputError: a name is not in `known`.
    """
    return () if text == NONE else parse_list(option, kind, text, known)


def load_runtime(options: argparse.Namespace) -> Runtime:
    """Open the bundle.

    Raises:
        MomaError: as for `Runtime.load`.
    """
    return Runtime.load(options.bundle, options.backend, options.threads, max_batch=options.max_batch)


def shareable(program: str, given: Sequence[str], bundle: Path) -> str:
    """Return the command line, with a placeholder for the bundle's path, and of other absolute paths only the name."""
    shown = ["BUNDLE" if argument == str(bundle) else argument for argument in given]
    shown = [Path(argument).name if Path(argument).is_absolute() else argument for argument in shown]
    return shlex.join(["python", "-m", program, *shown])
