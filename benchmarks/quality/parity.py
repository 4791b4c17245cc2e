"""Compare a bundle's pictures with the original's algorithm in PyTorch: `python -m benchmarks.quality.parity BUNDLE`.

Both make the same pictures of the evaluation's subjects, with equal noise and the weights that the bundle was built
from: give the options that it was built with, such as --base mini. Needs PyTorch. Exit code 1 if a picture is further
from the original's than --least.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from benchmarks.environment import bundle_facts, environment, write_results
from benchmarks.latency.contenders import Deployed, baseline
from benchmarks.latency.requests import Request, Settings
from benchmarks.picture_difference import psnr
from benchmarks.quality.cases import CONTEXT, KEYS, TEXTURE, Setup, cases
from benchmarks.quality.options import shareable
from benchmarks.quality.subjects import COUNT, load_subjects, photo_of
from export.build import add_checkpoint_options
from moma_rt import backends
from moma_rt.bundle.manifest import Bundle
from moma_rt.errors import InputError, print_output, run_command
from moma_rt.schedulers.tables import schedule

PROGRAM = "benchmarks.quality.parity"
# Of each subject so many pictures, in changing contexts.
_OF_EACH = 2
_LEAST_DB = 45.0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog=f"python -m {PROGRAM}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder of the bundle")
    p.add_argument("--backend", default=backends.AUTO, metavar="NAME", help="backend of the runtime (default: auto)")
    p.add_argument("--threads", type=int, metavar="N", help="CPU threads of both (default: the libraries' choice)")
    p.add_argument("--pictures", type=int, default=20, metavar="N", help="pictures to compare (default: 20)")
    p.add_argument("--steps", type=int, default=Setup().steps, help=f"denoising steps (default: {Setup().steps})")
    p.add_argument("--strength", type=float, default=1.0, help="strength of the reference (default: 1)")
    p.add_argument(
        "--least", type=float, default=_LEAST_DB, metavar="DB", help=f"least PSNR of a picture (default: {_LEAST_DB:g})"
    )
    p.add_argument(
        "--out",
        default="quality_parity",
        metavar="NAME",
        help="write benchmarks/results/NAME.json (default: quality_parity)",
    )
    add_checkpoint_options(p)
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser().parse_args(given)
    return run_command(PROGRAM, lambda: _compare(options, given))


def _compare(options: argparse.Namespace, given: Sequence[str]) -> int:
    if not 1 <= options.pictures <= COUNT * _OF_EACH:
        raise InputError(f"--pictures {options.pictures}: it must be 1 to {COUNT * _OF_EACH}")
    schedule("ddim", options.steps, 1.0)
    bundle = Bundle.open(options.bundle)
    settings = Settings(
        bundle=options.bundle,
        backend=options.backend,
        steps=options.steps,
        scheduler="ddim",
        embedding=None,
        weights=options,
        threads=options.threads,
        strength=options.strength,
    )
    where = environment(shareable(PROGRAM, given, options.bundle))
    ours, original = Deployed(settings), baseline("eager", settings)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for request in tqdm(list(requests(Path(folder), options.pictures)), "parity", disable=None):
            one, other = (contender.answer(request) for contender in (ours, original))
            assert one.foreground_mask is not None
            found.append(
                {
                    "prompt": request.prompt,
                    "psnr_db": round(psnr(one.image, other.image), 1),
                    "foreground_difference": round(
                        float(np.abs(one.foreground_mask - other.foreground_mask).mean()), 6
                    ),
                }
            )
    least = min(picture["psnr_db"] for picture in found)
    results = {
        "environment": where,
        "bundle": bundle_facts(bundle),
        "settings": {"steps": options.steps, "strength": options.strength, "guidance_scale": settings.guidance_scale},
        "psnr_db": {"least": least, "median": round(float(np.median([p["psnr_db"] for p in found])), 1)},
        "pictures": found,
    }
    path = write_results(options.out, results)
    print_output(f"{path}\n{len(found)} pictures: least {least} dB, median {results['psnr_db']['median']} dB")
    if least < options.least:
        print(f"{PROGRAM}: a picture is {least} dB from the original's, {options.least:g} are needed", file=sys.stderr)
        return 1
    return 0


def requests(folder: Path, count: int) -> Iterator[Request]:
    """Yield requests for pictures of the evaluation's subjects, whose photos are written to a folder."""
    subjects, keys = load_subjects(), (*KEYS[CONTEXT], *KEYS[TEXTURE])
    for number in range(count):
        index = number // _OF_EACH
        photo, mask = (folder / f"{index}_{kind}.png" for kind in ("photo", "mask"))
        if not photo.exists():
            scene = photo_of(subjects, index)
            Image.fromarray(scene.picture_hwc).save(photo)
            Image.fromarray(scene.mask_hw).save(mask)
        asked = cases(index, subjects[index].name, KEYS[CONTEXT], KEYS[TEXTURE])[number % len(keys)]
        yield Request(photo, mask, asked.name, asked.prompt, index, asked.seed)


if __name__ == "__main__":
    sys.exit(main())
