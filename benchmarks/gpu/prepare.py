"""Step 1: complete the packed bundle so that it runs: `python -m benchmarks.gpu.prepare --bundle DIR ...`.

Installs wheels that the machine lacks into a folder outside the sources; unpacks the bundle, which was packed without
weights, and has export.build write its random weights and keep its engines; saves a subject with random keys and
values, so that pictures can be generated without the networks that enroll.
"""

import argparse
import importlib.util
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from benchmarks.environment import write_results
from benchmarks.gpu.carried import BUNDLE_ARCHIVE, BUNDLE_FOLDER, PACKAGES, RTX_PART, SUBJECT_FILE
from benchmarks.gpu.runner import end_with_parent
from benchmarks.latency.requests import SUBJECT
from engines.store import ENGINES_FOLDER, KERNELS_FOLDER, LOCK_NAME, NETWORKS_FOLDER
from moma_rt.backends.libraries import library_version
from moma_rt.bundle.engines import Flavour
from moma_rt.bundle.manifest import MANIFEST_NAME, WEIGHTS_FOLDER, Bundle, Manifest, read_manifest
from moma_rt.bundle.specs import Geometry
from moma_rt.errors import InputError, MomaError, print_output, run_command
from moma_rt.files import PARTIAL_PREFIX
from moma_rt.messages import one_line
from moma_rt.subject import Origin, Subject

