"""What engines are to be built for: `--target` read, and checked against what this machine can build.

TensorRT-RTX compiles for GeForce and RTX devices on any machine. TensorRT measures its kernels, and so builds only on
the device itself: a bundle for an A100, an H100 or a Jetson is exported anywhere and finished there. PyTorch's inductor
compiles for the machine it runs on, its GPU or else its CPU, and measures its kernels there; for a GPU that is named it
compiles on any machine, without measuring where there is none.
"""

import dataclasses
from dataclasses import dataclass

from moma_rt.backends.device import local_device
from moma_rt.backends.libraries import is_installed
from moma_rt.bundle.engines import CPU_DEVICE, RTX_CAPABILITIES, Device, Flavour, format_capabilities
from moma_rt.errors import InputError

CPU, RTX, LOCAL, INDUCTOR = "cpu", "rtx", "local", "inductor"
# What `rtx` stands for: Ampere and later. Turing is built when it is named (sm75).
RTX_TARGETS = (86, 89, 120, 121)
# Datacenter and Jetson devices, for whose capabilities there is only TensorRT itself.
TENSORRT_CAPABILITIES = (80, 87, 90, 100, 103, 110)
_TENSORRT = tuple(f"sm{c}" for c in TENSORRT_CAPABILITIES)
# Those for which Triton has kernels of ours, as `kernels.launch` lists them.
INDUCTOR_CAPABILITIES = (80, 86, 87, 89, 90, 100, 103, 120, 121)
_CROSS = f"{INDUCTOR}:sm"
KNOWN = (
    *(CPU, RTX, LOCAL, INDUCTOR),
    *(f"sm{c}" for c in sorted((*RTX_CAPABILITIES, *TENSORRT_CAPABILITIES))),
    *(f"{_CROSS}{c}" for c in INDUCTOR_CAPABILITIES),
)


@dataclass(frozen=True)
class EngineTarget:
    """Devices that one engine a network is built for.

    `measured`: kernels are to be chosen by measuring them on this machine; False: an engine will do whose kernels were
    chosen by rule, on a machine without such a device (`inductor:sm90`).
    """

    flavour: Flavour
    capabilities: tuple[int, ...]
    measured: bool = True

    def __str__(self) -> str:
        return f"{self.flavour.value} {format_capabilities(self.capabilities)}"


@dataclass(frozen=True)
class Machine:
    """What this machine can build engines with."""

    device: Device | None
    installed: frozenset[Flavour]

    @classmethod
    def here(cls) -> "Machine":
        """This machine; nothing is imported for it."""
        installed = frozenset(f for f in Flavour if is_installed(f.module))
        return cls(local_device(), installed)


def parse_targets(text: str) -> tuple[str, ...]:
    """The targets that an option names, separated by commas.

    Raises:
        InputError: none, or one that is not in `KNOWN`.
    """
    return listed("--target", "target", text.lower(), KNOWN)


def listed(option: str, kind: str, text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """What an option names, separated by commas, in the order of `known`.

    Raises:
        InputError: nothing, or something that is not known.
    """
    asked = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in asked if name not in known]
    if unknown or not asked:
        raise InputError(
            f"{option} {text!r}: no {kind} {', '.join(unknown) or 'is named'}; there are: {', '.join(known)}"
        )
    return tuple(name for name in known if name in asked)


def resolve(names: tuple[str, ...], machine: Machine) -> tuple[EngineTarget, ...]:
    """The engines that targets stand for; `cpu` needs none, since it runs the ONNX files.

    Raises:
        InputError: a target that this machine cannot build for; the message says where and how it is built.
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
        elif name.startswith(_CROSS):
            capability = int(name.removeprefix(_CROSS))
            targets.append(_installed(EngineTarget(Flavour.INDUCTOR, (capability,), measured=False), machine))
        elif name != CPU:
            capability = int(name.removeprefix("sm"))
            if capability in RTX_CAPABILITIES:
                rtx.add(capability)
            else:
                targets.append(_on_device(capability, machine))
    if rtx:
        targets.insert(0, _installed(EngineTarget(Flavour.TENSORRT_RTX, tuple(sorted(rtx))), machine))
    # What is measured will do where nothing has to be.
    superseded = {dataclasses.replace(target, measured=False) for target in targets if target.measured}
    return tuple(dict.fromkeys(target for target in targets if target not in superseded))


def elsewhere(names: tuple[str, ...], machine: Machine) -> tuple[str, ...]:
    """Those of the targets for which TensorRT builds on another machine, such as sm80."""
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
