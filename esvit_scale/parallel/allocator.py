"""Settings of glibc's allocator for training on a CPU: memory of freed tensors stays in the process and is used again.

By default, glibc maps every block above a few MB from the system and unmaps it when it is freed. Each new tensor of that
size then costs a page fault per 4 kB, in which the kernel fills the page with zeros: a training step allocates many times
its peak, and spends up to a quarter of its time there. tcmalloc and jemalloc keep such memory by themselves.
"""

import ctypes
import os
from collections.abc import Callable, Mapping
from pathlib import Path

KEY = "ESVIT_MALLOC"  # environment variable; `system` leaves the allocator as it is
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of mallopt(3)
_LARGEST_INT = 2**31 - 1
_LARGEST_KEPT = 2**30  # bytes; larger blocks are still unmapped when they are freed
_LARGEST_KEPT_OLD = 32 * 2**20  # the most that glibc before 2.35 accepts


def keep_freed_memory(environment: Mapping[str, str] = os.environ) -> bool:
    """Let glibc keep freed memory, and return whether it does.

    Nothing is set, and False returned, if malloc is another library's (preloaded tcmalloc, musl, macOS), or if the
    environment has settings for glibc's malloc or says ESVIT_MALLOC=system.
    """
    own = any(name.startswith("MALLOC_") for name in environment) or "glibc.malloc" in environment.get(
        "GLIBC_TUNABLES", ""
    )
    if own or environment.get(KEY) == "system" or not _malloc_is_from_glibc():
        return False
    return set_thresholds(ctypes.CDLL(None).mallopt)


def set_thresholds(mallopt: Callable[[int, int], int]) -> bool:
    """Raise glibc's thresholds for unmapping and trimming freed memory as far as mallopt(3) accepts.

    Returns:
        Whether they were raised; False: nothing has changed.
    """
    if not (mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT) or mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT_OLD)):
        return False  # setting only the trim threshold would fix the mmap threshold at 128 KiB
    mallopt(_TRIM_THRESHOLD, _LARGEST_INT)
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
