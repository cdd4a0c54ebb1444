"""The cache of one remote shard set on a node's disk, as one process uses it.

A shard is fetched once for all processes of the node: whoever wants it takes its exclusive lock, writes it to a
temporary file, compares length and sha256 with the manifest, makes its index, and renames both. A process keeps a
shared lock on every shard that it uses; a shard with a lock is never removed. Locks end with their process, and what a
killed process left behind is removed by the next one.
"""

import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from esvit_scale import files, store_urls
from esvit_scale.data import manifest as manifests
from esvit_scale.data.manifest import Manifest
from esvit_scale.data.remote.locks import ByteLocks
from esvit_scale.data.remote.room import (
    CHECKSUMS,
    LOCKS,
    NEVER,
    Room,
    cost,
    index_cost,
    make_folder,
    number_of,
    reservation,
)
from esvit_scale.data.remote.store import Denied, Missing, Store, StoreUnreachable, TooLong
from esvit_scale.data.shard_table import Shard
from esvit_scale.errors import UserError

log = logging.getLogger("esvit_scale")

CHANGED_ATTEMPTS = 3  # transfers with another length or sha256 after which the object counts as changed
CHANGED_DELAY_S = 0.5  # seconds by which the wait before each further transfer grows
LAST_SHARDS = 2  # number of shards that a reader without a schedule (an evaluation) keeps
POLL_S = 0.02  # seconds until a shard that another process or thread fetches is looked at again
LONG_WAIT_S = 20.0  # a longer wait for a shard, in seconds, is logged
NO_ROOM_S = 0.5  # at most between two attempts to find room
REPLACED = "the object was replaced or is damaged; upload the shard again, or start another run"
LISTED = "the manifest lists it: upload the shard again"
WAIT_S = 1800.0  # seconds to wait for another process that fetches a shard, or for room


