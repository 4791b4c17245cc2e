"""This machine's GPU, as the driver reports it: a target may have no other library that could."""

import ctypes
import sys

from moma_rt.bundle.engines import Device

_DRIVERS = ("nvcuda.dll",) if sys.platform == "win32" else ("libcuda.so.1",)
# CUdevice_attribute of the driver API.
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76
_NAME_BYTES = 256


def local_device() -> Device | None:
    """The first GPU that the driver lists; None where there is no driver or no GPU."""
    for name in _DRIVERS:
        try:
            return _first_device(ctypes.CDLL(name))
        except OSError:
            continue
    return None


def _first_device(driver: ctypes.CDLL) -> Device | None:
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(_NAME_BYTES)
    failed = (
        driver.cuInit(0)
        or driver.cuDeviceGet(ctypes.byref(device), 0)
        or driver.cuDeviceGetAttribute(ctypes.byref(major), _CAPABILITY_MAJOR, device)
        or driver.cuDeviceGetAttribute(ctypes.byref(minor), _CAPABILITY_MINOR, device)
        or driver.cuDeviceGetName(name, _NAME_BYTES, device)
    )
    if failed:
        return None
    return Device(name.value.decode(errors="replace"), 10 * major.value + minor.value)
