"""Settings of the allocator for training on a CPU: memory of freed tensors stays in the process and is used again.

By default, glibc maps every block above a few MB from the system and unmaps it when it is freed. Each new tensor of that
size then costs a page fault per 4 kB, in which the kernel fills the page with zeros: a training step allocates many times
its peak, and spends up to a quarter of its time there. A step of 300 million parameters can free
more than 2 GiB at the end of the heap: with a trim threshold of that size, a benchmark spent 3 of its 7 seconds in faults.

A preloaded tcmalloc (gperftools) keeps such memory, but now and then returns a block of it. From then on it keeps two kinds
of free memory that it does not join, so that a large tensor may fit in neither; whenever it therefore has to grow, it
returns all its free memory at once. Without the first return, none of this happens. jemalloc is left as it is.
"""

import ctypes
import os
from collections.abc import Callable, Mapping
from pathlib import Path

KEY = "ESVIT_MALLOC"  # environment variable; `system` leaves the allocator as it is
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # parameters of mallopt(3)
_ALL = -1  # as size_t the largest number: a block of any size is kept, and free memory is never returned
_LARGEST_KEPT_OLD = 32 * 2**20  # the most that glibc before 2.35 accepts


def keep_freed_memory(environment: Mapping[str, str] = os.environ) -> bool:
    """Let glibc or tcmalloc keep freed memory, and return whether it was told to.

    Nothing is set, and False returned, if malloc is another library's (jemalloc, musl, macOS), or if the environment has
    settings for this malloc (MALLOC_… and GLIBC_TUNABLES, or TCMALLOC_RELEASE_RATE) or says ESVIT_MALLOC=system.
    """
    if environment.get(KEY) == "system":
        return False
    if not _malloc_is_from_glibc():
        return "TCMALLOC_RELEASE_RATE" not in environment and _stop_releases_of_tcmalloc()
    own = any(name.startswith("MALLOC_") for name in environment)
    own |= "glibc.malloc" in environment.get("GLIBC_TUNABLES", "")
    return not own and set_thresholds(ctypes.CDLL(None).mallopt)


def set_thresholds(mallopt: Callable[[int, int], int]) -> bool:
    """Raise glibc's thresholds for unmapping and trimming freed memory as far as mallopt(3) accepts.

    Returns:
        Whether they were raised; False: nothing has changed.
    """
    if not (mallopt(_MMAP_THRESHOLD, _ALL) or mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT_OLD)):
        return False  # setting only the trim threshold would fix the mmap threshold at 128 KiB
    mallopt(_TRIM_THRESHOLD, _ALL)
    mallopt(_ARENA_MAX, 1)  # a thread's own arena would return what gloo's threads free
    return True


def _stop_releases_of_tcmalloc() -> bool:
    """Set the release rate of the process's tcmalloc to 0, and return whether there is a tcmalloc."""
    process = ctypes.CDLL(None)
    try:
        # MallocExtension::instance() and TCMallocImplementation::SetMemoryReleaseRate(double); there is no C function.
        instance = process._ZN15MallocExtension8instanceEv
        set_rate = process._ZN22TCMallocImplementation20SetMemoryReleaseRateEd
    except AttributeError:
        return False
    instance.restype = ctypes.c_void_p
    set_rate.restype, set_rate.argtypes = None, (ctypes.c_void_p, ctypes.c_double)
    set_rate(instance(), 0.0)
    return True


class _DlInfo(ctypes.Structure):
    """The struct Dl_info of dladdr(3)."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def _malloc_is_from_glibc() -> bool:
    """Return whether the process's `malloc` lies in glibc's libc.so.6."""
    try:
        process, info = ctypes.CDLL(None), _DlInfo()
        process.gnu_get_libc_version  # noqa: B018  # musl and macOS have no such function
        found = process.dladdr(ctypes.cast(process.malloc, ctypes.c_void_p), ctypes.byref(info))
    except (AttributeError, OSError, TypeError):
        return False
    return bool(found) and Path(os.fsdecode(info.file or b"")).name.startswith("libc.so")