PROGRAM = "benchmarks.gpu.prepare"
# The fraction of reference tokens inside the mask.
_SHARE = 0.4
# Files that an interrupted build may have left.
_OF_A_BUILD = (NETWORKS_FOLDER, WEIGHTS_FOLDER, ENGINES_FOLDER, KERNELS_FOLDER, "tokenizers", LOCK_NAME)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the step; returns the exit code."""
    p = argparse.ArgumentParser(prog=f"python -m {PROGRAM}", description=__doc__.partition(": `")[0] + ".")
    p.add_argument("--carried", type=Path, required=True, metavar="DIR", help="folder that benchmarks.gpu.pack wrote")
    p.add_argument(
        "--work", type=Path, required=True, metavar="DIR", help="folder outside the sources, kept between calls"
    )
    p.add_argument("--bundle", type=Path, required=True, metavar="DIR", help="folder to unpack the bundle to")
    p.add_argument("build", nargs="+", help="after --: options of export.build that build the bundle")
    options = p.parse_args(arguments)
    return run_command(PROGRAM, lambda: _prepare(options))


def _prepare(options: argparse.Namespace) -> int:
    seconds: dict[str, float] = {}

    def timed(name: str, run: Callable[[], None]) -> None:
        start = time.perf_counter()
        run()
        seconds[name] = round(time.perf_counter() - start, 1)
        write_results("prepare", {"complete": name == "subject", "seconds": seconds})

    timed("wheels", lambda: install(sorted(options.carried.glob("*.whl")), options.work / PACKAGES))
    # Kept for the second call, which cannot carry all parts.
    timed("parts", lambda: keep_parts(sorted(options.carried.glob(f"{RTX_PART}*")), options.work))
    archive = options.carried / BUNDLE_ARCHIVE
    timed("unpacking", lambda: unpack(archive, options.bundle))
    if archive.exists():
        check_engines(read_manifest(options.bundle))
    timed("weights", lambda: build([*options.build, "--out", str(options.bundle)]))
    bundle = Bundle.open(options.bundle)
    timed("subject", lambda: random_subject(bundle).save(options.work / SUBJECT_FILE))
    size = sum(file.size for file in bundle.manifest.files.values())
    said = ", ".join(f"{name} {taken:.0f} s" for name, taken in seconds.items())
    print_output(f"{len(bundle.manifest.engines)} engines, {size / 1e6:,.0f} MB: {said}")
    return 0


def install(wheels: Sequence[Path], folder: Path) -> None:
    """Install wheels whose packages cannot be imported, without their dependencies.

    Raises:
        MomaError: pip failed.
    """
    missing = [wheel for wheel in wheels if importlib.util.find_spec(wheel.name.split("-")[0]) is None]
    if not missing:
        return
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--disable-pip-version-check",
    ]
    run([*command, "--target", str(folder), *map(str, missing)])


def keep_parts(parts: Sequence[Path], folder: Path) -> None:
    """Copy files that a later call needs to the folder that is kept."""
    for part in parts:
        shutil.copyfile(part, folder / part.name)


def unpack(archive: Path, bundle: Path) -> None:
    """Unpack the packed bundle to `bundle`, unless there is a bundle already or no archive.

    Replaces what an interrupted build left there.

    Raises:
        MomaError: the archive has no folder `bundle` or is damaged, or `bundle` holds other files.
    """
    if (bundle / MANIFEST_NAME).exists() or not archive.exists():
        return
    if others := sorted(path.name for path in _entries(bundle) if not _is_of_a_build(path.name)):
        raise MomaError(f"{bundle} is not a bundle: it holds {others[0]}; move it, or set BUNDLE to another folder")
    folder = bundle.parent / f"{PARTIAL_PREFIX}{bundle.name}"
    try:
        shutil.rmtree(folder, ignore_errors=True)
        with tarfile.open(archive, "r:xz") as files:
            files.extractall(folder, filter="data")
        if not (folder / BUNDLE_FOLDER).is_dir():
            raise tarfile.TarError(f"it has no folder {BUNDLE_FOLDER}")
        if bundle.is_dir():
            shutil.rmtree(bundle)
        (folder / BUNDLE_FOLDER).replace(bundle)
    except (tarfile.TarError, lzma.LZMAError, EOFError, OSError) as error:
        raise MomaError(f"{archive} cannot be unpacked as a bundle: {one_line(error)}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _is_of_a_build(name: str) -> bool:
    return name in _OF_A_BUILD or name.startswith(PARTIAL_PREFIX)


def check_engines(manifest: Manifest) -> None:
    """Refuse a packed bundle whose engines a build here would replace, since there is no time to compile.

    Raises:
        MomaError: all engines were built by another version of their library.
    """
    here = {flavour: _version_here(flavour) for flavour in {engine.flavour for engine in manifest.engines}}
    if any(engine.version == here[engine.flavour] for engine in manifest.engines):
        return
    made = sorted({(engine.flavour.value, engine.version, here[engine.flavour]) for engine in manifest.engines})
    said = ", ".join(f"those of {name} are from version {version}, here is {found}" for name, version, found in made)
    raise MomaError(
        f"the packed bundle's engines cannot be kept: {said or 'it has none'}; build it with the version here"
    )


def _version_here(flavour: Flavour) -> str:
    try:
        return library_version(flavour)
    except InputError:
        return "none"


def build(options: Sequence[str]) -> None:
    """Run export.build with these options.

    Raises:
        MomaError: it failed; it has printed the reason.
    """
    run([sys.executable, "-m", "export.build", *options])


def run(command: Sequence[str]) -> None:
    """Run a command that shares this process's output.

    Raises:
        MomaError: its exit code was not 0.
    """
    done = subprocess.run(command, check=False, env=dict(os.environ), preexec_fn=end_with_parent)
    if done.returncode:
        raise MomaError(f"{' '.join(command[1:4])} ended with {done.returncode}")


def random_subject(bundle: Bundle) -> Subject:
    """Return a subject with random keys and values for the bundle: pictures are noise, but take as long as any."""
    geometry = bundle.manifest.geometry
    random = np.random.default_rng(0)
    counts = {grid: max(1, round(_SHARE * grid * grid)) for grid in geometry.grids}

    def values(channels: int, grid: int) -> np.ndarray:
        return random.standard_normal((counts[grid], channels), np.float32)

    def by_layer() -> dict[str, np.ndarray]:
        return {layer.name: values(layer.channels, layer.grid) for layer in geometry.self_attention}

    return Subject(
        name=SUBJECT,
        reference_k=by_layer(),
        reference_v=by_layer(),
        object_mask={grid: np.ones(count, np.float32) for grid, count in counts.items()},
        photo=np.zeros((64, 64, 3), np.uint8),
        mask=_mask(geometry),
        prefix=None,
        origin=Origin.of(bundle),
    )


def _mask(geometry: Geometry) -> np.ndarray:
    mask = np.zeros((geometry.image_size, geometry.image_size), np.bool_)
    mask[: max(1, round(_SHARE * geometry.image_size))] = True
    return mask


if __name__ == "__main__":
    sys.exit(main())
