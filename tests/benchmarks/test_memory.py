"""Memory in use: what the driver says of the GPU, and what the kernel says of this process."""

import numpy as np
import pytest

from benchmarks import memory
from benchmarks.memory import device_mib_used, peak_gb, resident_mib


def test_device_memory_is_what_the_driver_says(tmp_path, monkeypatch):
    command = tmp_path / "nvidia-smi"
    command.write_text("#!/bin/sh\necho 2048\necho 4096\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert device_mib_used() == 2048.0
    # For a GPU that shares the memory of the CPU, the driver gives no number.
    command.write_text("#!/bin/sh\necho '[N/A]'\n")
    assert device_mib_used() is None
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert device_mib_used() is None


def test_memory_of_this_process():
    before = resident_mib()
    taken = np.ones(2**24)
    after = resident_mib()
    assert 100 < after - before < 160
    assert peak_gb() >= after * 2**20 / 1e9
    assert taken.nbytes == 2**27


@pytest.mark.parametrize("status", ["Name:\tpython\nVmSize:\t 4096 kB\n", None])
def test_without_the_kernels_memory_figures(status, tmp_path, monkeypatch):
    if status is not None:
        (tmp_path / "status").write_text(status)
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "status")
    assert resident_mib() is None
    assert peak_gb() > 0.01
