"""Limits of a node that loader processes run into: room in /dev/shm, and open files. Each error names its remedy.

Loader processes put their crops into /dev/shm, and every tensor in transit holds a file open in both processes.
`doctor` and the preflight checks judge a node by the same figures.
"""

import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from esvit_scale.errors import RestartCanHelp

# Open files that the process itself and each worker need; measured: 2 workers run with 40, fail with 28, hang with 33
OWN_FILES, FILES_OF_WORKER = 32, 12
COMMON_WORKERS = 16  # loader processes per rank that a node should have open files for, whatever the config says
LEAST_SHARED_MEMORY = 1 << 20  # bytes free, without which no loader process starts
SHARED_MEMORY_OF_BATCHES = 1 << 30  # bytes in all, for the batches in transit; Docker's default is 64 MiB
MOST_FILES = 1 << 20
SHARED_MEMORY = ("unable to allocate shared memory", "unable to mmap", "out of shared memory", "Bus error")
OPEN_FILES = ("Too many open files", "received 0 items of ancdata", "Errno 24]", "Errno 23]")


def check_node(workers: int) -> None:
    """Raise the soft limit of open files to the hard one, and check that it and /dev/shm suffice for `workers` processes.

    Call it before loader processes start: one that may open too few files can hang instead of failing.

    Raises:
        RestartCanHelp: they do not suffice, perhaps on this node only.
    """
    if not workers:
        return
    with suppress(FileNotFoundError):
        if shutil.disk_usage("/dev/shm").free < LEAST_SHARED_MEMORY:  # not even room for the queues between processes
            raise RestartCanHelp(_remedy(SHARED_MEMORY[0]))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = reachable_files()
    if soft != resource.RLIM_INFINITY and soft < most:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            soft = most
    needed = OWN_FILES + FILES_OF_WORKER * workers
    if soft != resource.RLIM_INFINITY and soft < needed:
        raise RestartCanHelp(
            f"open files: this process may open {soft}, and data.workers={workers} needs about {needed}; allow more "
            f"(ulimit -n 65536), or set data.workers={workers_served(soft)}"
        )


def reachable_files() -> int:
    """Return how many files this process can have open after it has raised its soft limit; MOST_FILES if unlimited."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    return max(soft, most)


def workers_served(files: int) -> int:
    """Return the largest data.workers that a process which may open this many files can serve."""
    return max(0, (files - OWN_FILES) // FILES_OF_WORKER)


@contextmanager
def translate_limits() -> Iterator[None]:
    """Translate errors of torch and Python that a node's limit causes into ones that name the limit and what to do.

    Raises:
        RestartCanHelp: /dev/shm is full, or too many files are open: another program may hold them.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        if remedy := _remedy(str(error)):
            raise RestartCanHelp(remedy) from error
        raise


def _remedy(text: str) -> str | None:
    if any(words in text for words in OPEN_FILES):
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return f"open files: the limit of {soft} is reached; allow more (ulimit -n 65536), or set data.workers lower"
    if any(words in text for words in SHARED_MEMORY):
        return (
            f"/dev/shm is full{_size_of_shared_memory()}: loader processes pass batches through it; enlarge it (docker run "
            "--shm-size=8g, mount -o remount,size=8g /dev/shm), or set data.workers lower, or to 0"
        )
    return None


def _size_of_shared_memory() -> str:
    with suppress(OSError):
        usage = shutil.disk_usage("/dev/shm")
        return f" ({usage.free / 2**20:.0f} of {usage.total / 2**20:.0f} MiB are free)"
    return ""
