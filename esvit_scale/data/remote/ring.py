"""The part of the cache's disk in which one loader process keeps the ranges that it has fetched: a file, used as a ring.

Space is given to blocks, one after the other, and taken back in the same order. The file is the reservation of its room
at the same time (room.py), so the cache stays within its limit; when its process is killed, its lock ends, and the next
process that needs room removes it.
"""

import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from esvit_scale.data.remote.locks import ByteLocks, open_own
from esvit_scale.data.remote.room import LOCKS, NEVER, Room, number_of, reservation
from esvit_scale.errors import UserError

LEAST = 1 << 16  # bytes below which no ring is made
POLL_S = 0.2  # seconds between two attempts to find room
PATIENCE_S = 10.0  # seconds after which a ring of half the size is tried
_count = 0


class Ring:
    """A ring of `size` bytes in the folder of a set in the cache, less if other runs leave no room for it.

    Raises:
        UserError: there is no room even for LEAST bytes.
    """

    def __init__(self, folder: Path, size: int, limit: int | None) -> None:
        global _count
        _count += 1
        name = f"ring-{os.getpid()}-{threading.get_ident()}-{_count}"
        self._locks, self._path = ByteLocks(folder / LOCKS), reservation(folder, name)
        self._locks.try_exclusive(number_of(name))
        self.size = self._reserved(Room(folder.parent, limit), max(size, LEAST))
        self._file = open_own(self._path, os.O_RDWR)
        self._head = self._tail = 0  # counted on over the ring's end

    def _reserved(self, room: Room, size: int) -> int:
        began = time.monotonic()
        while not room.reserve(self._path, size, -1.0, lambda path: NEVER):
            if time.monotonic() - began > PATIENCE_S:
                size, began = size // 2, time.monotonic()
                if size < LEAST:
                    raise UserError(
                        f"data.cache_gb: no room for {LEAST >> 10} KiB in {self._path.parent.parent}: other runs use the cache; "
                        "give it more room, or this run a data.cache_dir of its own"
                    )
            time.sleep(POLL_S)
        return size

    def allocate(self, sizes: Sequence[int]) -> tuple[list[int], int] | None:
        """Take space for one block.

        Args:
            sizes: bytes of its ranges, each of which gets consecutive bytes.

        Returns:
            The offsets in the file, and the mark with which `release` gives the block's space back; None if there is too
            little now.
        """
        head, offsets = self._head, []
        for size in sizes:
            if head % self.size + size > self.size:
                head += self.size - head % self.size
            offsets.append(head % self.size)
            head += size
        if head - self._tail > self.size or any(size > self.size for size in sizes):
            return None
        self._head = head
        return offsets, head

    def release(self, mark: int) -> None:
        """Give back the space of the oldest block, to which `allocate` gave this mark."""
        self._tail = mark

    def write(self, offset: int, data: bytes) -> None:
        """Write a range at its offset. Raises OSError."""
        view = memoryview(data)
        while view:
            written = os.pwrite(self._file, view, offset)
            view, offset = view[written:], offset + written

    def read(self, offset: int, size: int) -> bytes:
        """Return bytes that were written. Raises OSError."""
        return os.pread(self._file, size, offset)

    def close(self, with_file: bool = True) -> None:
        """Remove the file and give its room back.

        Args:
            with_file: close it as well; False while a thread may still write to it.
        """
        with suppress(OSError):
            self._path.unlink(missing_ok=True)
        if with_file:
            os.close(self._file)
            self._locks.close()
