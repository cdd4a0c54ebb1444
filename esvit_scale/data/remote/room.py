"""The size limit of a node's shard cache: how much lies in it, and which shards leave it first.

All processes of a node share the folder. Whoever wants to fetch a shard takes a lock, adds up the files and
reservations, removes shards that nobody has locked if it must, and leaves a reservation: an empty file of the shard's
size. So the cache never exceeds its limit, whatever the processes fetch at the same time.
"""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from esvit_scale.data.manifest import Shard, index_path
from esvit_scale.data.remote.locks import ByteLocks

LOCKS = ".locks"  # of the shards of one set
RESERVED = ".reserved"
INDEX_BYTES = 160  # of one sample, reserved for its line in the index
DEFAULT_SHARE = 0.8  # of the disk's free space, without data.cache_gb
NEVER = float("inf")


class Stored(NamedTuple):
    """A shard that lies in the cache."""

    path: Path
    bytes: int
    used: float  # time of its last use
    number: int  # its byte in the lock file of its set


def cost(shard: Shard) -> int:
    """Return the bytes that a shard and its index take in the cache."""
    return shard.bytes + INDEX_BYTES * shard.samples + 4096


def number_of(name: str) -> int:
    """Return the byte that stands for a shard, by its file name, in the lock file of its set."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")


class Room:
    """The limit of one cache folder, for one process.

    Args:
        folder: the cache, which holds a folder for every set.
        limit: bytes; None: DEFAULT_SHARE of what is free and what the cache holds.
    """

    def __init__(self, folder: Path, limit: int | None) -> None:
        self._folder, self._limit = folder, limit
        self._locks: dict[Path, ByteLocks] = {}

    def locks(self, folder: Path) -> ByteLocks:
        """Return this process's locks of a set's folder."""
        if folder not in self._locks:
            self._locks[folder] = ByteLocks(folder / LOCKS)
        return self._locks[folder]

    @property
    def limit(self) -> int:
        """Return the limit in bytes."""
        if self._limit is not None:
            return self._limit
        held = sum(self._sizes())
        return int(DEFAULT_SHARE * (held + shutil.disk_usage(self._folder).free))

    def reserve(
        self,
        folder: Path,
        shard: Shard,
        first_use: float,
        next_use: Callable[[Path], float],
        mine: Callable[[Path], bool],
    ) -> bool:
        """Make room for a shard by removing others, and reserve it; return False where there is none.

        Args:
            folder: of the shard's set; this process holds the shard's exclusive lock.
            first_use: when the shard is needed (a batch index); shards needed no later than that stay.
            next_use: returns when a shard that lies in the cache is needed next; NEVER if it is not known to be.
            mine: whether this process uses or fetches a shard.
        """
        with self._exclusive():
            self._remove_abandoned(mine)
            need = sum(self._sizes()) + cost(shard) - self.limit
            if need > 0:
                stored = [(next_use(one.path), one) for one in self._stored() if not mine(one.path)]
                for use, one in sorted(stored, key=lambda each: (-each[0], each[1].used)):
                    if need <= 0 or use <= first_use:
                        break
                    need -= self._remove(one)
            if need > 0:
                return False
            with reservation(folder, shard.name).open("wb") as file:
                file.truncate(cost(shard))
            return True

    def cancel(self, folder: Path, shard: Shard) -> None:
        """End a shard's reservation: its files are there, or will not come."""
        reservation(folder, shard.name).unlink(missing_ok=True)

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        handle = os.open(self._folder / ".room", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def _files(self) -> Iterator[os.DirEntry[str]]:
        for folder in os.scandir(self._folder):
            if folder.is_dir():
                yield from os.scandir(folder.path)

    def _sizes(self) -> Iterator[int]:
        """Yield the size of every file and reservation; what is being fetched counts by its reservation."""
        for entry in self._files():
            if not entry.name.endswith(".partial"):
                with suppress(FileNotFoundError):
                    yield entry.stat().st_size

    def _stored(self) -> Iterator[Stored]:
        for entry in self._files():
            if entry.name.endswith(".tar"):
                with suppress(FileNotFoundError):
                    status = entry.stat()
                    yield Stored(Path(entry.path), status.st_size, status.st_mtime, number_of(entry.name))

    def _remove(self, one: Stored) -> int:
        """Remove a shard that no process has locked; return the bytes that this frees."""
        locks = self.locks(one.path.parent)
        if not locks.try_exclusive(one.number):
            return 0
        try:
            freed = one.bytes
            one.path.unlink(missing_ok=True)
            with suppress(FileNotFoundError):
                freed += index_path(one.path).stat().st_size
                index_path(one.path).unlink()
            return freed
        finally:
            locks.unlock(one.number)

    def _remove_abandoned(self, mine: Callable[[Path], bool]) -> None:
        """Remove the reservations and fragments of processes that were killed: their locks are free."""
        for entry in [entry for entry in self._files() if entry.name.endswith(RESERVED)]:
            path = Path(entry.path)
            tar = path.with_name(path.name[1 : -len(RESERVED)])
            locks, number = self.locks(path.parent), number_of(tar.name)
            if mine(tar) or not locks.try_exclusive(number):
                continue
            try:
                for fragment in path.parent.glob(f".{tar.name}.*.partial"):
                    fragment.unlink(missing_ok=True)
                path.unlink(missing_ok=True)
            finally:
                locks.unlock(number)


def reservation(folder: Path, name: str) -> Path:
    """Return the file that reserves room for a shard."""
    return folder / f".{name}{RESERVED}"
