"""Compile the attention operators' kernels to PTX for TensorRT's plugins; the target device need not be present."""

import hashlib
import importlib.metadata
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from engines.plugins import KERNELS_NAME, attention_shapes, kernel_dtype
from engines.store import KERNELS_FOLDER, Artifact, Store, Stored
from engines.targets import EngineTarget
from kernels.launch import DEFAULT_CAPABILITIES
from moma_rt.backends.libraries import is_installed
from moma_rt.bundle.engines import Flavour, KernelsEntry, format_capabilities
from moma_rt.bundle.manifest import NetworkEntry
from moma_rt.bundle.specs import Geometry, Precision

COMPILER = "triton"
# Sources in the package `kernels` whose change may change a kernel.
_CODE = ("*.py", "*/triton_kernel.py")

Report = Callable[[str, str], None]


def kernel_capabilities(targets: Iterable[EngineTarget], later: Iterable[int], precision: Precision) -> tuple[int, ...]:
    """Return the compute capabilities to compile kernels for: TensorRT's targets, or the defaults without any target.

    Args:
        targets: the targets of this build.
        later: the compute capabilities of devices on which engines are built later.
        precision: the network's.
    """
    targets = tuple(targets)
    named = {c for target in targets if target.flavour is Flavour.TENSORRT for c in target.capabilities} | set(later)
    if kernel_dtype(precision) is None:
        return ()
    return tuple(sorted(named)) if named or targets else DEFAULT_CAPABILITIES


def kernels_key(network: NetworkEntry, geometry: Geometry, capability: int) -> str:
    """Return the store key of a network's kernels: a hash of shapes, dtype, device, source code and compiler."""
    identity = {
        "shapes": [asdict(shape) for shape in attention_shapes(geometry)],
        "dtype": kernel_dtype(network.precision),
        "capability": capability,
        "code": kernels_code_hash(),
        "compiler": importlib.metadata.version(COMPILER) if is_installed(COMPILER) else None,
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class KernelExporter:
    """Compiles a network's kernels into a store."""

    network: NetworkEntry
    geometry: Geometry
    store: Store
    report: Report

    def stored(self, capabilities: Iterable[int], previous: Iterable[KernelsEntry]) -> dict[KernelsEntry, Stored]:
        """Return kernels for all of `capabilities`, compiling what is missing, and the `previous` ones still current.

        Without Triton, or in a precision without kernels, nothing is compiled: the network runs on standard operators.
        """
        if kernel_dtype(self.network.precision) is None:
            return {}
        name, wanted = self.network.spec.name, self._compilable(set(capabilities))
        earlier = {entry.capability for entry in previous if entry.network == name}
        found = {}
        for capability in sorted(wanted | earlier):
            key = kernels_key(self.network, self.geometry, capability)
            artifact = Artifact(KERNELS_FOLDER, f"{name}_sm{capability}", key)
            stored = self.store.find(artifact)
            if stored is None and capability in wanted:
                stored = self._compiled(artifact, capability)
            if stored is not None:
                found[KernelsEntry(name, capability, key, stored.path(KERNELS_NAME))] = stored
        return found

    def _compilable(self, wanted: set[int]) -> set[int]:
        """Return the capabilities that can be compiled for, and report a note about the others."""
        name = self.network.spec.name
        if not wanted:
            return wanted
        if not is_installed(COMPILER):
            self.report(name, "note: no kernels are compiled, since Triton is not installed: pip install triton")
            return set()
        from kernels.launch import CAPABILITIES

        unknown = wanted - set(CAPABILITIES)
        if unknown:
            known = format_capabilities(CAPABILITIES)
            self.report(
                name, f"note: no kernels are compiled for {format_capabilities(sorted(unknown))}, only for {known}"
            )
        return wanted - unknown

    def _compiled(self, artifact: Artifact, capability: int) -> Stored | None:
        from kernels.ptx import AttentionLayer, CompileError, write_kernels

        name, dtype = self.network.spec.name, kernel_dtype(self.network.precision)
        layers = [AttentionLayer(**vars(shape)) for shape in attention_shapes(self.geometry)]

        def write(folder: Path) -> dict[str, object]:
            write_kernels(folder, layers, [dtype], [capability], lambda text: self.report(name, f"compiling {text}"))
            return {}

        start = time.monotonic()
        self.report(name, f"compiling kernels for sm{capability}")
        try:
            stored = self.store.add(artifact, write)
        except CompileError as error:
            # The network runs on standard operators there.
            self.report(name, f"note: no kernels are compiled for sm{capability}: {error}")
            return None
        self.report(name, f"kernels for sm{capability} built in {time.monotonic() - start:.1f} s")
        return stored


def kernels_code_hash() -> str:
    """Return the SHA-256 of the code that determines a kernel: the kernels' sources and their launch configurations."""
    root = Path(__file__).resolve().parent.parent / "kernels"
    digest = hashlib.sha256()
    for path in sorted(path for pattern in _CODE for path in root.glob(pattern)):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
