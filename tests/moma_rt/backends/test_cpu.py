"""How many cores a process may use, from copies of Linux's files."""

import os
import subprocess
import sys

import onnxruntime
import pytest

from moma_rt import backends
from moma_rt.backends.cpu import usable_cores

CORES = 8


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Writes the files of a machine of eight cores with two hyperthreads each, all of which this process may use."""
    monkeypatch.setattr(os, "cpu_count", lambda: 2 * CORES)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(2 * CORES)))
    for cpu in range(2 * CORES):
        write(
            tmp_path,
            f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list",
            f"{cpu % CORES},{cpu % CORES + CORES}\n",
        )
    return tmp_path


def write(root, name, text):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_no_limit(machine):
    assert usable_cores(machine) is None
    write(machine, "proc/self/cgroup", "0::/\n")
    write(machine, "sys/fs/cgroup/cpu.max", "max 100000\n")
    assert usable_cores(machine) is None


@pytest.mark.parametrize(("allowed", "cores"), [({0, 8}, 1), ({0, 1, 2}, 3), (set(range(8)), 8), ({3, 11, 4}, 2)])
def test_hyperthreads_of_one_core_count_once(machine, monkeypatch, allowed, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: allowed)
    assert usable_cores(machine) == cores


@pytest.mark.parametrize(
    ("quota", "cores"),
    [
        ("200000 100000", 2),
        ("150000 100000", 2),
        ("5000 100000", 1),
        ("50000 20000", 3),
        ("6400000 100000", 8),
        ("junk", None),
    ],
)
def test_the_quota_of_a_container(machine, quota, cores):
    write(machine, "proc/self/cgroup", "0::/\n")
    write(machine, "sys/fs/cgroup/cpu.max", quota + "\n")
    assert usable_cores(machine) == cores


def test_the_smallest_quota_of_nested_groups(machine):
    write(machine, "proc/self/cgroup", "0::/kubepods/pod1/container\n")
    write(machine, "sys/fs/cgroup/kubepods/pod1/container/cpu.max", "max 100000\n")
    write(machine, "sys/fs/cgroup/kubepods/pod1/cpu.max", "300000 100000\n")
    write(machine, "sys/fs/cgroup/kubepods/cpu.max", "600000 100000\n")
    assert usable_cores(machine) == 3


@pytest.mark.parametrize("quota", [250000, -1])
def test_control_groups_of_version_1(machine, quota):
    write(machine, "proc/self/cgroup", "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n1:name=systemd:/docker/abc\n")
    # Docker mounts a container's own group as the root, and shows the path outside.
    write(machine, "sys/fs/cgroup/cpu/cpu.cfs_quota_us", f"{quota}\n")
    write(machine, "sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n")
    assert usable_cores(machine) == (3 if quota > 0 else None)


@pytest.mark.parametrize("groups", [b"", b"nothing\n", b"\xff\xfe:\n\n", b"1:cpu\n0::\n"])
def test_groups_that_cannot_be_understood_are_no_limit(machine, groups):
    write(machine, "proc/self/cgroup", "")
    (machine / "proc/self/cgroup").write_bytes(groups)
    assert usable_cores(machine) is None


def test_affinity_and_quota(machine, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    write(machine, "proc/self/cgroup", "0::/\n")
    for quota, cores in (("200000 100000", 2), ("900000 100000", 4)):
        write(machine, "sys/fs/cgroup/cpu.max", quota)
        assert usable_cores(machine) == cores


def test_a_system_without_any_of_it(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    assert usable_cores(tmp_path) is None


@pytest.mark.parametrize(("given", "usable", "used"), [(None, 3, 3), (None, None, 0), (2, 3, 2), (5, 3, 5)])
def test_a_session_gets_no_more_threads_than_cores(monkeypatch, given, usable, used):
    options = []
    monkeypatch.setattr(backends, "usable_cores", lambda: usable)

    class Session:
        def __init__(self, *arguments):
            options.append(arguments[3].intra_op_num_threads)

    monkeypatch.setattr("moma_rt.backends.onnxruntime.open_session", Session)
    backends.create("onnxruntime", given).load(None, None)
    # 0, ONNX Runtime's own choice, is 1 where several processes run tests.
    assert options == [used or onnxruntime.SessionOptions().intra_op_num_threads]


def test_without_a_quota_this_process_is_limited_by_its_affinity():
    """One core of the real machine, if this test may choose."""
    code = (
        "import os; from moma_rt.backends.cpu import usable_cores;"
        "os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]);"
        "print(usable_cores() if os.cpu_count() > 1 else 1)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"
