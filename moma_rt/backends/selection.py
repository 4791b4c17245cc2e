"""Which backend runs a bundle on this machine, and which engines it loads."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from moma_rt.backends import AUTO, ONNXRUNTIME, ONNXRUNTIME_CUDA
from moma_rt.backends.device import local_device
from moma_rt.backends.libraries import (
    CUDA_MODULE,
    CUDA_PIP_NAME,
    check_cuda_provider,
    has_cuda_provider,
    is_installed,
    library_version,
)
from moma_rt.bundle.engines import CPU_CAPABILITY, CPU_DEVICE, Device, EngineEntry, Flavour, Library, select
from moma_rt.bundle.manifest import Manifest
from moma_rt.errors import BundleError, InputError, MomaError


class Host:
    """What this machine can run bundles with. Each thing is looked for when it is asked for: it takes time."""

    @cached_property
    def device(self) -> Device | None:
        """Its first GPU."""
        return local_device()

    @cached_property
    def has_cuda(self) -> bool:
        """Whether the CUDA runtime's package is installed."""
        return is_installed(CUDA_MODULE)

    @cached_property
    def missing(self) -> Mapping[Flavour, tuple[str, ...]]:
        """What pip must install before a flavour can be used; a flavour that can be has no entry."""
        found = {}
        for flavour in Flavour:
            names = () if is_installed(flavour.module) else (flavour.pip_name,)
            # PyTorch brings a CUDA of its own.
            needs_cuda = flavour is not Flavour.INDUCTOR and not self.has_cuda
            found[flavour] = (*names, CUDA_PIP_NAME) if needs_cuda else names
        return {flavour: names for flavour, names in found.items() if names}

    def version(self, flavour: Flavour) -> str:
        """The version of an installed flavour, which is imported for it. May raise InputError."""
        return library_version(flavour)

    @cached_property
    def has_cuda_provider(self) -> bool:
        """Whether the installed ONNX Runtime, which is imported for it, is one for GPUs."""
        return has_cuda_provider()

    def check_cuda_provider(self) -> None:
        """Raise InputError unless that ONNX Runtime can be used."""
        check_cuda_provider()


@dataclass(frozen=True)
class Choice:
    """A backend by name; the engine of each network, None if it runs none; why it does not run those that there are."""

    backend: str
    engines: Mapping[str, EngineEntry] | None = None
    warning: str = ""


def choose(backend: str, manifest: Manifest, host: Host) -> Choice:
    """Resolve a backend's name for a bundle.

    `AUTO` is TensorRT, else TensorRT-RTX, else inductor, where there is a GPU and that has an engine for every network
    of the bundle: inductor's engines for a CPU are taken where it is named. Else it is ONNX Runtime, on the GPU if the
    one that is installed is for GPUs. Of a bundle without ONNX graphs it is whatever its engines are for, a CPU's too.
    Networks are not divided between backends.

    Args:
        backend: one of `moma_rt.backends.NAMES`.

    Raises:
        InputError: a backend was named, and it lacks a GPU, or a package is missing or cannot be loaded.
        BundleError: a flavour was named, and the bundle has not all the engines for it, or ONNX Runtime, and it has no
            graphs; the message says how to build them.
    """
    if backend in (ONNXRUNTIME, ONNXRUNTIME_CUDA):
        _check_graphs(backend, manifest)
        return Choice(ONNXRUNTIME) if backend == ONNXRUNTIME else _with_cuda_provider(host)
    if backend != AUTO:
        return _with_engines(Flavour(backend), manifest, host)
    if not manifest.has_graphs:
        return _with_engines(_only_flavour(manifest, host), manifest, host)
    reasons = []
    if manifest.engines and host.device is not None:
        for flavour in _most_likely_first(manifest, host, host.device):
            try:
                return _with_engines(flavour, manifest, host)
            except MomaError as error:
                reasons.append(error)
    # Who installs that ONNX Runtime wants the GPU; a driver is asked after it because it takes longer.
    if host.has_cuda_provider and host.device is not None:
        warning = f"{reasons[0]}; ONNX Runtime runs the bundle on the GPU now" if reasons else ""
        try:
            return replace(_with_cuda_provider(host), warning=warning)
        except MomaError as error:
            reasons.append(error)
    return Choice(ONNXRUNTIME, warning=f"{reasons[0]}; the bundle runs on the CPU now" if reasons else "")


def _check_graphs(backend: str, manifest: Manifest) -> None:
    if not manifest.has_graphs:
        have = ", ".join(sorted({engine.flavour.value for engine in manifest.engines})) or "no engines either"
        raise BundleError(
            f"backend {backend}: the bundle has no ONNX graphs, {manifest.explain_missing}; it has engines for: {have}"
        )


def _only_flavour(manifest: Manifest, host: Host) -> Flavour:
    """The flavour whose engines a bundle without graphs runs on this machine, or whose objection is to be heard."""
    device = host.device or CPU_DEVICE
    built = [
        f for f in Flavour if any(e.flavour is f and device.capability in e.capabilities for e in manifest.engines)
    ]
    others = [flavour for flavour in Flavour if any(engine.flavour is flavour for engine in manifest.engines)]
    found = sorted(built or others, key=lambda flavour: flavour in host.missing)
    if not found:
        raise BundleError(f"the bundle has neither ONNX graphs nor engines, {manifest.explain_missing}")
    return found[0]


def _with_cuda_provider(host: Host) -> Choice:
    if host.device is None:
        raise _no_gpu(ONNXRUNTIME_CUDA)
    try:
        host.check_cuda_provider()
    except InputError as error:
        raise InputError(f"backend {ONNXRUNTIME_CUDA}: {error}") from None
    if not host.has_cuda:
        raise _not_installed(ONNXRUNTIME_CUDA, (CUDA_PIP_NAME,))
    return Choice(ONNXRUNTIME_CUDA)


def _with_engines(flavour: Flavour, manifest: Manifest, host: Host) -> Choice:
    device = host.device or (CPU_DEVICE if flavour is Flavour.INDUCTOR else None)
    if device is None:
        raise _no_gpu(flavour.value)
    if flavour in host.missing:
        raise _not_installed(flavour.value, host.missing[flavour])
    library = Library(flavour, host.version(flavour))
    return Choice(flavour.value, select(manifest.engines, manifest.networks, library, device, manifest.packed_for))


def _no_gpu(backend: str) -> InputError:
    return InputError(
        f"backend {backend}: this machine has no NVIDIA GPU (or no driver); {ONNXRUNTIME} runs on the CPU"
    )


def _not_installed(backend: str, names: Iterable[str]) -> InputError:
    return InputError(f"backend {backend} needs packages that are not installed: pip install {' '.join(names)}")


def _most_likely_first(manifest: Manifest, host: Host, device: Device) -> list[Flavour]:
    """The flavours with engines for the device, those that can be used first; where there are none, the one of another
    device's engines. So the first one's objection is what to mend, and no library is imported in vain.
    """
    built = {engine.flavour for engine in manifest.engines if device.capability in engine.capabilities}
    of_gpus = {engine.flavour for engine in manifest.engines if engine.capabilities != (CPU_CAPABILITY,)}
    usable_first = sorted(Flavour, key=lambda flavour: flavour in host.missing)
    return [f for f in usable_first if f in built] or [f for f in usable_first if f in of_gpus][:1]
