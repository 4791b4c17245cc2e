"""Pack the files that a GPU machine lacks: `python -m benchmarks.gpu.pack --bundle DIR [--rtx]`.

    .ship/first     diffusers' wheel and the wheels that its import needs; the bundle without weights, as bundle.tar.xz;
                    the first part of TensorRT-RTX
    .ship/second    the other parts of TensorRT-RTX

A call can carry 64 MiB including the sources, so TensorRT-RTX, which is that large as xz, is split between two calls.
Replaces what an earlier run packed, prints the size of each call, and exits with 2 if one is too large. Needs access to
a package index, and no GPU.
"""

import argparse
import io
import lzma
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from benchmarks.gpu.carried import BUNDLE_ARCHIVE, BUNDLE_FOLDER, RTX_PART
from benchmarks.gpu.plan import FIRST, ROOT, SECOND
from moma_rt.bundle.manifest import MANIFEST_NAME, RECORD_NAME, Bundle, read_manifest
from moma_rt.errors import BundleError, InputError, MomaError, print_output, run_command
from moma_rt.files import PARTIAL_PREFIX, atomic_write

PROGRAM = "benchmarks.gpu.pack"
MOST_MIB = 64.0
# diffusers, what its import needs and the machine may lack, and the lock that builds take; all are pure Python.
_WHEELS = (
    "diffusers==0.42.1",
    "requests==2.34.2",
    "urllib3==2.8.0",
    "idna==3.20",
    "certifi==2026.10.19.post1",
    "charset-normalizer==3.5.3",
    "filelock==4.2.12",
)
_RTX = ("tensorrt-rtx-cu13-libs==1.7.1.116", "tensorrt-rtx-cu13-bindings==1.7.1.116")
# pip options for the machine's interpreter.
_PURE = ("--python-version", "3.12", "--implementation", "py", "--abi", "none", "--platform", "any")
_FOR = ("--python-version", "3.12", "--implementation", "cp", "--platform", "manylinux_2_28_x86_64")
_SHIM = "from tensorrt_rtx_bindings import *\nfrom tensorrt_rtx_bindings import __version__\n"
_PART_BYTES = 15 * 2**20
# The number of TensorRT-RTX's parts in the first call.
_FIRST_PARTS = 1
_WEIGHTS = "weights/"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    p = argparse.ArgumentParser(
        prog=f"python -m {PROGRAM}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--bundle", type=Path, metavar="DIR", help="bundle built with --target inductor:smNN to pack (default: none)"
    )
    p.add_argument("--rtx", action="store_true", help="also pack TensorRT-RTX, for the step rtx_probe")
    p.add_argument("--no-wheels", action="store_true", help="leave out the wheels, if the machine has diffusers")
    p.add_argument(
        "--out",
        type=Path,
        default=ROOT / ".ship",
        metavar="DIR",
        help="folder to write; must be new, empty or packed before (default: .ship)",
    )
    options = p.parse_args(arguments)
    return run_command(PROGRAM, lambda: _pack(options))


def _pack(options: argparse.Namespace) -> int:
    first, second = (options.out / call for call in (FIRST, SECOND))
    packed_before = packed_files(options.out)
    for folder in (first, second):
        folder.mkdir(parents=True, exist_ok=True)
    for old in packed_before:
        old.unlink()
    if options.bundle is not None:
        pack_bundle(options.bundle, first / BUNDLE_ARCHIVE)
    if not options.no_wheels:
        download([*_WHEELS, *_PURE], first)
    if options.rtx:
        for number, part in enumerate(parts_of(rtx_archive(), _PART_BYTES)):
            name = f"{RTX_PART}{number:02d}"
            with atomic_write((first if number < _FIRST_PARTS else second) / name) as temporary:
                temporary.write_bytes(part)
    sources = sources_mib(ROOT)
    too_much = []
    for folder in (first, second):
        own = sum(file.stat().st_size for file in folder.iterdir()) / 2**20
        print_output(f"{folder}: {own:.1f} MiB, {own + sources:.1f} MiB with the sources")
        if own + sources > MOST_MIB:
            too_much.append(folder.name)
    if too_much:
        raise MomaError(
            f"the {' and the '.join(too_much)} call would carry more than {MOST_MIB:g} MiB: move tests/goldens out of "
            "the tree for it, or leave something out"
        )
    return 0


