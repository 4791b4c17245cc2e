"""The CPU cores that this process may use: its affinity, and the quota of its container."""

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def usable_cores(root: Path = Path("/")) -> int | None:
    """Return the number of cores that this process may use; None if it may use all, or that cannot be known.

    Hyperthreads of one core count once. A quota of 2.5 cores counts as 3. On Linux these are the affinity of the
    process (`taskset`, a cpuset) and the quota of its control groups (`docker run --cpus`, Kubernetes' CPU limits);
    libraries that create a thread per core know nothing of the quota.

    Args:
        root: the folder that holds `proc` and `sys`.
    """
    limits = [math.ceil(quota) for quota in _quotas(root)]
    if not hasattr(os, "sched_getaffinity"):
        return min(limits, default=None)
    allowed = os.sched_getaffinity(0)
    if not limits and len(allowed) == os.cpu_count():
        return None
    return max(1, min([*limits, len({_core(root, cpu) for cpu in allowed})]))


def _core(root: Path, cpu: int) -> str:
    """A name of a logical CPU's core, equal for its hyperthreads."""
    siblings = root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
    try:
        return siblings.read_text(encoding="ascii").strip()
    except OSError:
        return str(cpu)


def _quotas(root: Path) -> Iterator[float]:
    """Yield the quota, in cores, of each of this process's control groups that has one, in either version of them."""
    try:
        groups = (root / "proc/self/cgroup").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return
    for line in groups:
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        # A limit holds for all groups within. In a container, the path may not exist below its own mount.
        relative = PurePosixPath(path.lstrip("/"))
        for folder in (mount / relative, *(mount / parent for parent in relative.parents)):
            numbers = _numbers(folder / "cpu.max") or [
                *_numbers(folder / "cpu.cfs_quota_us"),
                *_numbers(folder / "cpu.cfs_period_us"),
            ]
            # No limit is the word max, or -1.
            if len(numbers) == 2 and min(numbers) > 0:
                yield numbers[0] / numbers[1]


def _numbers(file: Path) -> list[int]:
    """The whole numbers in a file; none if it cannot be read or holds something else."""
    try:
        return [int(word) for word in file.read_text(encoding="ascii").split()]
    except (OSError, ValueError):
        return []
