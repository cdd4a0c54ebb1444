"""Single samples of remote shards, read by coalesced ranges where the cache has no room for the shards.

The order of the data says which samples a loader process reads in which batch, and every sample of an epoch belongs to
one process. So each process fetches its own, in blocks of consecutive batches:

    order.py ─► the samples of a block, by shard ─ index with checksums ─► members ─ `coalesce` ─► ranges
             ─ store.py ─► bytes ─ CRC-32 of every member ─► ring.py ─► RangeReader

While the batches of one block are made, the ranges of the next one are fetched. The first block is one batch, so that
training begins at once, and each further one is twice as large up to half of the ring: the larger a block is, the more
of its samples are neighbours in a tar and share a range. What is not in the ring when it is needed, such as the
substitute of a bad sample, is fetched by itself and not kept.
"""

import logging
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from itertools import chain

from esvit_scale.data import manifest as manifests
from esvit_scale.data import signal_members, signals
from esvit_scale.data.loader import LoaderAssignment
from esvit_scale.data.manifest import Entry
from esvit_scale.data.remote.ranges import Member, coalesce, members_of, read_verified
from esvit_scale.data.remote.ring import Ring
from esvit_scale.data.remote.shard_cache import ShardCache
from esvit_scale.errors import RestartCanHelp, UserError, first_line

log = logging.getLogger("esvit_scale")

MOST_IMAGES = 32_768  # largest number of images in a block, because their index entries are held in memory
THREADS = 4  # ranges that one process fetches at a time
JOIN_S = 5.0  # seconds to wait for a request under way at the end
WAIT_S = 0.5  # seconds after which a waiting thread looks again whether it has to end

SampleId = tuple[int, int, int]  # number of the set, of its shard, and of the sample in the shard
Place = tuple[int, int, int]  # number of the set, of its shard, and first byte of a member in the shard


class Range:
    """Consecutive bytes of a shard, fetched with one request; `state` is that of the fetch."""

    def __init__(self, of: tuple[int, int], members: Sequence[Member]) -> None:
        self.set, self.shard = of
        self.members, self.state, self.offset = (
            members,
            "planned",
            0,
        )  # planned, active, done or left; offset in the ring
        self.start, self.stop = min(m.start for m in members), max(m.stop for m in members)

    @property
    def turn(self) -> int:
        """Return when the range is needed first."""
        return min(member.turn for member in self.members)


class Block:
    """The ranges of some consecutive batches."""

    def __init__(self, ranges: list[Range], entries: dict[SampleId, Entry], stop: int) -> None:
        self.ranges, self.entries = ranges, entries
        self.stop, self.mark = stop, 0  # index after the last batch; mark of the ring


