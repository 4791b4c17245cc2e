"""The `moma-rt` command: enroll a photo, generate pictures of its subject, inspect bundles and subjects.

Whatever can be wrong is looked for before work starts; files are written completely or not at all.
"""

import argparse
import contextlib
import io
import os
import stat
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moma_rt import __version__
from moma_rt.backends import AUTO, NAMES
from moma_rt.errors import InputError, print_output, run_command
from moma_rt.files import atomic_write_all

if TYPE_CHECKING:
    from PIL import Image

    from moma_rt.pipeline.request import Result
    from moma_rt.pipeline.sampling import FloatArray, StepInfo
    from moma_rt.subject import Subject

PROGRAM = "moma-rt"
IMAGE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
# Where the terminal cannot rewrite a line, one line in this many steps is enough.
_STEPS_A_LINE = 10

_DESCRIPTION = "Put the subject of one photo into new pictures, with no training."
_EPILOG = """\
examples:
  moma-rt enroll bundles/tiny car.jpg car-mask.png --name car --out car.subject
  moma-rt generate bundles/tiny car.subject "A car on a beach." --out beach.png
  moma-rt generate bundles/tiny car.subject "A car made of glass." --strength 0.4 --num-images 4 --out glass.png
  moma-rt inspect bundles/tiny

A bundle is the folder that `python -m export.build` makes. Mistakes in what is given end with one line
and exit code 2.
"""
_ENROLL_EPILOG = """\
The mask has the photo's aspect ratio; everything that is not black belongs to the subject.

example:
  moma-rt enroll bundles/tiny bear.jpg bear-mask.png --name "teddy bear" --out bear.subject
"""
_GENERATE_EPILOG = """\
strength 1.0 puts the subject into a new context, 0.4 gives it a new texture. The same seed gives the same
picture; picture i of several has seed SEED + i. With --num-images above 1, --out beach.png and --save-mask
become beach-0.png, beach-1.png and so on.

ddim is the original's scheduler. dpmpp_2m and dpmpp_2m_karras are meant for 20 to 30 steps; lcm, tcd and ddim_trailing
for 2 to 8, with --guidance-scale 1 and a bundle built with an LCM, TCD or Hyper-SD LoRA (python -m export.build
--lora). With one step of theirs the subject's reference is not injected.

example:
  moma-rt generate bundles/tiny car.subject "A car in the snow." --seed 7 --out snow.png --contact-sheet sheet.png
"""


@dataclass(frozen=True)
class _Outputs:
    """The files that a generation writes."""

    pictures: list[Path]
    masks: list[Path]
    sheet: Path | None

    def all(self) -> list[Path]:
        return [*self.pictures, *self.masks, *([] if self.sheet is None else [self.sheet])]