def packed_files(out: Path) -> list[Path]:
    """Return the files in `out` that an earlier run packed.

    Raises:
        InputError: `out` holds other files.
    """
    found: list[Path] = []
    for path in out.iterdir() if out.exists() else ():
        found += path.iterdir() if path.is_dir() and path.name in (FIRST, SECOND) else [path]
    for path in found:
        is_packed = path.suffix == ".whl" or path.name.startswith((BUNDLE_ARCHIVE, RTX_PART, PARTIAL_PREFIX))
        if path.parent == out or not is_packed:
            raise InputError(f"--out {out}: holds other files, such as {path.name}; give a new or an empty folder")
    return found


def pack_bundle(bundle: Path, out: Path) -> None:
    """Write a bundle's files, except the weights, and their build records to a .tar.xz.

    Raises:
        BundleError: `bundle` is not a bundle, or one of its files is missing.
        InputError: the bundle has no engines, so nothing in it could run on the machine.
    """
    manifest = read_manifest(bundle)
    if not manifest.engines:
        raise InputError(f"{bundle} has no engines: build it with --target inductor:smNN")
    opened = Bundle(bundle, manifest)
    named = [name for name in manifest.files if not name.startswith(_WEIGHTS)]
    if missing := [name for name in named if not opened.path(name).is_file()]:
        raise BundleError(f"{bundle}: {missing[0]} is missing; build the bundle again")
    # A build only reuses folders with a record. Other files are leftovers of interrupted builds.
    records = {f"{PurePosixPath(name).parent}/{RECORD_NAME}" for name in named}
    chosen = sorted([MANIFEST_NAME, *named, *(name for name in records if (bundle / name).is_file())])
    with atomic_write(out) as temporary, lzma.open(temporary, "wb", preset=7) as stream:
        with tarfile.open(fileobj=stream, mode="w", dereference=True) as archive:
            for name in chosen:
                archive.add(bundle / name, f"{BUNDLE_FOLDER}/{name}")


def rtx_archive() -> bytes:
    """Return a .tar.xz with TensorRT-RTX's modules and libraries in its root.

    Raises:
        MomaError: they cannot be downloaded.
    """
    with tempfile.TemporaryDirectory() as name:
        wheels, site = Path(name) / "wheels", Path(name) / "site"
        download([*_RTX, *_FOR], wheels)
        for wheel in sorted(wheels.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site)
        (site / "tensorrt_rtx.py").write_text(_SHIM, encoding="utf-8")
        packed = io.BytesIO()
        with lzma.open(packed, "wb", preset=7) as stream, tarfile.open(fileobj=stream, mode="w") as target:
            target.add(site, ".")
        return packed.getvalue()


def parts_of(data: bytes, size: int) -> Iterable[bytes]:
    """Split the data into parts of at most `size` bytes."""
    return (data[start : start + size] for start in range(0, len(data), size))


def download(what: Sequence[str], folder: Path) -> None:
    """Download wheels with pip, without their dependencies.

    Raises:
        MomaError: pip failed.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*command, "--only-binary", ":all:", "-d", str(folder), *what], check=False)
    if done.returncode:
        raise MomaError(f"pip could not download {' '.join(what)}")


def sources_mib(root: Path) -> float:
    """Return the size in MiB of the sources: tracked files, and untracked ones that git does not ignore."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, capture_output=True, check=False)
    paths = {root / name for name in done.stdout.decode().split("\0") if name}
    return sum(path.stat().st_size for path in paths if path.is_file()) / 2**20


if __name__ == "__main__":
    sys.exit(main())
