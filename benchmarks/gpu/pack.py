"""Puts what a GPU machine lacks where it is carried from: `python -m benchmarks.gpu.pack --bundle DIR [--rtx]`.

    .ship/first     diffusers' wheel and those that it cannot be imported without; the bundle without weights, as
                    bundle.tar.xz; a first part of TensorRT-RTX
    .ship/second    the other parts of TensorRT-RTX

A call carries 64 MiB with the sources, so TensorRT-RTX, which takes that much as xz, is divided between two. Says how
much each call has to carry, and ends with 2 where that is too much. Needs a package index, and no GPU.
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
from moma_rt.files import atomic_write

PROGRAM = "benchmarks.gpu.pack"
MOST_MIB = 64.0
# diffusers, and what it looks for when it is imported and the machine may lack: pure Python all of them.
_WHEELS = (
    "diffusers==0.42.1",
    "requests==2.34.2",
    "urllib3==2.8.0",
    "idna==3.20",
    "certifi==2026.10.19.post1",
    "charset-normalizer==3.5.3",
)
_RTX = ("tensorrt-rtx-cu13-libs==1.7.1.116", "tensorrt-rtx-cu13-bindings==1.7.1.116")
# Of the interpreter there.
_PURE = ("--python-version", "3.12", "--implementation", "py", "--abi", "none", "--platform", "any")
_FOR = ("--python-version", "3.12", "--implementation", "cp", "--platform", "manylinux_2_28_x86_64")
_SHIM = "from tensorrt_rtx_bindings import *\nfrom tensorrt_rtx_bindings import __version__\n"
_PART_BYTES = 15 * 2**20
# Of TensorRT-RTX's parts, those that go with the first call.
_FIRST_PARTS = 1
_WEIGHTS = "weights/"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    p = argparse.ArgumentParser(
        prog=f"python -m {PROGRAM}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--bundle", type=Path, metavar="DIR", help="made with --target inductor:smNN (default: none)")
    p.add_argument("--rtx", action="store_true", help="TensorRT-RTX, for the step rtx_probe")
    p.add_argument("--no-wheels", action="store_true", help="the machine has diffusers")
    p.add_argument("--out", type=Path, default=ROOT / ".ship", metavar="DIR", help="(default: .ship)")
    options = p.parse_args(arguments)
    return run_command(PROGRAM, lambda: _pack(options))


def _pack(options: argparse.Namespace) -> int:
    first, second = (options.out / call for call in (FIRST, SECOND))
    for folder in (first, second):
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.iterdir():
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


def pack_bundle(bundle: Path, out: Path) -> None:
    """Write the files that a bundle's manifest names but for the weights, and their records, as a .tar.xz.

    Raises:
        BundleError: it is no bundle, or one of these files is missing.
        InputError: it has no engines, so that nothing of it could run there.
    """
    manifest = read_manifest(bundle)
    if not manifest.engines:
        raise InputError(f"{bundle} has no engines: build it with --target inductor:smNN")
    opened = Bundle(bundle, manifest)
    named = [name for name in manifest.files if not name.startswith(_WEIGHTS)]
    if missing := [name for name in named if not opened.path(name).is_file()]:
        raise BundleError(f"{bundle}: {missing[0]} is missing; build the bundle again")
    # Without its record a build keeps no folder. Other files are those of builds that were stopped.
    records = {f"{PurePosixPath(name).parent}/{RECORD_NAME}" for name in named}
    chosen = sorted([MANIFEST_NAME, *named, *(name for name in records if (bundle / name).is_file())])
    with atomic_write(out) as temporary, lzma.open(temporary, "wb", preset=7) as stream:
        with tarfile.open(fileobj=stream, mode="w", dereference=True) as archive:
            for name in chosen:
                archive.add(bundle / name, f"{BUNDLE_FOLDER}/{name}")


def rtx_archive() -> bytes:
    """TensorRT-RTX's modules and libraries in the root of a .tar.xz.

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
    """The data in parts of at most `size` bytes."""
    return (data[start : start + size] for start in range(0, len(data), size))


def download(what: Sequence[str], folder: Path) -> None:
    """Download wheels, without what they depend on.

    Raises:
        MomaError: pip cannot.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*command, "--only-binary", ":all:", "-d", str(folder), *what], check=False)
    if done.returncode:
        raise MomaError(f"pip could not download {' '.join(what)}")


def sources_mib(root: Path) -> float:
    """The size of what is carried of the sources: tracked files, and those that git does not ignore."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, capture_output=True, check=False)
    paths = {root / name for name in done.stdout.decode().split("\0") if name}
    return sum(path.stat().st_size for path in paths if path.is_file()) / 2**20


if __name__ == "__main__":
    sys.exit(main())
