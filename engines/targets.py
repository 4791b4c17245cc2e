"""Parses `--target`, and checks it against what this machine can build.

TensorRT-RTX compiles for GeForce and RTX devices on any machine. TensorRT selects kernels by timing them, so it builds
only on the device itself: a bundle for an A100, an H100 or a Jetson is exported anywhere and its engines are built
there. PyTorch's inductor compiles for this machine's GPU, or its CPU if it has none, and times kernels there; for a
named GPU it compiles on any machine, and selects kernels by rule where that GPU is absent.
"""

import dataclasses
from dataclasses import dataclass

from moma_rt.backends.device import local_device
from moma_rt.backends.libraries import is_installed
from moma_rt.bundle.engines import CPU_DEVICE, RTX_CAPABILITIES, Device, Flavour, format_capabilities
from moma_rt.errors import InputError

CPU, RTX, LOCAL, INDUCTOR = "cpu", "rtx", "local", "inductor"
# The devices of `rtx`: Ampere and later. Turing is only built when it is named (sm75).
RTX_TARGETS = (86, 89, 120, 121)
# Datacenter and Jetson devices, which TensorRT-RTX does not support.
TENSORRT_CAPABILITIES = (80, 87, 90, 100, 103, 110)
_TENSORRT = tuple(f"sm{c}" for c in TENSORRT_CAPABILITIES)
# Equal to `kernels.launch.CAPABILITIES`.
INDUCTOR_CAPABILITIES = (80, 86, 87, 89, 90, 100, 103, 120, 121)
_INDUCTOR_SM = f"{INDUCTOR}:sm"
KNOWN = (
    *(CPU, RTX, LOCAL, INDUCTOR),
    *(f"sm{c}" for c in sorted((*RTX_CAPABILITIES, *TENSORRT_CAPABILITIES))),
    *(f"{_INDUCTOR_SM}{c}" for c in INDUCTOR_CAPABILITIES),
)


@dataclass(frozen=True)
class EngineTarget:
    """A library, and the compute capabilities that one engine per network is built for.

    measured: kernels must be selected by timing them on this machine; False: an engine whose kernels were selected by
        rule on a machine without the device will do (`inductor:sm90`).
    """

    flavour: Flavour
    capabilities: tuple[int, ...]
    measured: bool = True

    def __str__(self) -> str:
        return f"{self.flavour.value} {format_capabilities(self.capabilities)}"


@dataclass(frozen=True)
class Machine:
    """This machine's GPU, if any, and the installed libraries that build engines."""

    device: Device | None
    installed: frozenset[Flavour]

    @classmethod
    def here(cls) -> "Machine":
        """Describe this machine without importing any of the libraries."""
        installed = frozenset(f for f in Flavour if is_installed(f.module))
        return cls(local_device(), installed)


def parse_targets(text: str) -> tuple[str, ...]:
    """Parse the value of `--target`: names in `KNOWN`, separated by commas, in any case.

    Raises:
        InputError: no name, or an unknown one.
    """
    return parse_list("--target", "target", text.lower(), KNOWN)


def parse_list(option: str, kind: str, text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """Parse an option whose value is a list of names separated by commas; returns them in the order of `known`.

    Args:
        option, kind: the option and the singular noun for its values, for the error message.

    Raises:
        InputError: no name, or one that is not in `known`.
    """
    asked = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in asked if name not in known]
    if unknown or not asked:
        raise InputError(
            f"{option} {text!r}: no {kind} {', '.join(unknown) or 'is named'}; there are: {', '.join(known)}"
        )
    return tuple(name for name in known if name in asked)


def resolve(names: tuple[str, ...], machine: Machine) -> tuple[EngineTarget, ...]:
    """Translate target names to what has to be built; nothing for `cpu`, which runs the ONNX graphs.

    Raises:
        InputError: a target that this machine cannot build for; the message says where and how to build it.
    """
    rtx, targets = set[int](), list[EngineTarget]()
    for name in names:
        if name == RTX:
            rtx.update(RTX_TARGETS)
        elif name == LOCAL:
            targets.append(_local(machine))
        elif name == INDUCTOR:
            capability = (machine.device or CPU_DEVICE).capability
            targets.append(_installed(EngineTarget(Flavour.INDUCTOR, (capability,)), machine))
        elif name.startswith(_INDUCTOR_SM):
            capability = int(name.removeprefix(_INDUCTOR_SM))
            targets.append(_installed(EngineTarget(Flavour.INDUCTOR, (capability,), measured=False), machine))
        elif name != CPU:
            capability = int(name.removeprefix("sm"))
            if capability in RTX_CAPABILITIES:
                rtx.add(capability)
            else:
                targets.append(_on_device(capability, machine))
    if rtx:
        targets.insert(0, _installed(EngineTarget(Flavour.TENSORRT_RTX, tuple(sorted(rtx))), machine))
    # A package whose kernels are timed also serves the target that does not ask for timing.
    superseded = {dataclasses.replace(target, measured=False) for target in targets if target.measured}
    return tuple(dict.fromkeys(target for target in targets if target not in superseded))


def targets_for_other_devices(names: tuple[str, ...], machine: Machine) -> tuple[str, ...]:
    """Return the TensorRT targets, such as sm80, that have to be built on another machine."""
    here = "" if machine.device is None else f"sm{machine.device.capability}"
    return tuple(name for name in names if name in _TENSORRT and name != here)


def _local(machine: Machine) -> EngineTarget:
    device = machine.device
    if device is None:
        raise InputError(f"--target {LOCAL}: this machine has no NVIDIA GPU (or no driver); name one, such as sm89")
    if Flavour.TENSORRT not in machine.installed and device.capability in RTX_CAPABILITIES:
        return _installed(EngineTarget(Flavour.TENSORRT_RTX, (device.capability,)), machine)
    return _installed(EngineTarget(Flavour.TENSORRT, (device.capability,)), machine)


def _on_device(capability: int, machine: Machine) -> EngineTarget:
    device = machine.device
    if device is None or device.capability != capability:
        here = "no GPU" if device is None else f"sm{device.capability}"
        raise InputError(
            f"--target sm{capability}: TensorRT builds only on such a device, and this machine has {here}; export here "
            f"with --precision fp16 instead, copy the bundle there, and run python -m engines.build BUNDLE "
            f"--target {LOCAL}"
        )
    return _installed(EngineTarget(Flavour.TENSORRT, (capability,)), machine)


def _installed(target: EngineTarget, machine: Machine) -> EngineTarget:
    if target.flavour not in machine.installed:
        raise InputError(
            f"{target}: the Python package {target.flavour.module} is not installed; "
            f"pip install {target.flavour.pip_name}"
        )
    return target
