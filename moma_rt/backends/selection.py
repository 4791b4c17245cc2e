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
    """This machine's GPU and libraries, each looked up on first use because that takes time."""

    @cached_property
    def device(self) -> Device | None:
        """The first GPU; None without one."""
        return local_device()

    @cached_property
    def has_cuda(self) -> bool:
        """Whether the CUDA runtime's package is installed."""
        return is_installed(CUDA_MODULE)

    @cached_property
    def missing(self) -> Mapping[Flavour, tuple[str, ...]]:
        """The packages that pip must install for each flavour; a flavour that can be used has no entry."""
        found = {}
        for flavour in Flavour:
            names = () if is_installed(flavour.module) else (flavour.pip_name,)
            # PyTorch includes its own CUDA runtime.
            needs_cuda = flavour is not Flavour.INDUCTOR and not self.has_cuda
            found[flavour] = (*names, CUDA_PIP_NAME) if needs_cuda else names
        return {flavour: names for flavour, names in found.items() if names}

    def version(self, flavour: Flavour) -> str:
        """Import an installed flavour and return its version. May raise InputError."""
        return library_version(flavour)

    @cached_property
    def has_cuda_provider(self) -> bool:
        """Whether the installed ONNX Runtime has the CUDA provider; imports it."""
        return has_cuda_provider()

    def check_cuda_provider(self) -> None:
        """Raise InputError unless ONNX Runtime's CUDA provider can be used."""
        check_cuda_provider()


@dataclass(frozen=True)
class Choice:
    """A backend by name, its engine of each network (None for ONNX Runtime), and why it is a fallback, if it is one."""

    backend: str
    engines: Mapping[str, EngineEntry] | None = None
    warning: str = ""


def choose(backend: str, manifest: Manifest, host: Host) -> Choice:
    """Resolve a backend's name for a bundle.

    On a GPU, `AUTO` is the first of TensorRT, TensorRT-RTX and inductor that has an engine for it of every network.
    Otherwise it is ONNX Runtime, on the GPU if the installed package supports that. Inductor's engines for a CPU must
    be named, except for a bundle without ONNX graphs, where `AUTO` takes whichever engines the bundle has. One backend
    runs all networks.

    Args:
        backend: one of `moma_rt.backends.NAMES`.

    Raises:
        InputError: a named backend lacks a GPU, or one of its packages is missing or cannot be loaded.
        BundleError: the bundle lacks engines of a named flavour, or graphs for ONNX Runtime; the message says how to
            build them.
    """
    if backend in (ONNXRUNTIME, ONNXRUNTIME_CUDA):
        _check_graphs(backend, manifest)
        return Choice(ONNXRUNTIME) if backend == ONNXRUNTIME else _choose_cuda_provider(host)
    if backend != AUTO:
        return _choose_engines(Flavour(backend), manifest, host)
    if not manifest.has_graphs:
        return _choose_engines(_flavour_without_graphs(manifest, host), manifest, host)
    reasons = []
    if manifest.engines and host.device is not None:
        for flavour in _flavours_to_try(manifest, host, host.device):
            try:
                return _choose_engines(flavour, manifest, host)
            except MomaError as error:
                reasons.append(error)
    # Whoever installs onnxruntime-gpu wants it used. The driver is asked second, because it takes longer.
    if host.has_cuda_provider and host.device is not None:
        warning = f"{reasons[0]}; falling back to ONNX Runtime on the GPU" if reasons else ""
        try:
            return replace(_choose_cuda_provider(host), warning=warning)
        except MomaError as error:
            reasons.append(error)
    return Choice(ONNXRUNTIME, warning=f"{reasons[0]}; falling back to ONNX Runtime on the CPU" if reasons else "")


def _check_graphs(backend: str, manifest: Manifest) -> None:
    if not manifest.has_graphs:
        have = ", ".join(sorted({engine.flavour.value for engine in manifest.engines})) or "nothing"
        raise BundleError(
            f"backend {backend}: the bundle has no ONNX graphs, {manifest.explain_missing}; it has engines for: {have}"
        )


def _flavour_without_graphs(manifest: Manifest, host: Host) -> Flavour:
    """The flavour for a bundle without graphs: with engines for this machine if any, else with others."""
    device = host.device or CPU_DEVICE
    built = [
        f for f in Flavour if any(e.flavour is f and device.capability in e.capabilities for e in manifest.engines)
    ]
    others = [flavour for flavour in Flavour if any(engine.flavour is flavour for engine in manifest.engines)]
    found = sorted(built or others, key=lambda flavour: flavour in host.missing)
    if not found:
        raise BundleError(f"the bundle has neither ONNX graphs nor engines, {manifest.explain_missing}")
    return found[0]


def _choose_cuda_provider(host: Host) -> Choice:
    if host.device is None:
        raise _no_gpu_error(ONNXRUNTIME_CUDA)
    try:
        host.check_cuda_provider()
    except InputError as error:
        raise InputError(f"backend {ONNXRUNTIME_CUDA}: {error}") from None
    if not host.has_cuda:
        raise _not_installed_error(ONNXRUNTIME_CUDA, (CUDA_PIP_NAME,))
    return Choice(ONNXRUNTIME_CUDA)


def _choose_engines(flavour: Flavour, manifest: Manifest, host: Host) -> Choice:
    device = host.device or (CPU_DEVICE if flavour is Flavour.INDUCTOR else None)
    if device is None:
        raise _no_gpu_error(flavour.value)
    if flavour in host.missing:
        raise _not_installed_error(flavour.value, host.missing[flavour])
    library = Library(flavour, host.version(flavour))
    return Choice(flavour.value, select(manifest.engines, manifest.networks, library, device, manifest.packed_for))


def _no_gpu_error(backend: str) -> InputError:
    return InputError(
        f"backend {backend}: this machine has no NVIDIA GPU (or no driver); {ONNXRUNTIME} runs on the CPU"
    )


def _not_installed_error(backend: str, names: Iterable[str]) -> InputError:
    return InputError(f"backend {backend} needs packages that are not installed: pip install {' '.join(names)}")


def _flavours_to_try(manifest: Manifest, host: Host, device: Device) -> list[Flavour]:
    """The flavours with engines for the device, installed ones first; if there are none, one with engines for a GPU.

    So the first one's error says what to fix, and no library is imported needlessly.
    """
    built = {engine.flavour for engine in manifest.engines if device.capability in engine.capabilities}
    for_gpus = {engine.flavour for engine in manifest.engines if engine.capabilities != (CPU_CAPABILITY,)}
    installed_first = sorted(Flavour, key=lambda flavour: flavour in host.missing)
    return [f for f in installed_first if f in built] or [f for f in installed_first if f in for_gpus][:1]
