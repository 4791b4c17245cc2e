"""Compile a bundle's networks to AOTInductor packages, which hold only code and read the bundle's weights.

The target is this machine's GPU (the operators' Triton kernels are part of the package), its CPU, or a GPU that this
machine does not have (see `export.cross`).
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch._inductor.async_compile import shutdown_compile_workers
from torch._inductor.utils import fresh_cache

from engines.entries import with_engine
from engines.store import ENGINES_FOLDER, Artifact, Notes, Store, Stored
from engines.targets import EngineTarget
from export.attention_kernels import kernels_code_hash
from export.checkpoints.model import Checkpoint
from export.cross.compiling import check_cross, cross_compile
from export.keys import network_key
from export.networks import NETWORKS, Precisions
from export.packages import PACKAGE_NAME, PackageOptions, PackageRequest, quiet, write_package
from moma_rt.backends.inductor import cpu_instructions, tensors_note
from moma_rt.backends.libraries import is_installed, library_version, version_tuple
from moma_rt.bundle.engines import CPU_CAPABILITY, EngineEntry
from moma_rt.bundle.manifest import Bundle, Manifest, NetworkEntry, write_manifest
from moma_rt.bundle.specs import Precision
from moma_rt.errors import BundleError, InputError
from moma_rt.files import PARTIAL_PREFIX, sha256_file

# The environment variable that limits which matrix product backends inductor benchmarks.
_GEMM_BACKENDS = "TORCHINDUCTOR_MAX_AUTOTUNE_GEMM_BACKENDS"
# The first PyTorch that can load a package's code from where the runtime unpacks it.
_MIN_PYTORCH = (2, 10)

Report = Callable[[str, str], None]


def check_precisions(names: tuple[str, ...], precisions: Precisions) -> None:
    """Refuse precisions that packages do not support.

    Raises:
        InputError: a network would have integer weights, which only ONNX graphs support.
    """
    for name in names:
        precision = precisions.of(name)
        if precision.is_weight_only:
            raise InputError(
                f"--target inductor does not support {precision.value} weights (of the {name}): give "
                f"--mllm-precision {Precision.FP16.value}, or --skip {name}"
            )


def check_target(target: EngineTarget) -> None:
    """Refuse a target whose packages cannot be compiled on this machine.

    Raises:
        InputError: PyTorch is too old or cannot use this machine's GPU, or something is missing that compiling for
            another GPU needs.
    """
    (capability,) = target.capabilities
    version = library_version(target.flavour)
    if version_tuple(version) < _MIN_PYTORCH:
        raise InputError(f"{target}: PyTorch {version} is too old for packages: install 2.10 or newer")
    if not _is_here(target):
        check_cross(capability)
    elif capability != CPU_CAPABILITY and not torch.cuda.is_available():
        raise InputError(f"{target}: PyTorch {version} cannot use this GPU: install a build for its CUDA version")


def build_packages(
    checkpoint: Checkpoint, names: tuple[str, ...], target: EngineTarget, store: Store, report: Report
) -> Bundle:
    """Compile the named networks of the bundle in `store`, which were exported from `checkpoint`.

    Args:
        report: called with a network's name and what is being done for it.

    Raises:
        InputError: see `check_target`; or the folder cannot be written.
        BundleError: there is no bundle, or inductor cannot compile a network.
    """
    check_target(target)
    version = library_version(target.flavour)
    with store.locked(), _temporary_cache(store.root / ENGINES_FOLDER):
        bundle = Bundle.open(store.root)
        packager = _Packager(checkpoint, bundle, target, version, store, report)
        manifest = bundle.manifest
        for name in names:
            manifest = packager.add(bundle.network(name), manifest)
        write_manifest(store.root, manifest)
        store.remove_unused(manifest)
    return Bundle.open(store.root)


@dataclass(frozen=True)
class _Packager:
    """Compiles single networks of a checkpoint into a bundle's store."""

    checkpoint: Checkpoint
    bundle: Bundle
    target: EngineTarget
    version: str
    store: Store
    report: Report

    def add(self, entry: NetworkEntry, manifest: Manifest) -> Manifest:
        """Return the manifest with an engine of a network, compiling it if the store has none."""
        name = entry.spec.name
        self.report(name, "checking")
        if entry.key != network_key(self.checkpoint.components, entry.spec, entry.precision):
            raise BundleError(f"{self.bundle.root}: its {name} comes from other weights; build the bundle again")
        key, stored = self._found(entry)
        if stored is None:
            start = time.monotonic()
            stored = self.store.add(Artifact(ENGINES_FOLDER, name, key), lambda folder: self._write(entry, folder))
            self.report(name, f"built for {self.target} in {time.monotonic() - start:.1f} s")
        else:
            is_here = any(engine.key == key for engine in manifest.engines)
            self.report(name, f"kept for {self.target}{'' if is_here else ': another bundle had it'}")
        return with_engine(manifest, self._engine(entry, key, stored), stored)

    def _found(self, entry: NetworkEntry) -> tuple[str, Stored | None]:
        """Return the key and the package if the store has a usable one, else the key to compile under and None."""
        # Prefer a package with measured kernels; accept an unmeasured one unless the target is this machine's device.
        for is_measured in (True,) if self.target.measured else (True, False):
            key = self._key(entry, is_measured)
            stored = self.store.find(Artifact(ENGINES_FOLDER, entry.spec.name, key))
            if stored is not None:
                return key, stored
        return self._key(entry, _is_here(self.target)), None

    def _write(self, entry: NetworkEntry, folder: Path) -> Notes:
        self.report(entry.spec.name, "compiling")
        geometry, network = self.bundle.manifest.geometry, NETWORKS[entry.spec.name]
        (capability,), is_here = self.target.capabilities, _is_here(self.target)
        compile_package = write_package if is_here else cross_compile
        compile_package(
            PackageRequest(self.checkpoint, network, geometry, entry.precision, capability, is_here), folder
        )
        self.report(entry.spec.name, "hashing")
        return {"measured": is_here}

    def _engine(self, entry: NetworkEntry, key: str, stored: Stored) -> EngineEntry:
        return EngineEntry(
            network=entry.spec.name,
            flavour=self.target.flavour,
            version=self.version,
            capabilities=self.target.capabilities,
            refittable=False,
            source=entry.structure,
            key=key,
            file=stored.path(PACKAGE_NAME),
            # Inductor reports neither.
            weight_bytes=None,
            activation_bytes=None,
            kernels=None,
            measured=bool(stored.notes["measured"]),
        )

    def _key(self, entry: NetworkEntry, is_measured: bool) -> str:
        """Return a package's store key: a hash of what it computes (weights aside), what compiles it, and its device.

        Its bytes cannot serve: they contain the build folder's path and so differ between compilations.
        """
        (capability,) = self.target.capabilities
        on_gpu = capability != CPU_CAPABILITY
        here = Path(__file__).parent
        files = [here / "packages.py", here / "host_compiler.py"]
        if not is_measured:
            files += sorted(path for path in (here / "cross").iterdir() if path.suffix in (".py", ".c", ".h"))
        identity = {
            "network": entry.structure,
            "library": [self.target.flavour.value, self.version],
            "triton": importlib.metadata.version("triton") if on_gpu and is_installed("triton") else None,
            "kernels": kernels_code_hash() if on_gpu else None,
            "products": os.environ.get(_GEMM_BACKENDS) if is_measured else None,
            "capability": capability,
            "instructions": None if on_gpu else cpu_instructions(),
            "options": dataclasses.asdict(PackageOptions.of(entry.spec.name, capability, is_measured)),
            "notes": tensors_note(entry.spec),
            "code": [sha256_file(path) for path in files],
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _is_here(target: EngineTarget) -> bool:
    """Return whether this machine has the target's device, so that kernels are measured on it."""
    (capability,) = target.capabilities
    return target.measured or (
        torch.cuda.is_available() and torch.cuda.get_device_capability() == divmod(capability, 10)
    )


@contextlib.contextmanager
def _temporary_cache(parent: Path) -> Iterator[None]:
    """Put inductor's cache beside the engines, since it grows as large as they do, and delete it at the end.

    The next build deletes the cache of a killed one.
    """
    folder = Path(tempfile.mkdtemp(prefix=PARTIAL_PREFIX, dir=parent)).resolve()
    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet())
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        # Before the folder is deleted, since the workers keep writing to it.
        stack.callback(shutdown_compile_workers)
        place = folder
        if len(str(folder).split()) > 1:
            # Inductor puts paths into commands that it splits at spaces.
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="moma-rt-"))) / "cache"
            place.symlink_to(folder)
        stack.enter_context(_temporary_files_in(place))
        stack.enter_context(fresh_cache(dir=str(place)))
        yield


@contextlib.contextmanager
def _temporary_files_in(folder: Path) -> Iterator[None]:
    """Set TMPDIR for child processes, since a killed C++ compiler leaves its temporary files behind."""
    before = os.environ.get("TMPDIR")
    os.environ["TMPDIR"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["TMPDIR"]
        else:
            os.environ["TMPDIR"] = before
