"""CPU cores and memory that this process may use, limited by its CPU affinity and control groups (cgroups).

Both versions of cgroups are read: version 2, one tree under /sys/fs/cgroup, and version 1, one tree per controller. The
limits of the process's own group and of every group above it apply.
"""

import math
import os
import platform
import re
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

CGROUP_ROOT = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")


def usable_cpus() -> int:
    """Return the number of CPU cores that this process can keep busy at the same time, at least 1.

    These are the cores of its affinity (`taskset`, Slurm's --cpus-per-task), or fewer where a control group's quota
    (`docker run --cpus`, Kubernetes limits) allows less; a quota is rounded down.
    """
    cores, quota = affinity_cpus(), cpu_quota()
    return cores if quota is None else max(1, min(cores, math.floor(quota)))


def affinity_cpus() -> int:
    """Return the number of CPU cores that this process may run on, without regard to control groups' quotas."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_quota() -> float | None:
    """Return the smallest CPU quota of this process's control groups, in cores; None without a limit."""
    quotas = [quota for folder in _folders("cpu") if (quota := _quota_of(folder)) is not None]
    return min(quotas, default=None)


def memory_limit() -> int | None:
    """Return the smallest memory limit of this process's control groups, in bytes; None without a limit."""
    values = (_text(folder / name) for folder in _folders("memory") for name in ("memory.max", "memory.limit_in_bytes"))
    return min((int(value) for value in values if value.isdecimal() and int(value) < 1 << 60), default=None)


def processor() -> str:
    """Return the name of the processor, as /proc/cpuinfo or Python gives it; "" where it is unknown."""
    found = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", _text(Path("/proc/cpuinfo")), re.MULTILINE)
    return found[1].strip() if found else platform.processor()


def peak_resident_bytes() -> int:
    """Return the largest resident memory that this process had so far, in bytes, without that of its children."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _quota_of(folder: Path) -> float | None:
    """Return the quota that one control group sets, in cores; None when it sets none."""
    quota, _, period = _text(folder / "cpu.max").partition(" ")  # version 2: "150000 100000" or "max 100000"
    if not quota:
        quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")  # version 1; -1: none
    return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() and int(period) else None


def _folders(controller: str) -> Iterator[Path]:
    """Yield the folders of the process's control group for a controller and of all groups above it.

    Inside a container, /proc/self/cgroup may give the group's path on the host, of which only the root folder exists
    here. That root is then the container's own group, and folders that do not exist are skipped.
    """
    for line in _text(OWN_GROUPS).splitlines() or ["0::/"]:
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        roots = [CGROUP_ROOT / controllers, CGROUP_ROOT / controller] if controllers else [CGROUP_ROOT]
        for root in dict.fromkeys(roots):
            folder = Path(os.path.normpath(f"{root}/{group}"))
            yield from (path for path in (folder, *folder.parents) if path.is_relative_to(root) and path.is_dir())


def _text(path: Path) -> str:
    """Return the content of a small file, empty when it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