class ShardCache:
    """The cached shards of one set; make one per process.

    Args:
        manifest: of the set, with `remote`.
        next_use: returns when a shard of this cache, by its path, is needed next; without it, shards leave the cache
            in the order of their last use.
        by_ranges: keep the verified indexes of the shards in the place of the shards, whose samples are read by ranges
            (ranges.py).
    """

    def __init__(
        self, manifest: Manifest, next_use: Callable[[str], float] = lambda path: NEVER, by_ranges: bool = False
    ) -> None:
        assert manifest.remote is not None
        self.manifest, self.folder, remote = manifest, manifest.root, manifest.remote
        self.by_ranges, self.requests_per_second = by_ranges, 0.0
        make_folder(self.folder)
        self.room = Room(self.folder.parent, remote.limit)
        self._locks = ByteLocks(self.folder / LOCKS)  # not those with which `room` removes shards: these exclude them
        self._store: Store | None = None
        self._next_use = next_use
        self._changed, self._opening = threading.Condition(), threading.Lock()
        self._held: set[int] = set()  # shards with a shared lock
        self._fetching: set[int] = set()
        self.fetched = 0  # shards that this process has fetched

    def path(self, number: int) -> Path:
        """Return a shard's path, after fetching it if it is not there; it stays until `keep` is called without it.

        With `by_ranges` it is the path of the shard's index.

        Raises:
            UserError: the object is not what the manifest says, is missing, or there is no room for it.
            StoreUnreachable: the store does not serve it, or the cache's disk is full or broken.
        """
        try:
            return self._path(number)
        except OSError as error:  # of the cache: a reader would take it for a damaged sample
            raise StoreUnreachable(
                f"{self.folder}: {error.strerror or error}; the cache's disk is full or broken"
            ) from None

    def _path(self, number: int) -> Path:
        shard, began, delay = self.manifest.shards[number], time.monotonic(), POLL_S
        while not self._take(number):
            there = self._fetch(number, first_use=-1.0, urgent=True)
            if there:
                continue
            delay = min(2 * delay, NO_ROOM_S) if there is False else POLL_S
            if time.monotonic() - began > WAIT_S:
                raise UserError(
                    f"data.cache_gb: no room for {shard.name} in {self.folder.parent} for {WAIT_S / 60:.0f} minutes: other "
                    "runs use the cache; give it more room, or this run a data.cache_dir of its own"
                )
            time.sleep(delay)
        if (waited := time.monotonic() - began) > LONG_WAIT_S:
            log.info("waited %.0f s for %s", waited, store_urls.join(self._remote.url, shard.name))
        return self.target(number)

    def target(self, number: int) -> Path:
        """Return where a shard, or with `by_ranges` its index, lies in the cache, or will."""
        path = self.folder / self.manifest.shards[number].name
        return path.with_suffix(CHECKSUMS) if self.by_ranges else path

    def address(self, number: int) -> str:
        """Return the URL of a shard."""
        return store_urls.join(self._remote.url, self.manifest.shards[number].name)

    def fetch_ahead(self, number: int, first_use: float, admit: Callable[[], None] = lambda: None) -> bool | None:
        """Fetch a shard that will be needed at batch `first_use`.

        Args:
            admit: called once there is room, before the transfer.

        Returns:
            True if it lies in the cache now, False if there is no room for it yet, None if it is being fetched already.
        """
        return self.is_there(number) or self._fetch(number, first_use, False, admit)

    def keep(self, numbers: set[int]) -> set[int]:
        """Let go of all shards but `numbers`, and return those that may leave the cache now."""
        with self._changed:
            gone = self._held - numbers
            for number in gone:
                self._locks.unlock(self._byte(number))
            self._held -= gone
        if gone:
            self.room.note_release()
        return gone

    def close(self) -> None:
        """Let go of all shards and close the connections, once the transfers under way have ended."""
        self.keep(set())
        if self._store is not None:
            self._store.close()

    def _byte(self, number: int) -> int:
        return number_of(self.manifest.shards[number].name)

    def is_there(self, number: int) -> bool:
        """Return whether a shard lies in the cache."""
        with suppress(OSError):
            size = self.target(number).stat().st_size
            return self.by_ranges or size == self.manifest.shards[number].bytes
        return False

    def _take(self, number: int) -> bool:
        """Lock a shard that lies in the cache against its removal; return False where it does not, or is being fetched."""
        with self._changed:
            if number in self._held:
                if self.is_there(number):
                    return True
                self._held.discard(number)  # somebody removed the file by hand
                self._locks.unlock(self._byte(number))
            if number in self._fetching:
                self._changed.wait(POLL_S)
                return False
            if not self.is_there(number) or not self._locks.try_shared(self._byte(number)):
                return False
            if not self.is_there(number):
                self._locks.unlock(self._byte(number))
                return False
            self._held.add(number)
        with suppress(OSError):
            os.utime(self.target(number))
        return True

    def _fetch(
        self, number: int, first_use: float, urgent: bool, admit: Callable[[], None] = lambda: None
    ) -> bool | None:
        """Fetch a shard, with the results of `fetch_ahead`."""
        shard, byte = self.manifest.shards[number], self._byte(number)
        with self._changed:
            if number in self._fetching or number in self._held or not self._locks.try_exclusive(byte):
                return None
            self._fetching.add(number)
        reserved = False
        try:
            if self.is_there(number):
                return True
            if reservation(self.folder, shard.name).exists():  # of a process that was killed: its lock is ours now
                for fragment in self.folder.glob(f".{shard.name}.*.partial"):
                    fragment.unlink(missing_ok=True)
            size = index_cost(shard) if self.by_ranges else cost(shard)
            reserved = self._reserve(shard, size, first_use, urgent)
            if reserved:
                admit()
                self._transfer(number, urgent, first_use)
                self.fetched += 1
            return reserved
        finally:
            with self._changed:
                if reserved:
                    # The shard's files are there now, or the transfer has failed.
                    reservation(self.folder, shard.name).unlink(missing_ok=True)
                self._fetching.discard(number)
                self._locks.unlock(byte)
                self._changed.notify_all()

    def _reserve(self, shard: Shard, size: int, first_use: float, urgent: bool) -> bool:
        return self.room.reserve(reservation(self.folder, shard.name), size, first_use, self._next_use, urgent)

    def _transfer(self, number: int, urgent: bool, first_use: float) -> None:
        """Fetch a shard's object, compare it with the manifest, and give tar and index their names, the tar last.

        With `by_ranges` the object is the shard's index.
        """
        shard = self.manifest.shards[number]
        tmp = self.folder / f".{shard.name}.{os.getpid()}.{threading.get_ident()}.partial"
        name = manifests.index_path(self.folder / shard.name).name if self.by_ranges else shard.name
        url = store_urls.join(self._remote.url, name)
        try:
            for attempt in range(CHANGED_ATTEMPTS):
                problem = self._fetched(name, tmp, shard, urgent, first_use)
                if problem is None:
                    break
                log.warning("%s: %s (attempt %d)", url, problem, attempt + 1)
                time.sleep(CHANGED_DELAY_S * attempt)
            else:
                raise UserError(f"{url}: {problem}: {REPLACED}")
            if not self.by_ranges:
                self._write_index(shard, tmp, first_use)
            tmp.replace(self.target(number))
        except (Missing, Denied) as error:
            raise UserError(f"{error}; {LISTED}") from None
        finally:
            tmp.unlink(missing_ok=True)

    def _fetched(self, name: str, tmp: Path, shard: Shard, urgent: bool, first_use: float) -> str | None:
        """Fetch an object to the file `tmp`; return how it differs from what the manifest says, in words, None if it does not.

        No more than was reserved is written, but for the last piece of a transfer. The manifest does not say how long
        an index is, so that for a longer one more is reserved.
        """
        try:
            try:
                self.store().fetch(name, tmp, urgent=urgent, most=index_cost(shard) if self.by_ranges else shard.bytes)
            except TooLong as error:
                if (
                    not self.by_ranges
                    or error.size is None
                    or not self._reserve(shard, error.size, first_use, urgent=True)
                ):
                    raise
                self.store().fetch(name, tmp, urgent=urgent, most=error.size)
        except TooLong as error:
            return (
                f"{error}; the manifest says {shard.bytes}" if not self.by_ranges else f"{error}, and there is no room"
            )
        return _difference(tmp, shard, self.by_ranges)

    def store(self) -> Store:
        """Return the store, which this process opens once."""
        with self._opening:
            if self._store is None:
                self._store = Store(self._remote.url, self._remote.options, self.folder.parent)
                self._store.requests_per_second = self.requests_per_second
            return self._store

    def _write_index(self, shard: Shard, tar: Path, first_use: float) -> None:
        """Write the index of a verified tar from its headers: the index in the store is covered by no checksum.

        Where there is no room for an index of unusually long keys, readers scan the headers themselves.
        """
        index = manifests.dump_index(shard.name, manifests.scan(tar))
        size = shard.bytes + len(index)
        if size <= cost(shard) or self._reserve(shard, size, first_use, urgent=True):
            files.write_bytes(manifests.index_path(self.folder / shard.name), index)

    @property
    def _remote(self) -> "manifests.Remote":
        assert self.manifest.remote is not None
        return self.manifest.remote


