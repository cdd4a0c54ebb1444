"""Reader of indexed shards: any sample is read by its number with one `pread` at the offset in the index."""

import logging
import os
import resource
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from esvit_scale.data.decode import BadImage
from esvit_scale.data.manifest import (
    MANIFEST,
    Entry,
    Index,
    Manifest,
    image_member,
    read_index,
)
from esvit_scale.data.remote.shard_cache import ShardCache, ShardFiles
from esvit_scale.data.tar_names import MAX_MEMBER, parse_label
from esvit_scale.errors import RestartCanHelp, is_machine_fault

T = TypeVar("T")

log = logging.getLogger("esvit_scale")

OPEN_FILES = 1024  # kept open at most, and no more than half of what the process may open
INDEX_BYTES = 128 << 20  # bytes of indexes kept in memory, over all readers of a process
BLOCK = 4096  # bytes read to find out whether a file answers
RETRY_DELAYS = (0.5, 1, 2, 4, 8, 16, 30)  # seconds between attempts while storage does not answer
PROBES = 4  # other shards that are looked at before one shard, rather than the storage, is blamed


class StorageGone(RestartCanHelp):
    """Error for a set of which nothing can be read: the storage is the cause, and a restart can help."""


class RetryBudget:
    """A budget of growing delays between attempts to read; each delay is logged.

    Once it is used up, later failures get no delay until a read succeeds (`reset`): storage that is gone costs one
    round of delays, not one for every sample.
    """

    def __init__(self, delays: Sequence[float]) -> None:
        self._delays = tuple(delays)  # seconds
        self._used = 0

    @property
    def seconds(self) -> float:
        """Return the sum of all delays in seconds."""
        return sum(self._delays)

    def reset(self) -> None:
        """Make all delays available again, after a successful read."""
        self._used = 0

    def wait(self, what: str, error: OSError) -> bool:
        """Sleep for the next delay after a failed read of `what`; return False, at once, if no delay is left."""
        if self._used == len(self._delays):
            return False
        delay = self._delays[self._used]
        self._used += 1
        reason = error.strerror or " ".join(str(error).split())[:200]
        log.warning("%s: %s; trying again in %g s (%d of %d)", what, reason, delay, self._used, len(self._delays))
        time.sleep(delay)
        return True


