"""The `moma-rt` command: enroll a photo, generate pictures of its subject, inspect bundles and subjects."""

import argparse
import contextlib
import stat
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moma_rt import __version__
from moma_rt.backends import AUTO, NAMES
from moma_rt.errors import InputError, print_output, run_command
from moma_rt.files import atomic_write_all
from moma_rt.outputs import IMAGE_FORMATS, check_outputs, output_files, writing

if TYPE_CHECKING:
    from PIL import Image

    from moma_rt.pipeline.request import Result
    from moma_rt.pipeline.sampling import FloatArray, StepInfo
    from moma_rt.subject import Subject

PROGRAM = "moma-rt"
# Progress is printed every so many steps where stderr is not a terminal that can rewrite a line.
_STEPS_A_LINE = 10

_DESCRIPTION = "Put the subject of one photo into new pictures, without training."
_EPILOG = """\
examples:
  moma-rt enroll bundles/tiny car.jpg car-mask.png --name car --out car.subject
  moma-rt generate bundles/tiny car.subject "A car on a beach." --out beach.png
  moma-rt generate bundles/tiny car.subject "A car made of glass." --strength 0.4 --num-images 4 --out glass.png
  moma-rt inspect bundles/tiny

A bundle is the folder that `python -m export.build` writes. Wrong input ends with one line and exit code 2.
"""
_ENROLL_EPILOG = """\
The mask must have the photo's aspect ratio. Its black and transparent pixels are background, all others the subject.
A cut-out of the subject on a transparent ground is a mask too: all that is visible is the subject.

example:
  moma-rt enroll bundles/tiny bear.jpg bear-mask.png --name "teddy bear" --out bear.subject
"""
_GENERATE_EPILOG = """\
Use strength 1.0 for a new context and 0.4 for a new texture. Equal seeds give equal pictures; picture i of several
has seed SEED + i. With --num-images above 1, the names given to --out and --save-mask are numbered: beach-0.png,
beach-1.png and so on.

Schedulers: ddim is the original's. dpmpp_2m, dpmpp_2m_karras and euler need 20 to 30 steps. lcm, tcd and ddim_trailing
need 2 to 8 steps, --guidance-scale 1 and a bundle built with an LCM, TCD or Hyper-SD LoRA
(python -m export.build --lora). With a single step of these three, the subject's reference is not injected.

example:
  moma-rt generate bundles/tiny car.subject "A car in the snow." --seed 7 --out snow.png --contact-sheet sheet.png
"""


