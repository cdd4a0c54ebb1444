"""The size limit of a node's shard cache: how much lies in it, and which shards leave it first.

All processes of a node share the folder. Whoever wants to fetch a shard takes a lock, adds up the files and
reservations, removes shards that nobody has locked if it must, and leaves a reservation: an empty file of the shard's
size. So the cache never exceeds its limit, whatever the processes fetch at the same time.

Adding up takes a system call for every file. So the lock file, `.room`, records a number of bytes that is not exceeded: the
sum when somebody last added up, and all reservations since. Only where the limit is below that, files are added up again.

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

import numpy as np
from numpy.typing import NDArray

from esvit_scale.data.manifest import index_path
from esvit_scale.data.remote.locks import ByteLocks, open_own
from esvit_scale.data.shard_table import Shard, ShardTable

LOCKS = ".locks"  # of the shards of one set
RESERVED = ".reserved"
CHECKSUMS = ".checksums.jsonl"  # ending of a verified index whose tar is read by ranges
# A file in each of a cache's own folders. It holds the folder's name, so that a renamed copy does not count as a cache.
MARKER = ".esvit-cache"
ROOM = (
    ".room"  # the lock of whoever makes room; it holds the bytes of the cache at most, and a mark of the last release
)
TRUSTED_S = 60.0  # seconds after adding up the files for which a process believes the recorded bytes
_MARK, _MARK_AT = 8, 32  # length of the mark of the last release, and its offset in ROOM
TURN_S = 1.0  # seconds that a process which fetches ahead waits for its turn to make room
INDEX_BYTES = 160  # bytes that are reserved for the index line of a sample
DEFAULT_SHARE = 0.8  # fraction of the disk's free space that the cache takes without data.cache_gb
NEVER = float("inf")


class Stored(NamedTuple):
    """A shard that lies in the cache, or the index of one that is read by ranges."""

    path: str
    bytes: int
    used: float  # time of its last use


def cost(shard: Shard) -> int:
    """Return the bytes that a shard and its index take in the cache."""
    return shard.bytes + index_cost(shard)


def index_cost(shard: Shard) -> int:
    """Return the bytes that are reserved for the index of a shard that is read by ranges."""
    return INDEX_BYTES * shard.samples + 4096


def costs(shards: ShardTable) -> NDArray[np.int64]:
    """Return the `cost` of every shard [N]."""
    return shards.bytes + index_costs(shards)


def index_costs(shards: ShardTable) -> NDArray[np.int64]:
    """Return the `index_cost` of every shard [N]."""
    return INDEX_BYTES * shards.samples + 4096


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
        self._trusted_until = 0.0  # until then the recorded bytes count, unless they leave no room

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
        next_use: Callable[[str], float],
        urgent: bool = True,
    ) -> bool:
        """Make room for a shard by removing others, and reserve it; return False where there is none.

        Args:
            reserved: the shard's `reservation`, which is replaced if it is there; the caller holds the shard's exclusive
                lock.
            size: bytes to reserve.
            first_use: index of the batch that needs the shard, -1: now; shards needed no later than that stay.
            next_use: returns when a shard, by its path in the cache, is needed next; NEVER if it is not known to be.
            urgent: whether a process waits for the shard; others look for room only while nobody else does.
        """
        with self._turn(urgent) as handle:
            if handle is None:
                return False
            held = self._recorded(handle)
            if held is None or held + size > self._limit_of(held):
                self._remove_abandoned()
                held, stored = self._contents(reserved)
                need = held + size - self._limit_of(held)
                if need > 0:
                    uses = [(next_use(one.path), one) for one in stored]
                    for use, one in sorted(uses, key=lambda each: (-each[0], each[1].used)):
                        if need <= 0 or use <= first_use:
                            break
                        freed = self._remove(one)
                        need, held = need - freed, held - freed
                self._trusted_until = time.monotonic() + TRUSTED_S
                if need > 0:
                    _record(handle, held)
                    return False
            _record(handle, held + size)  # first, so that the number is never too small if the process is killed here
            with open(reserved, "wb", opener=open_own) as file:
                file.truncate(size)
            return True

    def forget(self) -> None:
        """Let the files be added up again before more is reserved: call it after writing other files to the cache."""
        with self._turn(urgent=True) as handle:
            if handle is not None:
                os.ftruncate(handle, 0)

    def note_release(self) -> None:
        """Tell the processes of the node that one of them has let go of shards, which may leave the cache now."""
        with suppress(OSError), self._opened() as handle:  # they look again without that, but later
            os.pwrite(handle, os.urandom(_MARK), _MARK_AT)

    def last_release(self) -> bytes:
        """Return a mark that is another one after each `note_release`."""
        with self._opened() as handle:
            return os.pread(handle, _MARK, _MARK_AT).ljust(_MARK)

    @contextmanager
    def _opened(self) -> Iterator[int]:
        handle = open_own(self._folder / ROOM, os.O_RDWR | os.O_CREAT)
        try:
            yield handle
        finally:
            os.close(handle)

    @contextmanager
    def _turn(self, urgent: bool) -> Iterator[int | None]:
        """Let one process of the node at a time make room, and yield the handle of ROOM.

        Yield None if not `urgent` and no turn comes within TURN_S.
        """
        with self._opened() as handle:
            has_turn, began = False, time.monotonic()
            while not has_turn and (urgent or time.monotonic() - began < TURN_S):
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | (0 if urgent else fcntl.LOCK_NB))
                    has_turn = True
                except BlockingIOError:  # whoever waits in flock goes first
                    time.sleep(random.uniform(0.005, 0.02))
            yield handle if has_turn else None

    def _recorded(self, handle: int) -> int | None:
        """Return the recorded number of bytes that the cache does not exceed; None if the files must be added up."""
        text = os.pread(handle, _MARK_AT, 0).strip()
        return int(text) if text.isdigit() and time.monotonic() < self._trusted_until else None

    def _files(self) -> Iterator[os.DirEntry[str]]:
        """Yield the files in the folders of the cache, and none in folders that are not its own."""
        for folder in _scan(self._folder):
            if folder.is_dir() and _is_own(Path(folder.path)):
                yield from _scan(folder.path)

    def _contents(self, without: Path | None = None) -> tuple[int, list[Stored]]:
        """Return the bytes of all files and reservations but `without`, and the shards.

        A shard with a reservation counts by the reservation alone, because its tar may have been renamed already.
        """
        # Reservations first: a shard that arrives meanwhile is seen by its reservation or by its files, or by both.
        reserved: dict[str, int] = {}
        for entry in self._files():
            if entry.name.endswith(RESERVED):
                with suppress(FileNotFoundError):
                    reserved[entry.path] = entry.stat(follow_symlinks=False).st_size
        covered = {
            str(path)
            for tar in map(_reserved_tar, map(Path, reserved))
            for path in (tar, index_path(tar), tar.with_suffix(CHECKSUMS))
        }
        held, stored = sum(reserved.values()) - reserved.get(str(without), 0), []
        for entry in self._files():
            if entry.name.endswith((".partial", RESERVED)):
                continue
            with suppress(FileNotFoundError):
                status = entry.stat(follow_symlinks=False)
                held += 0 if entry.path in covered else status.st_size
                if entry.name.endswith((".tar", CHECKSUMS)):
                    stored.append(Stored(entry.path, status.st_size, status.st_mtime))
        return held, stored

    def _remove(self, one: Stored) -> int:
        """Remove a shard that no process has locked; return the bytes that this frees."""
        path = Path(one.path)
        locks, number = (
            self._locks_of(path.parent),
            number_of(path.name.removesuffix(CHECKSUMS).removesuffix(".tar") + ".tar"),
        )
        if not locks.try_exclusive(number):
            return 0
        try:
            freed = one.bytes
            path.unlink(missing_ok=True)
            with suppress(FileNotFoundError):
                freed += index_path(path).stat().st_size
                index_path(path).unlink()
            return freed
        finally:
            locks.unlock(number)

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


def _record(handle: int, held: int) -> None:
    os.pwrite(handle, f"{held:<{_MARK_AT}}".encode(), 0)


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
