"""Step 1: what was carried becomes a bundle that runs: `python -m benchmarks.gpu.prepare --bundle DIR ...`.

Wheels that the machine lacks are installed into a folder outside the sources; a bundle that was carried without
weights is unpacked, and export.build writes its random weights and keeps its engines; and a subject of random keys and
values is saved, so that pictures can be made by networks that enroll nobody.
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
from engines.store import ENGINES_FOLDER, KERNELS_FOLDER, LOCK_NAME, NETWORKS_FOLDER, PARTIAL_PREFIX
from moma_rt.backends.libraries import library_version
from moma_rt.bundle.engines import Flavour
from moma_rt.bundle.manifest import MANIFEST_NAME, WEIGHTS_FOLDER, Bundle, Manifest, read_manifest
from moma_rt.bundle.specs import Geometry
from moma_rt.errors import InputError, MomaError, print_output, run_command
from moma_rt.messages import one_line
from moma_rt.subject import Origin, Subject

PROGRAM = "benchmarks.gpu.prepare"
# The share of reference tokens inside the mask.
_SHARE = 0.4
# What a build that was stopped may have left.
_OF_A_BUILD = (NETWORKS_FOLDER, WEIGHTS_FOLDER, ENGINES_FOLDER, KERNELS_FOLDER, "tokenizers", LOCK_NAME)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the step; returns the exit code."""
    p = argparse.ArgumentParser(prog=f"python -m {PROGRAM}")
    p.add_argument("--carried", type=Path, required=True, metavar="DIR", help="with wheels and the bundle, if any")
    p.add_argument("--work", type=Path, required=True, metavar="DIR", help="that is kept, outside the sources")
    p.add_argument("--bundle", type=Path, required=True, metavar="DIR")
    p.add_argument("build", nargs="+", help="after --: the options of export.build that make the bundle")
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
    # The second call has no room for all of it.
    timed("parts", lambda: kept(sorted(options.carried.glob(f"{RTX_PART}*")), options.work))
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
    """Install the wheels of packages that cannot be imported, without what they depend on.

    Raises:
        MomaError: pip cannot.
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


def kept(parts: Sequence[Path], folder: Path) -> None:
    """Copy files that a later call needs to where they are kept."""
    for part in parts:
        shutil.copyfile(part, folder / part.name)


def unpack(archive: Path, bundle: Path) -> None:
    """Unpack the bundle that was carried to its place, unless there is one or none was carried.

    What a build that was stopped left there is replaced.

    Raises:
        MomaError: it is no archive with a folder `bundle`, or something else is in its place.
    """
    if (bundle / MANIFEST_NAME).exists() or not archive.exists():
        return
    if others := sorted(path.name for path in _entries(bundle) if not _is_of_a_build(path.name)):
        raise MomaError(f"{bundle} is in the way, and no bundle: it has {others[0]}; move it, or give another BUNDLE")
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
    """Refuse a carried bundle whose engines a build here would drop: compiling takes all the time that there is.

    Raises:
        MomaError: another version of the library made every one of them.
    """
    here = {flavour: _version_here(flavour) for flavour in {engine.flavour for engine in manifest.engines}}
    if any(engine.version == here[engine.flavour] for engine in manifest.engines):
        return
    made = sorted({(engine.flavour.value, engine.version, here[engine.flavour]) for engine in manifest.engines})
    said = ", ".join(f"those of {name} by version {version}, and here is {found}" for name, version, found in made)
    raise MomaError(f"the carried bundle's engines cannot be kept: {said or 'it has none'}; build it with what is here")


def _version_here(flavour: Flavour) -> str:
    try:
        return library_version(flavour)
    except InputError:
        return "none"


def build(options: Sequence[str]) -> None:
    """Run export.build.

    Raises:
        MomaError: it failed; what it says is printed.
    """
    run([sys.executable, "-m", "export.build", *options])


def run(command: Sequence[str]) -> None:
    """Run a command whose output is this process's.

    Raises:
        MomaError: it did not end with 0.
    """
    done = subprocess.run(command, check=False, env=dict(os.environ), preexec_fn=end_with_parent)
    if done.returncode:
        raise MomaError(f"{' '.join(command[1:4])} ended with {done.returncode}")


def random_subject(bundle: Bundle) -> Subject:
    """A subject of the bundle's weights with random keys and values: it makes pictures of nothing, as fast as any."""
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
