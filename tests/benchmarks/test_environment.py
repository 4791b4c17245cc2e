"""The description of the machine, versions and command in a results file."""

import sys

import numpy as np
import pytest

from benchmarks.environment import environment, percentiles, shareable_command


@pytest.fixture
def answers(tmp_path, monkeypatch):
    """Returns a function that installs a fake nvidia-smi as the only program on PATH."""
    monkeypatch.setenv("PATH", str(tmp_path))

    def install(text, status=0):
        command = tmp_path / "nvidia-smi"
        command.write_text(f"#!/bin/sh\necho '{text}'\nexit {status}\n")
        command.chmod(0o755)

    return install


def test_the_gpu(answers):
    answers("NVIDIA H200, 580.159.04, 9.0, 143771")
    gpu = {"name": "NVIDIA H200", "driver": "580.159.04", "capability": "9.0", "memory_gib": 140.4}
    assert environment("command")["gpu"] == gpu


def test_a_gpu_that_shares_the_cpus_memory(answers):
    answers("NVIDIA GB10, 580.95.05, 12.1, [N/A]")
    assert environment("command")["gpu"] == {"name": "NVIDIA GB10", "driver": "580.95.05", "capability": "12.1"}


def test_no_gpu(answers):
    assert "gpu" not in environment("command")
    answers("No devices were found", status=6)
    assert "gpu" not in environment("command")


def test_the_commit(answers, monkeypatch):
    # There is no git on this PATH.
    assert environment("command")["commit"] == "unknown"
    monkeypatch.setenv("MOMA_RT_COMMIT", "1234abc")
    assert environment("command")["commit"] == "1234abc"


def test_the_version_of_a_package_is_that_of_the_imported_copy(tmp_path, monkeypatch):
    """As when a newer one is unpacked on PYTHONPATH."""
    note = tmp_path / "numpy-99.0.dist-info" / "METADATA"
    note.parent.mkdir()
    note.write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 99.0\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert environment("command")["versions"]["numpy"] == "99.0"


@pytest.mark.parametrize("given", [["--bundle", "/a b/c"], ["--bundle=/a b/c"]])
def test_the_command_hides_the_bundles_path(given):
    shown = shareable_command("benchmarks.latency", [*given, "--out", "x y"])
    assert "/a b/c" not in shown
    assert shown.startswith("python -m benchmarks.latency --bundle")
    assert shown.endswith("--out 'x y'")


def test_the_command_hides_the_subjects_path():
    assert shareable_command("x", ["--subject", "/a/b"]) == "python -m x --subject FILE"
    assert shareable_command("x", ["--subject=/a/b", "--steps", "4"]) == "python -m x --subject=FILE --steps 4"


def test_percentiles():
    assert percentiles(np.arange(11) / 7) == {"p20": 0.2857, "p50": 0.7143, "p80": 1.1429}
    assert percentiles([1.0, 2.0, 3.0], (50, 99)) == {"p50": 2.0, "p99": 2.98}
