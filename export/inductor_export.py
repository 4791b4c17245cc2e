"""One network to a package of PyTorch's inductor, and a bundle's networks to engines of such packages.

They are compiled for the machine that this runs on: its GPU, with the operators' Triton kernels inside, or its CPU.
"""

import contextlib
import dataclasses
import gc
import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._inductor import aoti_compile_and_package
from torch._inductor.async_compile import shutdown_compile_workers
from torch._inductor.utils import fresh_cache

from engines.entries import with_engine
from engines.store import ENGINES_FOLDER, PARTIAL_PREFIX, Artifact, Notes, Store, Stored
from engines.targets import EngineTarget
from export.bundling import network_key
from export.checkpoints.model import Checkpoint
from export.networks import NETWORKS, Precisions
from export.tracing import tracing_arguments
from moma_rt.backends.inductor import TENSORS_NOTE, cpu_instructions, tensors_note
from moma_rt.bundle import Bundle, Manifest, NetworkEntry, write_manifest
from moma_rt.engines import CPU_CAPABILITY, EngineEntry
from moma_rt.errors import BundleError, InputError
from moma_rt.files import sha256_file
from moma_rt.footprint import PICTURES
from moma_rt.libraries import is_installed, library_version, version_tuple
from moma_rt.messages import one_line
from moma_rt.specs import Geometry, Precision

PACKAGE_NAME = "engine.pt2"
# Of PyTorch: a package's code can be loaded from where the runtime unpacks it.
_SINCE = (2, 10)

Report = Callable[[str, str], None]


@dataclass(frozen=True)
class InductorOptions:
    """How packages are compiled.

    max_autotune: measure several kernels of each product and of what is fused, and take the fastest.
    channels_last: convolutions' weights are stored with their channels last, as tensor cores read them.
    wrapper_level: of the C++ compiler, for the code that calls the kernels.
    """

    max_autotune: bool
    channels_last: bool
    wrapper_level: str

    @classmethod
    def of(cls, network: str, capability: int) -> "InductorOptions":
        """What pays: on a CPU, where nothing is served, that compiling is quick; on a GPU, care with what every picture
        is made with, and not with what runs once a subject or a prompt.
        """
        on_gpu = capability != CPU_CAPABILITY
        with_care = on_gpu and network in PICTURES
        return cls(with_care, on_gpu, "O1" if with_care else "O0")

    @property
    def settings(self) -> dict[str, Any]:
        """In the words of `torch._inductor.config`."""
        return {
            "max_autotune": self.max_autotune,
            # cuDNN alone: measuring inductor's own convolutions beside it takes minutes.
            "max_autotune_conv_backends": "ATEN",
            "aot_inductor.compile_wrapper_opt_level": self.wrapper_level,
            # The kernels are part of the code, which can be loaded without a folder of them.
            "aot_inductor.embed_kernel_binary": True,
            # Weights come from PyTorch's allocator: it gives back what it only keeps before it says that there is no
            # room, and counts that it did.
            "aot_inductor.weight_use_caching_allocator": True,
            # They are kept elsewhere for ever, and take as long to make as they save.
            "aot_inductor.precompile_headers": False,
            # As many threads as there are where it runs, not where it was compiled.
            "cpp.dynamic_threads": True,
        }


def check_precisions(names: tuple[str, ...], precisions: Precisions) -> None:
    """Refuse what no package can hold.

    Raises:
        InputError: a network of integer weights, which only the ONNX graphs have.
    """
    for name in names:
        precision = precisions.of(name)
        if precision.is_weight_only:
            raise InputError(
                f"--target inductor: the {name}'s {precision.value} weights have no form in PyTorch; give "
                f"--mllm-precision {Precision.FP16.value}, or --skip {name}"
            )


