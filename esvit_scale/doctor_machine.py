"""The rows of `esvit-scale doctor` about the machine: Slurm, compilers, CPU cores, memory, limits and disk."""

import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from esvit_scale import machine
from esvit_scale.data import limits
from esvit_scale.doctor_packages import CheckRow

GIB = 2**30


def slurm_row() -> CheckRow:
    """Return the row that says whether Slurm's commands are available."""
    said = [command_output(command, "--version") for command in ("sinfo", "srun")]
    if not any(said):
        return CheckRow("Slurm", "absent", "sinfo and srun are not installed")
    return CheckRow(
        "Slurm", "ok", ", ".join(f"{name}: {text}" for name, text in zip(("sinfo", "srun"), said, strict=True) if text)
    )


def compiler_row() -> CheckRow:
    """Return the row about the installed compilers."""
    found = [f"{name} ({path})" for name in ("c++", "nvcc") if (path := shutil.which(name))]
    if not found:
        return CheckRow("compiler", "absent", "no c++ compiler; only DeepSpeed's optional ops would need one")
    return CheckRow("compiler", "ok", ", ".join(found))


def cores_row() -> CheckRow:
    """Return the row with the number of CPU cores that this process may use."""
    quota = machine.cpu_quota()
    limit = "" if quota is None else f", limited to {quota:.1f} by a control group"
    return CheckRow("cores", "ok", f"{machine.affinity_cpus()}{limit}")


def memory_row() -> CheckRow:
    """Return the row with the amount of memory that this process may use."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    usable = min(total, machine.memory_limit() or total)
    low = usable < 4 * GIB
    return CheckRow(
        "memory", "problem" if low else "ok", f"{usable / GIB:.1f} GiB", "the demo needs about 4 GiB" if low else ""
    )


def limit_rows() -> Iterator[CheckRow]:
    """Yield the rows about resource limits that may differ between nodes: shared memory, open files, locked memory.

    preflight.py checks them on every node of a job before training starts.
    """
    yield from shared_memory_rows()
    yield open_files_row()
    yield _locked_memory()


def shared_memory_rows() -> Iterator[CheckRow]:
    """Yield the row about free space in /dev/shm, through which loader processes pass batches; nothing without it."""
    if not Path("/dev/shm").is_dir():
        return
    usage = shutil.disk_usage("/dev/shm")
    low = usage.free < limits.LEAST_SHARED_MEMORY or usage.total < limits.SHARED_MEMORY_OF_BATCHES
    advice = "loader processes pass batches through it: docker run --shm-size=8g, or set data.workers=0" if low else ""
    yield CheckRow(
        "/dev/shm", "problem" if low else "ok", f"{usage.total / GIB:.1f} GiB, {usage.free / GIB:.1f} free", advice
    )


def open_files_row() -> CheckRow:
    """Return the row about the hard limit of open files, to which a run raises its soft limit."""
    files = limits.reachable_files()
    workers = limits.workers_served(files)
    detail = f"{files} for each process of a run: enough for data.workers up to {workers}"
    if workers >= limits.COMMON_WORKERS:
        return CheckRow("open files", "ok", detail)
    advice = (
        "raise the hard limit (limits.conf, LimitNOFILE, docker run --ulimit nofile=65536), or set fewer data.workers"
    )
    return CheckRow("open files", "problem", detail, advice)


def _locked_memory() -> CheckRow:
    """Return the row about the limit of locked memory, which InfiniBand needs for its buffers."""
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    shown = "unlimited" if limit == resource.RLIM_INFINITY else f"{limit / GIB:.2f} GiB"
    if limit != resource.RLIM_INFINITY and Path("/sys/class/infiniband").is_dir():
        return CheckRow("locked memory", "problem", shown, "InfiniBand needs no limit: ulimit -l unlimited")
    return CheckRow("locked memory", "ok", shown)


def disk_row() -> CheckRow:
    """Return the row with the free disk space in the current folder."""
    free = shutil.disk_usage(".").free
    low = free < 5 * GIB
    return CheckRow(
        "disk here", "problem" if low else "ok", f"{free / GIB:.0f} GiB free", "checkpoints need room" if low else ""
    )


def command_output(*command: str) -> str | None:
    """Return what a command prints; None when it is missing, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