def entry(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0, 2 for wrong input, 130 after Ctrl-C, 141 when stdout was closed.
    """
    return run_command(PROGRAM, lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    arguments = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = arguments.command
    return command(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        PROGRAM, description=_DESCRIPTION, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_enroll(commands)
    _add_generate(commands)
    _add_inspect(commands)
    return parser


def _add_enroll(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "enroll",
        help="compute a subject file from a photo and its mask, once per subject",
        description="Compute a subject file from a photo and its mask. Every picture of the subject is made from it.",
        epilog=_ENROLL_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("bundle", type=Path, metavar="BUNDLE", help="folder that python -m export.build wrote")
    add("photo", type=Path, metavar="PHOTO", help="photo of the subject: any image format and size")
    add("mask", type=Path, metavar="MASK", help="image that is black or transparent outside the subject")
    add("--name", required=True, help='what prompts call the subject, such as car or "teddy bear"')
    add("--out", required=True, type=Path, metavar="FILE", help="subject file to write")
    add("--seed", type=int, default=0, help="seed of the reference's noise (default: 0)")
    _add_run_options(parser)
    parser.set_defaults(command=_enroll)


def _add_generate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    from moma_rt.schedulers.tables import ALL_TIMESTEPS, SCHEDULERS

    parser = commands.add_parser(
        "generate",
        help="make pictures of an enrolled subject",
        description="Make pictures of an enrolled subject from a prompt.",
        epilog=_GENERATE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("bundle", type=Path, metavar="BUNDLE", help="folder of the bundle that the subject was enrolled with")
    add("subject", type=Path, metavar="SUBJECT", help="file that moma-rt enroll wrote")
    add("prompt", metavar="PROMPT", help='sentence with the subject\'s name in it, such as "A car on a beach."')
    add("--out", required=True, type=Path, metavar="FILE", help=f"picture to write ({', '.join(IMAGE_FORMATS)})")
    add("--negative-prompt", default="", metavar="TEXT", help="what the picture should not show")
    add(
        "--strength",
        type=float,
        default=1.0,
        metavar="S",
        help="how strongly the subject's appearance is kept, 0 to 2 (default: 1.0)",
    )
    add("--steps", type=int, default=50, metavar="N", help="number of denoising steps (default: 50)")
    add(
        "--guidance-scale",
        type=float,
        default=7.5,
        metavar="G",
        help="how closely to follow the prompt, 0 to 100; 1 turns guidance off and takes half the time (default: 7.5)",
    )
    add(
        "--guidance-interval",
        type=_interval,
        default=ALL_TIMESTEPS,
        metavar="LOW,HIGH",
        help="timesteps with guidance; the others take half the time (default: {},{}: all)".format(*ALL_TIMESTEPS),
    )
    add("--scheduler", default="ddim", metavar="NAME", help=f"{', '.join(SCHEDULERS)} (default: ddim)")
    add("--seed", type=int, default=0, help="seed of the first picture (default: 0)")
    add("--num-images", type=int, default=1, metavar="N", help="number of pictures, 1 to 64 (default: 1)")
    add(
        "--context-embedding",
        type=Path,
        metavar="FILE",
        help=".npy file of 1024 floats that replaces the language model's output",
    )
    add("--save-mask", type=Path, metavar="FILE", help="also write the foreground mask, as a grayscale image")
    add("--contact-sheet", type=Path, metavar="FILE", help="also write photo, masks and pictures side by side")
    _add_run_options(parser)
    parser.set_defaults(command=_generate)


def _add_inspect(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "inspect",
        help="show what a bundle or a subject file holds",
        description="Show what a bundle or a subject file holds: sizes, precision, targets, memory and sources.",
    )
    parser.add_argument("path", type=Path, metavar="BUNDLE|SUBJECT", help="a bundle's folder or a subject file")
    parser.add_argument("--budget", metavar="BYTES", help="also tell which networks fit into so much memory, e.g. 8GB")
    parser.add_argument("--tensors", action="store_true", help="also list all tensors, engine files and kernels")
    parser.set_defaults(command=_inspect)


def _interval(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        raise InputError(f"--guidance-interval {text}: it must be two timesteps, LOW,HIGH") from None


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backend", default=AUTO, metavar="NAME", help=f"what runs the networks: {', '.join(NAMES)} (default: {AUTO})"
    )
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="number of CPU threads (default: one per core that this process may use)",
    )
    parser.add_argument(
        "--memory-budget",
        metavar="BYTES",
        help="evict networks so that those loaded need at most so much memory, e.g. 8GB (default: keep all loaded)",
    )
    parser.add_argument("--quiet", action="store_true", help="print only warnings and errors")


def _enroll(arguments: argparse.Namespace) -> int:
    check_outputs([arguments.out], [arguments.photo, arguments.mask], arguments.bundle)
    from moma_rt.runtime import Runtime

    start = time.perf_counter()
    runtime = Runtime.load(
        arguments.bundle, arguments.backend, arguments.threads, memory_budget=arguments.memory_budget
    )
    subject = runtime.enroll(arguments.photo, arguments.mask, arguments.name, seed=arguments.seed)
    with writing(arguments.out):
        subject.save(arguments.out)
    if not arguments.quiet:
        _print_seconds(subject.seconds, time.perf_counter() - start)
        print_output(str(arguments.out))
    return 0


def _generate(arguments: argparse.Namespace) -> int:
    from moma_rt.memory.limits import MAX_IMAGES
    from moma_rt.runtime import Runtime
    from moma_rt.subject import Subject

    # The runtime refuses a count out of range; this only keeps it from making that many names.
    count = min(max(arguments.num_images, 1), MAX_IMAGES)
    outputs = output_files(arguments.out, arguments.save_mask, arguments.contact_sheet, count)
    inputs = [path for path in (arguments.subject, arguments.context_embedding) if path is not None]
    check_outputs(outputs.all(), inputs, arguments.bundle)
    embedding = None if arguments.context_embedding is None else _read_embedding(arguments.context_embedding)

    start = time.perf_counter()
    runtime = Runtime.load(
        arguments.bundle, arguments.backend, arguments.threads, memory_budget=arguments.memory_budget
    )
    subject = Subject.load(arguments.subject)
    result = runtime.generate(
        subject,
        arguments.prompt,
        strength=arguments.strength,
        steps=arguments.steps,
        guidance_scale=arguments.guidance_scale,
        guidance_interval=arguments.guidance_interval,
        negative_prompt=arguments.negative_prompt,
        seed=arguments.seed,
        num_images=arguments.num_images,
        scheduler=arguments.scheduler,
        context_embedding=embedding,
        on_step=None if arguments.quiet else _progress,
    )
    written = _write_result(arguments, subject, result)
    if not arguments.quiet:
        _print_seconds(result.seconds, time.perf_counter() - start)
        print_output("\n".join(map(str, written)))
    return 0


def _read_embedding(path: Path) -> "FloatArray":
    """Read float32 [n] from a .npy file; the runtime checks n."""
    import numpy as np

    try:
        # Opening a pipe would block until its other end is opened.
        if not stat.S_ISREG(path.stat().st_mode):
            raise InputError(f"context embedding {path} is not a file")
        # Mapping compares the size in the header with the file's, so a false header cannot allocate a huge array.
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise InputError(f"context embedding {path} cannot be read: {error.strerror or error}") from None
    except InputError:
        raise
    except Exception:
        # The header is Python source: which exception a malformed one raises depends on the NumPy version.
        array = None
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
        raise InputError(f"context embedding {path} is not a .npy file of floats (numpy.save writes one)")
    if array.ndim != 1:
        raise InputError(f"context embedding {path} has shape {list(array.shape)}: it must have one dimension")
    return np.array(array, np.float32)


def _write_result(arguments: argparse.Namespace, subject: "Subject", result: "Result") -> list[Path]:
    from PIL import Image

    from moma_rt.inputs.images import contact_sheet

    masks = [_gray(mask) for mask in result.foreground_masks]
    outputs = output_files(arguments.out, arguments.save_mask, arguments.contact_sheet, len(masks))
    files = dict(zip(outputs.pictures, result.images, strict=True))
    if outputs.masks:
        files |= dict(zip(outputs.masks, masks, strict=True))
    if outputs.sheet is not None:
        photo = Image.fromarray(subject.photo)
        items = [("photo", photo), ("mask", Image.fromarray(subject.mask).resize(photo.size))]
        for seed, picture, mask in zip(result.seeds, result.images, masks, strict=True):
            items += [(f"seed {seed}", picture), ("foreground", mask)]
        files[outputs.sheet] = contact_sheet(items)
    with writing(), atomic_write_all(list(files)) as temporaries:
        for (path, image), temporary in zip(files.items(), temporaries, strict=True):
            with writing(path):
                image.save(temporary, format=IMAGE_FORMATS[path.suffix.lower()])
    return list(files)


def _gray(mask_hw: "FloatArray") -> "Image.Image":
    from PIL import Image

    return Image.fromarray((mask_hw * 255.0).round().astype("uint8"))


def _inspect(arguments: argparse.Namespace) -> int:
    from moma_rt.bundle.footprint import parse_bytes
    from moma_rt.inspection import describe

    budget = None if arguments.budget is None else parse_bytes(arguments.budget)
    print_output(describe(arguments.path, budget, tensors=arguments.tensors))
    return 0


def _progress(info: "StepInfo") -> None:
    line = f"step {info.step}/{info.steps} (t = {info.timestep})"
    last = info.step == info.steps
    # Failing to print progress must not end the work.
    with contextlib.suppress(OSError):
        if sys.stderr is None:
            return
        if sys.stderr.isatty():
            print(f"\r{line:<40}", end="\n" if last else "", file=sys.stderr, flush=True)
        elif last or info.step % _STEPS_A_LINE == 0:
            print(line, file=sys.stderr)


def _print_seconds(seconds: Mapping[str, float], total: float) -> None:
    with contextlib.suppress(OSError):
        for stage, value in seconds.items():
            print(f"{stage:<20}{value:8.2f} s", file=sys.stderr)
        print(f"{'total':<20}{total:8.2f} s", file=sys.stderr)
