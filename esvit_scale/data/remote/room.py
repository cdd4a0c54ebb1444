"""The size limit of a node's shard cache: how much lies in it, and which shards leave it first.

All processes of a node share the folder. Whoever wants to fetch a shard takes a lock, adds up the files and
reservations, removes shards that nobody has locked if it must, and leaves a reservation: an empty file of the shard's
size. So the cache never exceeds its limit, whatever the processes fetch at the same time.

Other files may lie beside the cache's folders. Each of its own folders holds a marker with the folder's name; nothing else
counts, and nothing else is ever removed.
"""

import fcntl
import hashlib
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from esvit_scale.data.manifest import Shard, index_path
from esvit_scale.data.remote.locks import ByteLocks, open_own

LOCKS = ".locks"  # of the shards of one set
RESERVED = ".reserved"
CHECKSUMS = ".checksums.jsonl"  # ending of a verified index whose tar is read by ranges
# A file in each of a cache's own folders. It holds the folder's name, so that a renamed copy does not count as a cache.
MARKER = ".esvit-cache"
TURN_S = 1.0  # seconds that a process which fetches ahead waits for its turn to make room
INDEX_BYTES = 160  # bytes that are reserved for the index line of a sample
DEFAULT_SHARE = 0.8  # fraction of the disk's free space that the cache takes without data.cache_gb
NEVER = float("inf")


class Stored(NamedTuple):
    """A shard that lies in the cache, or the index of one that is read by ranges."""

    path: Path
    bytes: int
    used: float  # time of its last use
    number: int  # its byte in the lock file of its set


def cost(shard: Shard) -> int:
    """Return the bytes that a shard and its index take in the cache."""
    return shard.bytes + INDEX_BYTES * shard.samples + 4096


def index_cost(shard: Shard) -> int:
    """Return the bytes that are reserved for the index of a shard that is read by ranges."""
    return INDEX_BYTES * shard.samples + 4096


def number_of(name: str) -> int:
    """Return the offset of a shard's byte in the lock file of its set: a hash of its file name."""
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

    def _locks_of(self, folder: Path) -> ByteLocks:
        """Return the locks with which shards of a set are removed.

        They exclude the threads that use the shards, because these have another handle (ShardCache).
        """
        if folder not in self._locks:
            self._locks[folder] = ByteLocks(folder / LOCKS)
        return self._locks[folder]

    @property
    def limit(self) -> int:
        """Return the limit in bytes."""
        return self._limit_of(self.held() if self._limit is None else 0)

    def held(self) -> int:
        """Return the bytes of all files and reservations; what is being fetched counts by its reservation."""
        return self._contents()[0]

    def _limit_of(self, held: int) -> int:
        if self._limit is not None:
            return self._limit
        return int(DEFAULT_SHARE * (held + shutil.disk_usage(self._folder).free))

    def reserve(
        self,
        reserved: Path,
        size: int,
        first_use: float,
        next_use: Callable[[Path], float],
        urgent: bool = True,
    ) -> bool:
        """Make room for a shard by removing others, and reserve it; return False where there is none.

        Args:
            reserved: the shard's `reservation`, which is replaced if it is there; the caller holds the shard's exclusive
                lock.
            size: bytes to reserve.
            first_use: index of the batch that needs the shard, -1: now; shards needed no later than that stay.
            next_use: returns when a shard that lies in the cache is needed next; NEVER if it is not known to be.
            urgent: whether a process waits for the shard; others look for room only while nobody else does.
        """
        with self._turn(urgent) as has_turn:
            if not has_turn:
                return False
            self._remove_abandoned()
            held, stored = self._contents(reserved)
            need = held + size - self._limit_of(held)
            if need > 0:
                uses = [(next_use(one.path), one) for one in stored]
                for use, one in sorted(uses, key=lambda each: (-each[0], each[1].used)):
                    if need <= 0 or use <= first_use:
                        break
                    need -= self._remove(one)
            if need > 0:
                return False
            with open(reserved, "wb", opener=open_own) as file:
                file.truncate(size)
            return True

    @contextmanager
    def _turn(self, urgent: bool) -> Iterator[bool]:
        """Let one process of the node at a time make room; yield False if not `urgent` and no turn comes within TURN_S."""
        handle, began = open_own(self._folder / ".room", os.O_RDWR | os.O_CREAT), time.monotonic()
        try:
            has_turn = False
            while not has_turn and (urgent or time.monotonic() - began < TURN_S):
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | (0 if urgent else fcntl.LOCK_NB))
                    has_turn = True
                except BlockingIOError:  # whoever waits in flock goes first
                    time.sleep(random.uniform(0.005, 0.02))
            yield has_turn
        finally:
            os.close(handle)

    def _files(self) -> Iterator[os.DirEntry[str]]:
        """Yield the files in the folders of the cache, and none in folders that are not its own."""
        for folder in _scan(self._folder):
            if folder.is_dir() and _is_own(Path(folder.path)):
                yield from _scan(folder.path)

    def _contents(self, without: Path | None = None) -> tuple[int, list[Stored]]:
        """Return the bytes of all files and reservations but `without`, and the shards.

        A shard with a reservation counts by the reservation alone, because its tar may have been renamed already.
        """
        sizes: dict[str, int] = {}
        stored = []
        for entry in self._files():
            if not entry.name.endswith(".partial"):
                with suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    sizes[entry.path] = status.st_size
                    if entry.name.endswith((".tar", CHECKSUMS)):
                        name = entry.name.removesuffix(CHECKSUMS).removesuffix(".tar") + ".tar"
                        stored.append(Stored(Path(entry.path), status.st_size, status.st_mtime, number_of(name)))
        for path in [path for path in sizes if path.endswith(RESERVED)]:
            tar = _reserved_tar(Path(path))
            for covered in (tar, index_path(tar), tar.with_suffix(CHECKSUMS)):
                sizes.pop(str(covered), None)
        return sum(sizes.values()) - sizes.get(str(without), 0), stored

    def _remove(self, one: Stored) -> int:
        """Remove a shard that no process has locked; return the bytes that this frees."""
        locks = self._locks_of(one.path.parent)
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

    def _remove_abandoned(self) -> None:
        """Remove the reservations and fragments of processes that were killed: their locks are free."""
        for entry in [entry for entry in self._files() if entry.name.endswith(RESERVED)]:
            path = Path(entry.path)
            tar = _reserved_tar(path)
            locks, number = self._locks_of(path.parent), number_of(tar.name)
            if not locks.try_exclusive(number):
                continue
            try:
                for fragment in path.parent.glob(f".{tar.name}.*.partial"):
                    fragment.unlink(missing_ok=True)
                path.unlink(missing_ok=True)
            finally:
                locks.unlock(number)


def make_folder(folder: Path) -> None:
    """Make a folder of the cache, and mark it as one."""
    folder.mkdir(parents=True, exist_ok=True)
    if not _is_own(folder):
        (folder / MARKER).write_text(folder.name)


def _is_own(folder: Path) -> bool:
    try:
        return (folder / MARKER).read_bytes() == os.fsencode(folder.name)
    except OSError:
        return False


def _scan(folder: str | Path) -> Iterator[os.DirEntry[str]]:
    """Yield the entries of a folder; none if another process has removed it."""
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        yield from entries


def reservation(folder: Path, name: str) -> Path:
    """Return the file that reserves room for a shard."""
    return folder / f".{name}{RESERVED}"


def _reserved_tar(path: Path) -> Path:
    return path.with_name(path.name[1 : -len(RESERVED)])