# A process's caches without a schedule, by its id and the set's folder. A fork keeps those that it inherits and never uses
# them: freed there, they would close connections of the process that it was forked from.
_caches: dict[tuple[int, Path], ShardCache] = {}


class ShardFiles:
    """Where the shards of a set lie on this node; those of a remote set are fetched when they are asked for.

    Args:
        manifest: of the set.
        cache: of a remote set, kept up to date by its owner; None: the process's own, which keeps the last LAST_SHARDS
            shards that were asked for here.
    """

    def __init__(self, manifest: Manifest, cache: ShardCache | None = None) -> None:
        self._manifest, self._given = manifest, cache
        self._last = [-1] * LAST_SHARDS

    def path(self, number: int) -> tuple[Path, set[int]]:
        """Return a shard's path and the shards that may leave the cache now; the errors are those of ShardCache.path."""
        if self._manifest.remote is None:
            return self._manifest.root / self._manifest.shards[number].name, set()
        if self._given is not None:
            return self._given.path(number), set()
        key = (os.getpid(), self._manifest.root)
        cache = _caches.get(key) or _caches.setdefault(key, ShardCache(self._manifest))
        gone: set[int] = set()
        if number not in self._last:
            self._last = [*self._last[1:], number]
            gone = cache.keep(set(self._last))
        return cache.path(number), gone

    def close(self) -> None:
        """Let go of the shards that the process's own cache keeps; those of a given cache are its owner's."""
        if self._given is None and (cache := _caches.get((os.getpid(), self._manifest.root))):
            cache.keep(set())
        self._last = [-1] * LAST_SHARDS


def _difference(path: Path, shard: Shard, is_index: bool) -> str | None:
    """Return how a shard's tar or index differs from what the manifest says, in words; None if it does not."""
    size, expected = path.stat().st_size, shard.index_sha256 if is_index else shard.sha256
    if not is_index and size != shard.bytes:
        return f"{size} bytes came; the manifest says {shard.bytes}"
    found = files.sha256(path)
    return None if found == expected else f"sha256 {found[:12]}… came; the manifest says {expected[:12]}…"
