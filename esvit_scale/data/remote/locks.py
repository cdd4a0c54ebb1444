"""Locks on single shards of a cached set, shared by all processes of a node; they end with the process that holds them.

Each shard has its byte in one lock file (room.number_of), so that thousands of locks need one open file. The locks are
Linux's "open file description" locks: closing another handle of the file does not lose them, as it would lose POSIX locks.
They exclude other handles, also of the same process, but not the threads that share one.
"""

import errno
import fcntl
import os
import struct
import weakref
from pathlib import Path

from esvit_scale.errors import UserError

_FLOCK = "hhqqi4x"  # struct flock of 64-bit Linux: type, whence, start, length, pid
_BUSY = (errno.EAGAIN, errno.EACCES)


def open_own(path: str | Path, flags: int) -> int:
    """Open a file of the cache, but none that a symbolic link names: whoever made the link may mean another file."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


class ByteLocks:
    """The locks of one handle on the bytes of a file. A forked process must open its own."""

    def __init__(self, path: Path) -> None:
        self._handle = open_own(path, os.O_RDWR | os.O_CREAT)
        self._close = weakref.finalize(
            self, os.close, self._handle
        )  # of a store that is forgotten while it is read from
        self._close.atexit = False

    def try_shared(self, byte: int) -> bool:
        """Take a shared lock, or turn this handle's exclusive lock into one; return False where another is exclusive."""
        return self._set(byte, fcntl.F_RDLCK)

    def try_exclusive(self, byte: int) -> bool:
        """Take an exclusive lock; return False where another handle has any lock on the byte."""
        return self._set(byte, fcntl.F_WRLCK)

    def unlock(self, byte: int) -> None:
        """Let go of a byte's lock."""
        self._set(byte, fcntl.F_UNLCK)

    def close(self) -> None:
        """Let go of all locks, as also happens when the object is collected."""
        self._close()

    def _set(self, byte: int, kind: int) -> bool:
        wanted = struct.pack(_FLOCK, kind, os.SEEK_SET, byte, 1, 0)
        try:
            fcntl.fcntl(self._handle, fcntl.F_OFD_SETLK, wanted)
        except OSError as error:
            if error.errno in _BUSY:
                return False
            raise UserError(
                f"data.cache_dir: this file system has no locks ({error.strerror}); name a folder on a disk of the node"
            ) from None
        return True