class RangeAhead:
    """The threads of a loader process that plan blocks, and fetch their ranges into its ring.

    Args:
        assignment: which part of the data the process loads.
        samples_of: returns the samples of the process in a batch, in order; called in another thread.
        caches: the cache of every set, from ReadAhead; sets whose cache does not read by ranges are left out.
        size: size of the ring in bytes.
    """

    def __init__(
        self,
        assignment: LoaderAssignment,
        samples_of: Callable[[int], list[SampleId]],
        caches: Sequence[ShardCache | None],
        size: int,
    ) -> None:
        self._assignment, self._samples_of, self._caches = assignment, samples_of, caches
        self._modalities = signals.wanted(assignment.config.data)
        ranged = [cache for cache in caches if cache is not None and cache.by_ranges]
        manifest = ranged[0].manifest
        assert manifest.remote is not None
        self._ring = Ring(manifest.root, size, manifest.remote.limit)
        sets = [cache.manifest for cache in ranged]
        image = sum(int(each.shards.bytes.sum()) for each in sets) / max(sum(each.samples for each in sets), 1)
        images = len(assignment.images_of_rank) / assignment.worker()[1]  # of the process in a batch, on average
        self._largest = max(int(min(self._ring.size / 2 / (image * images + 1), MOST_IMAGES / images)), 1)  # batches
        self._changed, self._stopped = threading.Condition(), False
        self._batch_index, self._planned = (
            assignment.start,
            assignment.start,
        )  # the second: batches before it are planned
        self._blocks, self._queue = deque[Block](), deque[Range]()
        self._entries: dict[SampleId, Entry] = {}
        self._ranges: dict[Place, Range] = {}
        self._threads = [threading.Thread(target=self._plan_all, daemon=True)]
        self._threads += [threading.Thread(target=self._fetch_all, daemon=True) for _ in range(THREADS)]
        for thread in self._threads:
            thread.start()

    def at(self, batch_index: int) -> None:
        """Note that batch `batch_index` is made next: the blocks before it are given up."""
        with self._changed:
            self._batch_index = batch_index
            self._release()
            self._changed.notify_all()

    def entry(self, sample: SampleId) -> Entry | None:
        """Return the index entry of a sample, as soon as its batch is planned; None if it is not planned."""
        with self._changed:
            while self._planned <= self._batch_index and not self._stopped:
                self._changed.wait(WAIT_S)
            return self._entries.get(sample)

    def bytes_at(self, place: Place, size: int) -> bytes | None:
        """Return the bytes of a member, as soon as they are there; None if they are not planned, or failed."""
        with self._changed:
            found = self._ranges.get(place)
            if found is None or place[2] + size > found.stop:
                return None
            while found.state in ("planned", "active") and not self._stopped:
                self._changed.wait(WAIT_S)
            if found.state != "done":
                return None
        return self._ring.read(found.offset + place[2] - found.start, size)  # it stays until the batch is made

    def stop(self) -> None:
        """Let the threads end, once the requests under way have ended."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def close(self) -> None:
        """Remove the ring; call it after `stop`, and after the caches are closed, which ends the retries of requests."""
        for thread in self._threads:
            thread.join(JOIN_S)
        self._ring.close(with_file=not any(thread.is_alive() for thread in self._threads))

    # --- planning ----------------------------------------------------------------------------------------------------

    def _plan_all(self) -> None:
        first, batches = self._assignment.start, 1
        try:
            while first < self._assignment.stop and not self._stopped:
                stop = min(first + batches, self._assignment.stop)
                self._enter(self._block(first, stop))
                first, batches = stop, min(2 * batches, self._largest)
        except Exception as error:
            if not self._stopped:
                log.warning("samples are read one by one from now on: %s", first_line(error))
        finally:
            with self._changed:
                self._planned = self._assignment.stop
                self._changed.notify_all()

    def _block(self, first: int, stop: int) -> Block:
        """Return the block of batches first..stop-1, as far as the indexes of its shards can be read."""
        wanted: dict[tuple[int, int], dict[int, int]] = defaultdict(dict)  # (set, shard) → sample → turn
        turn = 0
        for batch_index in range(first, stop):
            for number, shard, i in self._samples_of(batch_index):
                turn += 1
                if (cache := self._caches[number]) is not None and cache.by_ranges:
                    wanted[number, shard].setdefault(i, turn)
        ranges: list[Range] = []
        entries: dict[SampleId, Entry] = {}
        for (number, shard), samples in wanted.items():
            members: list[Member] = []
            for i, entry in self._entries_of(number, shard, samples):
                entries[number, shard, i] = entry
                beside = (signal_members.members_of(entry.members, modality) for modality in self._modalities)
                members += members_of(entry, i, samples[i], chain.from_iterable(beside))
            ranges += [Range((number, shard), group) for group in coalesce(members)]
        return Block(sorted(ranges, key=lambda each: each.turn), entries, stop)

    def _entries_of(self, number: int, shard: int, samples: Iterable[int]) -> list[tuple[int, Entry]]:
        cache = self._caches[number]
        assert cache is not None
        try:
            if self._stopped:
                return []
            index = manifests.parse_index(cache.path(shard).read_bytes(), cache.manifest.shards[shard].name)
            return [(i, index[i]) for i in samples if i < len(index)]
        except (UserError, RestartCanHelp, OSError, ValueError) as error:  # the sample's reader meets the error again
            log.debug("not planned: %s", first_line(error))
            return []

    def _enter(self, block: Block) -> None:
        """Wait for room for a block's ranges, and queue them; what the ring as a whole cannot hold is left out."""
        with self._changed:
            while not self._stopped:
                found = self._ring.allocate([each.stop - each.start for each in block.ranges])
                if found is not None:
                    break
                if not self._blocks:
                    del block.ranges[-max(len(block.ranges) // 8, 1) :]
                    continue
                self._changed.wait(WAIT_S)
            else:
                return
            offsets, block.mark = found
            for each, offset in zip(block.ranges, offsets, strict=True):
                each.offset = offset
                for member in each.members:
                    self._ranges[each.set, each.shard, member.start] = each
            self._entries.update(block.entries)
            self._blocks.append(block)
            self._queue.extend(block.ranges)
            self._planned = block.stop
            self._release()
            self._changed.notify_all()

    def _release(self) -> None:
        """Give up the oldest blocks whose batches are made, once no fetch writes into them."""
        while self._blocks and self._blocks[0].stop <= self._batch_index:
            block = self._blocks[0]
            for each in block.ranges:
                each.state = "left" if each.state == "planned" else each.state
            if any(each.state == "active" for each in block.ranges):
                return
            self._blocks.popleft()
            self._ring.release(block.mark)
            for sample, entry in block.entries.items():
                if self._entries.get(sample) is entry:
                    del self._entries[sample]
            for each in block.ranges:
                for member in each.members:
                    if self._ranges.get((each.set, each.shard, member.start)) is each:
                        del self._ranges[each.set, each.shard, member.start]

    # --- fetching ----------------------------------------------------------------------------------------------------

    def _fetch_all(self) -> None:
        while True:
            with self._changed:
                while not self._queue and not self._stopped:
                    self._changed.wait(WAIT_S)
                if self._stopped:
                    return
                fetched = self._queue.popleft()
                if fetched.state != "planned":
                    continue
                fetched.state = "active"
            state = "left"
            try:
                cache = self._caches[fetched.set]
                assert cache is not None
                self._ring.write(fetched.offset, read_verified(cache, fetched.shard, fetched.members, urgent=False))
                state = "done"
            except Exception as error:  # the reader fetches the samples again, and raises the error if it recurs
                passes = isinstance(error, RestartCanHelp | OSError)
                log.log(logging.DEBUG if passes else logging.WARNING, "not fetched ahead: %s", first_line(error))
            finally:
                with self._changed:
                    fetched.state = state
                    self._release()
                    self._changed.notify_all()