def entry(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, 2 for a mistake of the user, 130 when interrupted, 141 when stdout is gone."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal's encoding may not have every character of a file's name.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
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
    inspect = commands.add_parser(
        "inspect", help="show what a bundle or a subject file holds", description="Show what a file holds."
    )
    inspect.add_argument("path", type=Path, metavar="BUNDLE|SUBJECT")
    inspect.add_argument(
        "--budget", metavar="BYTES", help="also tell what of a bundle fits so much memory, such as 8GB"
    )
    inspect.set_defaults(command=_inspect)
    return parser


def _add_enroll(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "enroll",
        help="compute once what a photo contributes, into a subject file",
        description="Compute once what a photo contributes to every picture of its subject.",
        epilog=_ENROLL_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder made by python -m export.build")
    parser.add_argument("photo", type=Path, metavar="PHOTO", help="any image, any size")
    parser.add_argument("mask", type=Path, metavar="MASK", help="image that is black outside the subject")
    parser.add_argument("--name", required=True, help='what prompts call the subject: car, "teddy bear"')
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="subject file to write")
    parser.add_argument("--seed", type=int, default=0, help="of the noise in the reference (default: 0)")
    _add_run_options(parser)
    parser.set_defaults(command=_enroll)


def _add_generate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    from moma_rt.schedulers.tables import ALL_TIMESTEPS, SCHEDULERS

    parser = commands.add_parser(
        "generate",
        help="make pictures of a subject",
        description="Make pictures of an enrolled subject.",
        epilog=_GENERATE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("bundle", type=Path, metavar="BUNDLE", help="of the base the subject was enrolled with")
    add("subject", type=Path, metavar="SUBJECT", help="file made by moma-rt enroll")
    add("prompt", metavar="PROMPT", help='a sentence with the subject in it: "A car on a beach."')
    add("--out", required=True, type=Path, metavar="FILE", help=f"picture to write: {', '.join(IMAGE_FORMATS)}")
    add("--negative-prompt", default="", metavar="TEXT", help="what the picture should not show")
    add("--strength", type=float, default=1.0, metavar="S", help="of the subject, 0 to 2 (default: 1.0)")
    add("--steps", type=int, default=50, metavar="N", help="of denoising (default: 50)")
    add("--guidance-scale", type=float, default=7.5, metavar="G", help="of the prompt; 1 is none (default: 7.5)")
    add("--seed", type=int, default=0, help="of the first picture (default: 0)")
    add("--num-images", type=int, default=1, metavar="N", help="1 to 64 (default: 1)")
    add(
        "--guidance-interval",
        type=_interval,
        default=ALL_TIMESTEPS,
        metavar="LOW,HIGH",
        help="timesteps that are guided, others take half the time (default: {},{}, all)".format(*ALL_TIMESTEPS),
    )
    add("--scheduler", default="ddim", metavar="NAME", help=f"one of {', '.join(SCHEDULERS)} (default: ddim)")
    add(
        "--context-embedding",
        type=Path,
        metavar="FILE",
        help=".npy of 1024 floats instead of the language model's reading",
    )
    add("--contact-sheet", type=Path, metavar="FILE", help="also write photo, mask, pictures and masks side by side")
    add("--save-mask", type=Path, metavar="FILE", help="also write where the model saw the subject, as gray images")
    _add_run_options(parser)
    parser.set_defaults(command=_generate)


def _interval(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        raise InputError(f"--guidance-interval {text}: it must be two timesteps, LOW,HIGH") from None


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backend", default=AUTO, metavar="NAME", help=f"what runs the networks: {', '.join(NAMES)} (default: {AUTO})"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: one a core)")
    parser.add_argument(
        "--memory-budget",
        metavar="BYTES",
        help="load networks in turn, so that they need no more together than so many bytes, such as 8GB",
    )
    parser.add_argument("--quiet", action="store_true", help="print nothing but warnings and errors")


def _enroll(arguments: argparse.Namespace) -> int:
    _check_outputs([arguments.out], [arguments.photo, arguments.mask], arguments.bundle)
    from moma_rt.runtime import Runtime

    start = time.perf_counter()
    runtime = Runtime.load(
        arguments.bundle, arguments.backend, arguments.threads, memory_budget=arguments.memory_budget
    )
    subject = runtime.enroll(arguments.photo, arguments.mask, arguments.name, seed=arguments.seed)
    with _writing(arguments.out):
        subject.save(arguments.out)
    if not arguments.quiet:
        _print_seconds(subject.seconds, time.perf_counter() - start)
        print_output(str(arguments.out))
    return 0


def _generate(arguments: argparse.Namespace) -> int:
    from moma_rt.memory.limits import MAX_IMAGES
    from moma_rt.runtime import Runtime
    from moma_rt.subject import Subject

    # A number out of range is refused below; it must not make that many names.
    outputs = _outputs(arguments, min(max(arguments.num_images, 1), MAX_IMAGES))
    inputs = [path for path in (arguments.subject, arguments.context_embedding) if path is not None]
    _check_outputs(outputs.all(), inputs, arguments.bundle)
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
    """The floats of a .npy file, of any length: the runtime knows which one it needs."""
    import numpy as np

    try:
        # Opening a pipe would wait for its other end.
        if not stat.S_ISREG(path.stat().st_mode):
            raise InputError(f"context embedding {path} is not a file")
        # Mapped, so that a header's claim of a huge array is compared with the file's size and not believed.
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise InputError(f"context embedding {path} cannot be read: {error.strerror or error}") from None
    except InputError:
        raise
    except Exception:
        # The header is Python source, and what a malformed one makes NumPy raise depends on its version.
        array = None
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
        raise InputError(f"context embedding {path} is not a .npy file of floats (numpy.save makes one)")
    if array.ndim != 1:
        raise InputError(f"context embedding {path} has shape {list(array.shape)}: it must have one dimension")
    return np.array(array, np.float32)


def _write_result(arguments: argparse.Namespace, subject: "Subject", result: "Result") -> list[Path]:
    from PIL import Image

    from moma_rt.inputs.images import contact_sheet

    masks = [_gray(mask) for mask in result.foreground_masks]
    outputs = _outputs(arguments, len(masks))
    files = dict(zip(outputs.pictures, result.images, strict=True))
    if outputs.masks:
        files |= dict(zip(outputs.masks, masks, strict=True))
    if outputs.sheet is not None:
        photo = Image.fromarray(subject.photo)
        items = [("photo", photo), ("mask", Image.fromarray(subject.mask).resize(photo.size))]
        for seed, picture, mask in zip(result.seeds, result.images, masks, strict=True):
            items += [(f"seed {seed}", picture), ("foreground", mask)]
        files[outputs.sheet] = contact_sheet(items)
    with _writing(), atomic_write_all(list(files)) as temporaries:
        for (path, image), temporary in zip(files.items(), temporaries, strict=True):
            with _writing(path):
                image.save(temporary, format=IMAGE_FORMATS[path.suffix.lower()])
    return list(files)


def _outputs(arguments: argparse.Namespace, count: int) -> "_Outputs":
    given = (arguments.out, arguments.save_mask, arguments.contact_sheet)
    for path in given:
        if path is not None and path.suffix.lower() not in IMAGE_FORMATS:
            suffix = path.suffix or "a file without suffix"
            raise InputError(f"{path}: cannot write {suffix}; use {', '.join(IMAGE_FORMATS)}")
    out, mask, sheet = given
    return _Outputs(numbered(out, count), [] if mask is None else numbered(mask, count), sheet)


def numbered(path: Path, count: int) -> list[Path]:
    """`path` itself for one file, else path-0, path-1 and so on before the suffix."""
    return [path] if count == 1 else [path.with_stem(f"{path.stem}-{i}") for i in range(count)]


def _gray(mask_hw: "FloatArray") -> "Image.Image":
    from PIL import Image

    return Image.fromarray((mask_hw * 255.0).round().astype("uint8"))


def _inspect(arguments: argparse.Namespace) -> int:
    from moma_rt.bundle.footprint import parse_bytes
    from moma_rt.inspection import describe

    print_output(describe(arguments.path, None if arguments.budget is None else parse_bytes(arguments.budget)))
    return 0


def _check_outputs(outputs: Sequence[Path], inputs: Sequence[Path], bundle: Path) -> None:
    """Refuse what cannot be written, and what would overwrite an input, another output or a part of the bundle."""
    from moma_rt.bundle.manifest import MANIFEST_NAME

    # Not Path.resolve: before Python 3.13 it raises RuntimeError for links in a circle.
    inside = Path(os.path.realpath(bundle)) if os.path.isfile(bundle / MANIFEST_NAME) else None
    taken = {os.path.realpath(path) for path in inputs}
    folders = {str(folder) for path in outputs for folder in Path(os.path.realpath(path)).parents}
    for path in outputs:
        _check_writable(path)
        place = os.path.realpath(path)
        if place in taken:
            raise InputError(f"{path} is given twice: each file must have its own name")
        if place in folders:
            raise InputError(f"{path} is given as a file and as the folder of another")
        if inside is not None and Path(place).is_relative_to(inside):
            raise InputError(f"{path} is inside the bundle {bundle}: write it elsewhere")
        taken.add(place)


def _check_writable(path: Path) -> None:
    """Refuse a place that cannot be written before minutes are spent on what would go there."""
    with _writing(path):
        try:
            mode = path.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            mode = stat.S_IFREG
        if stat.S_ISDIR(mode):
            raise InputError(f"{path} is a folder: give a file to write")
        if not stat.S_ISREG(mode):
            raise InputError(f"{path} is a device or pipe: give a file to write")
        folder = next((p for p in path.absolute().parents if p.exists()), Path("/"))
        if not folder.is_dir():
            raise InputError(f"cannot write {path}: {folder} is not a folder")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise InputError(f"cannot write {path}: no permission to write in {folder}")


@contextlib.contextmanager
def _writing(path: Path | None = None) -> Iterator[None]:
    """Name `path`, or the one the error names, as what cannot be written."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write {path or error.filename}: {error.strerror or error}") from None


def _progress(info: "StepInfo") -> None:
    line = f"step {info.step}/{info.steps} (t = {info.timestep})"
    last = info.step == info.steps
    # That nobody can read how far it got is no reason to stop.
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