class ShardReader:
    """Reader of a set's samples, with bounds on its open files and on the index bytes in memory. Make one per process.

    Args:
        readers: number of readers in this process, which share the bounds.
        cache: where the shards of a remote set lie, from its ReadAhead; None: a cache that keeps the last shards read.

    A read that fails with an error from which storage may recover is tried again with growing delays, a minute in all. If
    it still fails, the shard counts as damaged if other shards can be read, and the storage as gone if not.

    Raises (every method):
        BadImage: the sample is damaged or missing.
        OSError: its shard is damaged or missing.
        StorageGone: nothing of the set can be read.
    """

    def __init__(self, manifest: Manifest, readers: int = 1, cache: ShardCache | None = None) -> None:
        self.manifest, self._readers = manifest, readers
        self._shards = ShardFiles(manifest, cache)
        self._files: OrderedDict[int, tuple[int, int]] = OrderedDict()  # shard → (file descriptor, size)
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        most = OPEN_FILES if limit == resource.RLIM_INFINITY else min(OPEN_FILES, limit // 2)
        self._most_files = max(most // readers, 1)
        self._indexes: OrderedDict[int, Index] = OrderedDict()
        self._retries = RetryBudget(RETRY_DELAYS)
        self._damaged: set[int] = set()  # shards that failed while others could be read: not retried again
        self._index_bytes = 0
        self.waited_s = 0.0  # seconds of waiting for remote shards so far

    def entry(self, shard: int, i: int) -> Entry:
        """Return the index entry of sample `i` of a shard."""
        try:
            return self._read_with_retries(shard, lambda: self._index(shard))[i]
        except IndexError:
            raise BadImage(f"sample {i} is not in the shard (truncated?)") from None
        except (ValueError, TypeError):
            raise BadImage(f"the index line of sample {i} is corrupt") from None

    def image(self, shard: int, entry: Entry) -> bytes:
        """Return the bytes of the sample's image file."""
        place = image_member(entry)
        if place is None:
            raise BadImage(f"no image among its members ({', '.join(entry.members) or 'none'})")
        return self._read_with_retries(shard, lambda: self._pread(shard, *place))

    def member(self, shard: int, entry: Entry, extension: str) -> bytes:
        """Return the bytes of the sample's member of an extension."""
        return self._read_with_retries(shard, lambda: self._pread(shard, *entry.members[extension]))

    def label(self, shard: int, entry: Entry) -> int:
        """Return the sample's class number, -1 without one."""
        if "cls" not in entry.members:
            return -1
        return parse_label(self._read_with_retries(shard, lambda: self._pread(shard, *entry.members["cls"])))

    def close(self) -> None:
        """Close all open files, and let go of remote shards; a later read opens them again."""
        self.close_shards(set(self._files))
        self._shards.close()

    def close_shards(self, shards: Iterable[int]) -> None:
        """Close the files of some shards; a later read opens them again."""
        for shard in shards:
            self._forget(shard)

    def _read_with_retries(self, shard: int, read: Callable[[], T]) -> T:
        path = self.manifest.root / self.manifest.shards[shard].name
        while True:
            try:
                return read()
            except OSError as error:
                self._forget(shard)  # the descriptor of a lost mount stays bad
                gone = self._is_gone()
                if not gone and (not is_machine_fault(error) or shard in self._damaged):
                    raise
                if self._retries.wait(str(path), error):
                    continue
                if not gone and self._storage_answers(shard):
                    self._damaged.add(shard)
                    raise
                what = "no longer there" if gone else "nothing in it can be read"
                raise StorageGone(
                    f"{self.manifest.root}: {what} ({path.name}: {error.strerror}), after waiting "
                    f"{self._retries.seconds:.0f} s; is its mount gone? The same command continues when it is back"
                ) from None

    def _is_gone(self) -> bool:
        try:
            return not self.manifest.remote and not (self.manifest.root / MANIFEST).is_file()
        except OSError:
            return True

    def _storage_answers(self, failed: int) -> bool:
        """Return whether anything of the set can be read from the disk.

        A few blocks of other shards are tried, or, in a set of one shard, a few blocks of that one.
        """
        count = len(self.manifest.shards)
        others = {(failed + 1 + i * count // PROBES) % count for i in range(PROBES)} - {failed}
        return any(self._reads_a_block(shard, place) for shard in others or {failed} for place in (0.0, 0.5, 1.0))

    def _reads_a_block(self, shard: int, place: float) -> bool:
        """Return whether a block of a shard can be read from the disk.

        The page cache is bypassed, because it would answer for a dead disk.

        Args:
            place: where the block lies, from 0 (start of the shard) to 1 (its end).
        """
        handle = None
        try:
            handle = os.open(self.manifest.root / self.manifest.shards[shard].name, os.O_RDONLY | os.O_CLOEXEC)
            at = int(place * max(os.fstat(handle).st_size - BLOCK, 0))
            os.posix_fadvise(handle, at, BLOCK, os.POSIX_FADV_DONTNEED)
            return bool(os.pread(handle, BLOCK, at))
        except OSError:
            return False
        finally:
            if handle is not None:
                os.close(handle)

    def _forget(self, shard: int) -> None:
        if shard in self._files:
            os.close(self._files.pop(shard)[0])

    def _pread(self, shard: int, offset: int, size: int) -> bytes:
        handle, length = self._file(shard)
        if size > MAX_MEMBER or offset + size > length:
            raise BadImage("lies beyond the end of the shard (truncated)")
        data = os.pread(handle, size, offset)
        if len(data) != size:
            raise BadImage(f"{len(data)} of {size} bytes could be read")
        self._retries.reset()
        self._damaged.discard(shard)
        return data

    def _file(self, shard: int) -> tuple[int, int]:
        found = self._files.get(shard)
        if found is None:
            while len(self._files) >= self._most_files:
                os.close(self._files.popitem(last=False)[1][0])
            handle = self._at_path(shard, lambda path: os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            found = self._files[shard] = (handle, os.fstat(handle).st_size)
        else:
            self._files.move_to_end(shard)
        return found

    def _path(self, shard: int) -> Path:
        """Return where a shard lies on this node; a remote one is fetched first."""
        began = time.monotonic()
        try:
            path, gone = self._shards.path(shard)
        finally:
            self.waited_s += time.monotonic() - began
        self.close_shards(gone)
        return path

    def _at_path(self, shard: int, read: Callable[[Path], T]) -> T:
        """Return the result of `read` with a shard's path; a remote shard that somebody removed is fetched once more."""
        try:
            return read(self._path(shard))
        except FileNotFoundError:
            if self.manifest.remote is None:
                raise
            return read(self._path(shard))

    def _index(self, shard: int) -> Index:
        found = self._indexes.get(shard)
        if found is None:
            found = self._indexes[shard] = self._at_path(shard, read_index)
            self._index_bytes += found.nbytes
            while self._index_bytes > INDEX_BYTES // self._readers and len(self._indexes) > 1:
                self._index_bytes -= self._indexes.popitem(last=False)[1].nbytes
        else:
            self._indexes.move_to_end(shard)
        return found
