"""Properties that the stubbed driver reports: one representative device for each compute capability.

Inductor and Triton choose block sizes and split reductions by these numbers; none of them makes a package wrong on
another device of the same capability.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

_X86, _ARM = "x86_64", "aarch64"


@dataclass(frozen=True)
class DeviceFacts:
    """The properties of a device.

    Attributes:
        capability: 90 for 9.0.
        shared_bytes: shared memory of a block that opts in to the maximum.
        machines: CPU architectures of its hosts, as `platform.machine` names them; a package holds host code too.
    """

    name: str
    capability: int
    multiprocessors: int
    threads_per_multiprocessor: int
    shared_bytes: int
    l2_megabytes: int
    gigabytes: int
    machines: tuple[str, ...] = (_X86, _ARM)

    @property
    def macros(self) -> dict[str, str]:
        """The properties as macros for the stubs' C sources."""
        return {
            "DEVICE_NAME": f'"{self.name}"',
            "DEVICE_CAPABILITY": str(self.capability),
            "DEVICE_MULTIPROCESSORS": str(self.multiprocessors),
            "DEVICE_THREADS_PER_MULTIPROCESSOR": str(self.threads_per_multiprocessor),
            "DEVICE_SHARED_BYTES_OPTIN": str(self.shared_bytes),
            "DEVICE_L2_MEGABYTES": str(self.l2_megabytes),
            "DEVICE_GIGABYTES": str(self.gigabytes),
        }


_KIB = 1024
# The CUDA programming guide's table of technical specifications by compute capability, and the devices' data sheets.
DEVICES: Mapping[int, DeviceFacts] = MappingProxyType(
    {
        facts.capability: facts
        for facts in (
            DeviceFacts("NVIDIA A100-SXM4-80GB", 80, 108, 2048, 163 * _KIB, 40, 80),
            DeviceFacts("NVIDIA GeForce RTX 3090", 86, 82, 1536, 99 * _KIB, 6, 24),
            DeviceFacts("Orin", 87, 16, 1536, 163 * _KIB, 4, 64, (_ARM,)),
            DeviceFacts("NVIDIA GeForce RTX 4090", 89, 128, 1536, 99 * _KIB, 72, 24),
            DeviceFacts("NVIDIA H100 80GB HBM3", 90, 132, 2048, 227 * _KIB, 50, 80),
            DeviceFacts("NVIDIA B200", 100, 148, 2048, 227 * _KIB, 126, 180),
            DeviceFacts("NVIDIA B300", 103, 148, 2048, 227 * _KIB, 126, 288),
            DeviceFacts("NVIDIA GeForce RTX 5090", 120, 170, 1536, 99 * _KIB, 96, 32),
            DeviceFacts("NVIDIA GB10", 121, 48, 1536, 99 * _KIB, 24, 128, (_ARM,)),
        )
    }
)