def build_packages(
    checkpoint: Checkpoint, names: tuple[str, ...], target: EngineTarget, store: Store, report: Report
) -> Bundle:
    """Compile the named networks of the bundle in `store`, which were exported from `checkpoint`.

    Args:
        report: called with a network's name and what is being done for it.

    Raises:
        InputError: PyTorch cannot use this machine's GPU, or the folder cannot be written.
        BundleError: no bundle, or a network that inductor cannot compile.
    """
    (capability,) = target.capabilities
    version = library_version(target.flavour)
    if version_tuple(version) < _SINCE:
        raise InputError(f"{target}: PyTorch {version} is too old for packages: install 2.10 or newer")
    if capability != CPU_CAPABILITY and not torch.cuda.is_available():
        raise InputError(f"{target}: PyTorch {version} cannot use this GPU: install one for its CUDA version")
    with store.locked(), _cache(store.root / ENGINES_FOLDER):
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
        """The manifest with an engine of a network, compiled now if there was none."""
        name, key = entry.spec.name, self._key(entry)
        self.report(name, "checking")
        if entry.key != network_key(self.checkpoint.components, entry.spec, entry.precision):
            raise BundleError(f"{self.bundle.root}: its {name} comes from other weights; build the bundle again")
        artifact = Artifact(ENGINES_FOLDER, name, key)
        stored = self.store.find(artifact)
        if stored is None:
            start = time.monotonic()
            stored = self.store.add(artifact, lambda folder: self._write(entry, folder))
            self.report(name, f"built for {self.target} in {time.monotonic() - start:.1f} s")
        else:
            is_here = any(engine.key == key for engine in manifest.engines)
            self.report(name, f"kept for {self.target}{'' if is_here else ': another bundle had it'}")
        return with_engine(manifest, self._engine(entry, key, stored), stored)

    def _write(self, entry: NetworkEntry, folder: Path) -> Notes:
        self.report(entry.spec.name, "compiling")
        write_package(self.checkpoint, entry, self.bundle.manifest.geometry, self.target.capabilities[0], folder)
        self.report(entry.spec.name, "hashing")
        return {}

    def _engine(self, entry: NetworkEntry, key: str, stored: Stored) -> EngineEntry:
        return EngineEntry(
            network=entry.spec.name,
            flavour=self.target.flavour,
            version=self.version,
            capabilities=self.target.capabilities,
            refittable=False,
            source=entry.key,
            key=key,
            file=stored.path(PACKAGE_NAME),
            # Inductor counts neither; a package is little more than its weights.
            weight_bytes=None,
            activation_bytes=None,
            kernels=None,
        )

    def _key(self, entry: NetworkEntry) -> str:
        """Names what a package computes, what compiled it, and for what. Its bytes are others at every compilation: the
        folder that it was compiled in is part of its code.
        """
        (capability,) = self.target.capabilities
        on_gpu = capability != CPU_CAPABILITY
        identity = {
            "network": entry.key,
            "library": [self.target.flavour.value, self.version],
            "kernels": importlib.metadata.version("triton") if on_gpu and is_installed("triton") else None,
            "capability": capability,
            "instructions": cpu_instructions(),
            "options": dataclasses.asdict(InductorOptions.of(entry.spec.name, capability)),
            "notes": tensors_note(entry.spec),
            "code": sha256_file(Path(__file__)),
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def write_package(
    checkpoint: Checkpoint, entry: NetworkEntry, geometry: Geometry, capability: int, folder: Path
) -> None:
    """Compile a network and write `folder/engine.pt2`, its weights inside.

    Raises:
        BundleError: inductor cannot compile it; the message is PyTorch's own.
    """
    network, options = NETWORKS[entry.spec.name], InductorOptions.of(entry.spec.name, capability)
    device = "cpu" if capability == CPU_CAPABILITY else "cuda"
    module = network.module(checkpoint, geometry, entry.precision)
    _drop_placeholders(module)
    module = module.to(device)
    if options.channels_last:
        # Only what has four dimensions has channels; inputs keep their layout, which is that of the buffers.
        module = module.to(memory_format=torch.channels_last)
    arguments, shapes = tracing_arguments(network, entry.spec, geometry, device)
    notes = {"aot_inductor.metadata": {TENSORS_NOTE: tensors_note(entry.spec)}}
    try:
        with _quiet(), torch.no_grad():
            program = torch.export.export(module, arguments, dynamic_shapes=shapes)
            aoti_compile_and_package(
                program, package_path=str(folder / PACKAGE_NAME), inductor_configs={**options.settings, **notes}
            )
    except (RuntimeError, subprocess.CalledProcessError) as error:  # such as: no C++ compiler, no memory left
        raise BundleError(
            f"{entry.spec.name}: PyTorch {torch.__version__} cannot compile it: {_reason(error)}"
        ) from None
    finally:
        del module
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


def _reason(error: Exception) -> str:
    """What a compiler said, without the long command that it was called with; else all that the error says."""
    said = f"{error}\n{getattr(error, 'stderr', None) or ''}"
    return one_line(next((line for line in said.splitlines() if "error: " in line), said))


def _drop_placeholders(module: nn.Module) -> None:
    """Drop the buffers that no weights are for, and no `forward` of ours reads: they could not be moved to a device."""
    for part in module.modules():
        for name, buffer in list(part.named_buffers(recurse=False)):
            if buffer.is_meta:
                delattr(part, name)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without PyTorch's notices of its own deprecations and of kernels that it measured and did not take."""
    loggers = [logging.getLogger(name) for name in ("torch._inductor", "torch.export")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextlib.contextmanager
def _cache(parent: Path) -> Iterator[None]:
    """Have inductor keep what it makes on the way beside the engines, as large as they are, and drop it at the end.

    What a killed build leaves is what the next one deletes.
    """
    folder = Path(tempfile.mkdtemp(prefix=PARTIAL_PREFIX, dir=parent)).resolve()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_quiet())
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        # They would go on writing there.
        stack.callback(shutdown_compile_workers)
        place = folder
        if len(str(folder).split()) > 1:
            # Inductor makes commands of its paths, and splits them at spaces.
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="moma-rt-"))) / "cache"
            place.symlink_to(folder)
        stack.enter_context(_temporary_files_in(place))
        stack.enter_context(fresh_cache(dir=str(place)))
        yield


@contextlib.contextmanager
def _temporary_files_in(folder: Path) -> Iterator[None]:
    """For processes that are started meanwhile: a C++ compiler that is ended leaves its own."""
    before = os.environ.get("TMPDIR")
    os.environ["TMPDIR"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["TMPDIR"]
        else:
            os.environ["TMPDIR"] = before
