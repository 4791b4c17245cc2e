"""The engines of a bundle, and the selection of those that run on a device.

An engine is a network compiled by TensorRT, TensorRT-RTX or PyTorch's inductor. Only the library version that built it
can load it, and only devices of the compute capabilities it was built for can run it. The manifest lists both, so a
runtime can tell what is missing without opening a file.
"""

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from moma_rt.bundle.specs import check_fields
from moma_rt.errors import BundleError
from moma_rt.messages import short_repr

# The compute capabilities that TensorRT-RTX compiles for on any machine; others need TensorRT on such a device.
RTX_CAPABILITIES = (75, 86, 89, 120, 121)
# Stands for a CPU, which only inductor builds for; no GPU has this capability.
CPU_CAPABILITY = 0
_MAX_BYTES = 2**48
_MAX_CAPABILITY = 999


class Flavour(enum.Enum):
    """A library that builds and runs engines, in order of preference."""

    TENSORRT = "tensorrt"
    TENSORRT_RTX = "tensorrt_rtx"
    INDUCTOR = "inductor"

    @property
    def module(self) -> str:
        """The name of its Python package."""
        return "torch" if self is Flavour.INDUCTOR else self.value

    @property
    def reads_weights(self) -> bool:
        """Whether its engines contain no weights and read them from the files of their network."""
        return self is Flavour.INDUCTOR

    @property
    def pip_name(self) -> str:
        """The name of that package for pip."""
        return self.module.replace("_", "-")


@dataclass(frozen=True)
class Device:
    """A GPU: its name, and its compute capability as 86 for 8.6."""

    name: str
    capability: int


# Used without a GPU, by engines that need none.
CPU_DEVICE = Device("this machine's CPU", CPU_CAPABILITY)


@dataclass(frozen=True)
class EngineEntry:
    """One network compiled for some devices.

    Attributes:
        source: the key of the network it was built from; for an engine without weights, that network's structure.
        key: identifies the engine by its source, its compiler and its target.
        weight_bytes, activation_bytes: the device memory it needs at its largest shapes, as the builder reports it;
            None if the builder does not. Weights outside the engine do not count.
        kernels: the hash of the kernels that its plugins launch; None if it has no plugins.
        measured: whether its kernels were timed on such a device; False if it was compiled without one and they were
            chosen by rule.
    """

    network: str
    flavour: Flavour
    version: str
    capabilities: tuple[int, ...]
    refittable: bool
    source: str
    key: str
    file: str
    weight_bytes: int | None
    activation_bytes: int | None
    kernels: str | None
    measured: bool = True

    @property
    def folder(self) -> str:
        """The folder of its file and of all other files that belong to it."""
        return str(PurePosixPath(self.file).parent)

    def serves(self, flavour: Flavour, version: str, capability: int) -> bool:
        """Whether this engine runs on a device of `capability` with that library."""
        return (self.flavour, self.version) == (flavour, version) and capability in self.capabilities

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "flavour": self.flavour.value, "capabilities": list(self.capabilities)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "EngineEntry":
        """Raises ValueError for fields of another type or out of range."""
        check_fields(cls, data)
        names = ("network", "version", "source", "key", "file")
        texts: dict[str, Any] = {name: _line("an engine", data, name) for name in names}
        capabilities = data["capabilities"]
        if (
            not isinstance(capabilities, list)
            or not capabilities
            or not all(_is_number(c, _MAX_CAPABILITY) for c in capabilities)
        ):
            raise ValueError(f"an engine's capabilities are {short_repr(capabilities)}, not a list such as [86, 89]")
        for name in ("refittable", "measured"):
            if not isinstance(data[name], bool):
                raise ValueError(f"an engine's {name} is {short_repr(data[name])}, not true or false")
        sizes = {name: data[name] for name in ("weight_bytes", "activation_bytes")}
        for name, size in sizes.items():
            if size is not None and not _is_number(size, _MAX_BYTES):
                raise ValueError(f"an engine's {name} is {short_repr(size)}, not a number of bytes")
        kernels = None if data["kernels"] is None else _line("an engine", data, "kernels")
        return cls(
            **texts,
            **sizes,
            flavour=Flavour(data["flavour"]),
            capabilities=tuple(capabilities),
            refittable=data["refittable"],
            kernels=kernels,
            measured=data["measured"],
        )


@dataclass(frozen=True)
class KernelsEntry:
    """A network's own kernels, compiled for one compute capability, from which TensorRT builds its plugins.

    `file` lists the other files of its folder and what each computes; `key` identifies what they were compiled from.
    """

    network: str
    capability: int
    key: str
    file: str

    @property
    def folder(self) -> str:
        """The folder of its files."""
        return str(PurePosixPath(self.file).parent)

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "KernelsEntry":
        """Raises ValueError for fields of another type or out of range."""
        check_fields(cls, data)
        if not _is_number(data["capability"], _MAX_CAPABILITY):
            raise ValueError(f"the kernels' capability is {short_repr(data['capability'])}, not a number such as 86")
        texts = {name: _line("a kernel", data, name) for name in ("network", "key", "file")}
        return cls(**texts, capability=data["capability"])


@dataclass(frozen=True)
class Library:
    """An installed flavour and its version."""

    flavour: Flavour
    version: str


def select(
    engines: Iterable[EngineEntry], networks: Iterable[str], library: Library, device: Device, packed_for: str = ""
) -> dict[str, EngineEntry]:
    """Select the engine of each network that a library runs on a device.

    Args:
        packed_for: the target that the bundle was packed for; empty if it is whole.

    Raises:
        BundleError: a network has none; the message lists the bundle's engines and how to build the missing ones.
    """
    engines, names = tuple(engines), tuple(networks)
    found = {
        engine.network: engine
        for engine in engines
        if engine.network in names and engine.serves(library.flavour, library.version, device.capability)
    }
    missing = [name for name in names if name not in found]
    if not missing:
        return found
    here = f"{library.flavour.value} {library.version} on {format_capabilities([device.capability])} ({device.name})"
    have = sorted({f"{e.flavour.value} {e.version} on {format_capabilities(e.capabilities)}" for e in engines})
    advice = f"build the missing ones with {_build_command(library.flavour, device.capability)}"
    if packed_for:
        advice = f"it was packed for {packed_for}; pack the whole bundle again for this device"
    raise BundleError(
        f"no engine of {', '.join(missing)} for {here}; the bundle has engines for {'; '.join(have) or 'no device'}: "
        f"{advice}"
    )


def format_capabilities(capabilities: Iterable[int]) -> str:
    """Format capabilities as `--target` takes them, such as sm86,sm89; a CPU's is cpu."""
    return ",".join("cpu" if capability == CPU_CAPABILITY else f"sm{capability}" for capability in capabilities)


def _build_command(flavour: Flavour, capability: int) -> str:
    """The command that builds engines of a flavour for a capability."""
    if flavour is Flavour.INDUCTOR:
        return "python -m export.build ... --target inductor"
    is_rtx = flavour is Flavour.TENSORRT_RTX and capability in RTX_CAPABILITIES
    return f"python -m engines.build BUNDLE --target {f'sm{capability}' if is_rtx else 'local'}"


def _line(owner: str, data: dict[str, Any], name: str) -> str:
    text = data[name]
    if not isinstance(text, str) or not text or not text.isprintable():
        raise ValueError(f"{owner}'s {name} is {short_repr(text)}, not a line of text")
    return text


def _is_number(value: object, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most
