"""Which backend runs a bundle on this machine, and which engines it loads."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from moma_rt.backends import AUTO, ONNXRUNTIME
from moma_rt.bundle import Manifest
from moma_rt.device import local_device
from moma_rt.engines import CPU_CAPABILITY, CPU_DEVICE, Device, EngineEntry, Flavour, Library, select
from moma_rt.errors import InputError, MomaError
from moma_rt.libraries import CUDA_MODULE, CUDA_PIP_NAME, is_installed, library_version


@dataclass(frozen=True)
class Host:
    """What a machine can run engines with.

    missing: what pip must install before a flavour can be used; a flavour that can be has no entry.
    version: the version of an installed flavour, which is imported for it; may raise InputError.
    """

    device: Device | None
    missing: Mapping[Flavour, tuple[str, ...]]
    version: Callable[[Flavour], str]


def local_host() -> Host:
    """This machine."""
    modules = {f: {f.module: f.pip_name, CUDA_MODULE: CUDA_PIP_NAME} for f in Flavour}
    # PyTorch brings a CUDA of its own.
    del modules[Flavour.INDUCTOR][CUDA_MODULE]
    missing = {f: tuple(pip for name, pip in names.items() if not is_installed(name)) for f, names in modules.items()}
    return Host(local_device(), {f: names for f, names in missing.items() if names}, library_version)


@dataclass(frozen=True)
class Choice:
    """A backend by name; the engine of each network, None if it runs none; why it does not run those that there are."""

    backend: str
    engines: Mapping[str, EngineEntry] | None = None
    warning: str = ""


def choose(backend: str, manifest: Manifest, host: Callable[[], Host]) -> Choice:
    """Resolve a backend's name for a bundle.

    `AUTO` is TensorRT, else TensorRT-RTX, else inductor, where there is a GPU and that has an engine for every network
    of the bundle, else ONNX Runtime: inductor's engines for a CPU are taken where it is named. Networks are not divided
    between backends.

    Args:
        backend: one of `moma_rt.backends.NAMES`.
        host: called where engines come into question, since asking a driver takes time.

    Raises:
        InputError: a flavour was named, and it lacks a GPU, or a package is missing or cannot be loaded.
        BundleError: a flavour was named, and the bundle has not all the engines for it; the message says how to build
            them.
    """
    if backend == ONNXRUNTIME or (backend == AUTO and not manifest.engines):
        return Choice(ONNXRUNTIME)
    found = host()
    if backend != AUTO:
        return _with_engines(Flavour(backend), manifest, found)
    if found.device is None:
        return Choice(ONNXRUNTIME)
    reasons = []
    for flavour in _most_likely_first(manifest, found, found.device):
        try:
            return _with_engines(flavour, manifest, found)
        except MomaError as error:
            reasons.append(error)
    warning = f"{reasons[0]}; the bundle runs on the CPU now" if reasons else ""
    return Choice(ONNXRUNTIME, warning=warning)


def _with_engines(flavour: Flavour, manifest: Manifest, host: Host) -> Choice:
    device = host.device or (CPU_DEVICE if flavour is Flavour.INDUCTOR else None)
    if device is None:
        raise InputError(
            f"backend {flavour.value}: this machine has no NVIDIA GPU (or no driver); {ONNXRUNTIME} runs on the CPU"
        )
    if flavour in host.missing:
        names = " ".join(host.missing[flavour])
        raise InputError(f"backend {flavour.value} needs packages that are not installed: pip install {names}")
    library = Library(flavour, host.version(flavour))
    return Choice(flavour.value, select(manifest.engines, manifest.networks, library, device))


def _most_likely_first(manifest: Manifest, host: Host, device: Device) -> list[Flavour]:
    """The flavours with engines for the device, those that can be used first; where there are none, the one of another
    device's engines. So the first one's objection is what to mend, and no library is imported in vain.
    """
    built = {engine.flavour for engine in manifest.engines if device.capability in engine.capabilities}
    of_gpus = {engine.flavour for engine in manifest.engines if engine.capabilities != (CPU_CAPABILITY,)}
    usable_first = sorted(Flavour, key=lambda flavour: flavour in host.missing)
    return [f for f in usable_first if f in built] or [f for f in usable_first if f in of_gpus][:1]
