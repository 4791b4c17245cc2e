import pytest

from moma_rt.backends.device import local_device
from moma_rt.bundle.engines import Device


def test_without_a_driver_there_is_no_device(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr("ctypes.CDLL", missing)
    assert local_device() is None


class Driver:
    """A driver with one device; `fails` is the call that returns an error."""

    def __init__(self, fails=None):
        self.fails = fails

    def __getattr__(self, name):
        def call(*arguments):
            if name == "cuDeviceGetAttribute":
                arguments[0]._obj.value = {75: 8, 76: 9}[arguments[1]]
            elif name == "cuDeviceGetName":
                arguments[0].value = b"RTX 4090"
            return 100 if name == self.fails else 0

        return call


def test_the_driver_is_asked(monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", lambda name: Driver())
    assert local_device() == Device("RTX 4090", 89)


@pytest.mark.parametrize("call", ["cuInit", "cuDeviceGet", "cuDeviceGetAttribute", "cuDeviceGetName"])
def test_a_driver_without_a_device(monkeypatch, call):
    monkeypatch.setattr("ctypes.CDLL", lambda name: Driver(fails=call))
    assert local_device() is None


@pytest.mark.gpu
def test_this_machines_device():
    device = local_device()
    assert device is not None
    assert device.capability >= 50
