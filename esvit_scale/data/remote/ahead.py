"""Background threads of a loader process that fetch remote shards ahead of need, and release those no longer needed."""

import logging
import math
import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from heapq import heappop, heappush

from esvit_scale.data.loader import LoaderAssignment
from esvit_scale.data.manifest import Manifest
from esvit_scale.data.mix import MixedSets
from esvit_scale.data.remote.room import NEVER
from esvit_scale.data.remote.schedule import Schedule, ShardId
from esvit_scale.data.remote.shard_cache import ShardCache
from esvit_scale.errors import RestartCanHelp, UserError, first_line

log = logging.getLogger("esvit_scale")

THREADS = 4  # transfers at a time of one process
JOIN_S = 5.0  # seconds to wait for a transfer under way at the end
AGAIN_S = 0.1  # seconds that an idle thread sleeps
BUSY_S = 0.5  # seconds until a shard that another process fetches is looked at again
THERE_S = 5.0  # seconds for which a shard that was found in the cache is not looked for again
QUIET_S = 2.0  # seconds until the next look after one that found nothing to fetch
ROOM_S, LONGEST_ROOM_S = 1.0, 4.0  # the same after one that found no room, unless a shard is released; it doubles
LOOK_SHARE = 0.05  # most of its time for which a process looks for room
RANGES_PER_SECOND = 2000  # requests of all nodes of a run together at most, where samples are read by ranges
FAILED_S = 30.0  # seconds until a shard whose transfer failed is fetched ahead again


def nodes(world_size: int) -> int:
    """Return the number of nodes of a run."""
    return -(-world_size // min(ranks_per_node(world_size), world_size))


def images_of_node(assignment: LoaderAssignment) -> range:
    """Return the places in a global batch of the images of all ranks on this process's node, which share its cache."""
    local = min(ranks_per_node(assignment.world_size), assignment.world_size)
    first = assignment.rank // local * local
    last = min(first + local, assignment.world_size) - 1
    of = [replace(assignment, rank=rank).images_of_rank for rank in (first, last)]
    return range(of[0].start, of[1].stop)


def node_slots(assignment: LoaderAssignment) -> range:
    """Return the data slots of which this process's node reads images, perhaps beside other nodes."""
    return assignment.slots_of(images_of_node(assignment))


def ranks_per_node(world_size: int) -> int:
    """Return the number of ranks on a node, from the environment of torchrun or srun; 1 without either."""
    told = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE") or ""
    return max(min(int(told) if told.isdecimal() else 1, world_size), 1)


class ReadAhead:
    """A reader ahead for one loader process: it fetches remote shards before the order of the data needs them.

    Args:
        assignment: which part of the data the process loads.
        data: its shard set or mix.
        first: the shards of the first batches, in the order in which they are read; they are fetched before others.
        by_ranges: whether samples are read by ranges (ranges.py) where a set has checksums: then the indexes of its shards
            are fetched in their place.
    """

    def __init__(
        self,
        assignment: LoaderAssignment,
        data: Manifest | MixedSets,
        first: Iterable[ShardId],
        by_ranges: bool = False,
    ) -> None:
        self._assignment, self._batch_index = assignment, assignment.start
        sets = [data] if isinstance(data, Manifest) else [one.manifest for one in data.sets]
        self._node = Schedule(assignment.config, data, node_slots(assignment))
        self._mine = Schedule(assignment.config, data, assignment.slots_of_worker())
        self.caches = [
            ShardCache(manifest, self._next_use, by_ranges and manifest.has_checksums) if manifest.remote else None
            for manifest in sets
        ]
        for cache in filter(None, self.caches):
            if cache.by_ranges:
                cache.requests_per_second = RANGES_PER_SECOND / nodes(assignment.world_size)
        self._ids = lru_cache(2)(self._ids_of)
        self._live: list[tuple[int, tuple[ShardId, ...]]] = []  # heap of (last batch, shards) of current uses
        self._coming = (use for epoch in self._epochs() for use in self._mine.uses(epoch))
        self._upcoming = next(self._coming, None)
        self._first, self._changed, self._stopped = list(dict.fromkeys(first)), threading.Condition(), False
        self._looking, self._busy = (
            threading.Lock(),
            dict[ShardId, float](),
        )  # _busy: time until which a shard is left alone
        self._there: dict[ShardId, float] = {}  # time until which a shard counts as cached
        self._quiet_until, self._room_delay, self._changes = 0.0, ROOM_S, 0
        # After a look that found no room: the last release before it, and the time until which no other ends the quiet.
        self._released: bytes | None = None
        self._deaf_until = 0.0
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(THREADS)]
        for thread in self._threads:
            thread.start()

    def at(self, batch_index: int) -> Sequence[set[int]]:
        """Note that batch `batch_index` is made next; return for every set the shards whose files may be closed now."""
        if batch_index == self._batch_index and self._live:
            return ()
        while self._upcoming is not None and self._upcoming.first <= batch_index:
            heappush(self._live, (self._upcoming.last, self._upcoming.shards))
            self._upcoming = next(self._coming, None)
        while self._live and self._live[0][0] < batch_index:
            heappop(self._live)
        is_new_epoch = batch_index // self._mine.steps != self._batch_index // self._mine.steps
        self._batch_index = batch_index
        needed = {shard for _, shards in self._live for shard in shards}
        gone = [
            cache.keep({i for number, i in needed if number == of}) if cache else set()
            for of, cache in enumerate(self.caches)
        ]
        if is_new_epoch or any(gone):
            with self._changed:
                self._quiet_until, self._room_delay, self._changes = 0.0, ROOM_S, self._changes + 1
                self._changed.notify_all()
        return gone

    def close(self) -> None:
        """End the transfers that have not begun, and let go of all shards."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(JOIN_S)
        for cache in filter(None, self.caches):
            cache.close()

    def _epochs(self) -> Iterator[int]:
        epoch = self._assignment.start // self._mine.steps
        while epoch * self._mine.steps < self._assignment.stop:
            yield epoch
            epoch += 1

    def _next_use(self, path: str) -> float:
        epoch = self._batch_index // self._node.steps
        shard = self._ids(epoch).get(path) or self._ids(epoch + 1).get(path)
        return NEVER if shard is None else self._node.next_use(shard, self._batch_index)

    def _ids_of(self, epoch: int) -> dict[str, ShardId]:
        """Return the shards that the node reads in an epoch, by their paths in the cache; large sets have many others."""
        shards = {shard for use in self._node.uses(epoch) for shard in use.shards}
        return {str(cache.target(number)): (of, number) for of, number in shards if (cache := self.caches[of])}

    def _run(self) -> None:
        while not self._stopped:
            if not self._fetch_next():
                with self._changed:
                    self._changed.wait(AGAIN_S)

    def _fetch_next(self) -> bool:
        """Fetch the missing shard that is needed first; return False if there is none, or no room for it yet.

        After False, no thread looks again until a process of the node releases a shard or some time has passed: looking
        for a missing shard costs a system call for every shard, and looking for room a listing of the cache during which
        the whole node waits. One thread at a time looks, so that room goes to the shard that is needed first.
        """
        self._looking.acquire()
        looking = [self._looking]

        def admit() -> None:
            if looking:
                looking.pop().release()

        shard = None
        try:
            changes = self._changes
            if self._is_quiet():
                return False
            found = next(self._missing(), None)
            if found is None:
                self._released = None
                self._be_quiet(QUIET_S, changes)
                return False
            shard, first = found
            self._busy[shard] = time.monotonic() + BUSY_S
            cache = self.caches[shard[0]]
            assert cache is not None
            began, released = time.monotonic(), cache.room.last_release()
            there = cache.fetch_ahead(shard[1], first, admit)
            if there is False:  # no room, so shards that are needed later have to wait, too
                self._busy.pop(shard, None)
                now = time.monotonic()
                self._released, self._deaf_until = released, now + (now - began) / LOOK_SHARE
                self._be_quiet(self._room_delay, changes)
                self._room_delay = min(2 * self._room_delay, LONGEST_ROOM_S)
            return there is not False
        except Exception as error:
            self._leave_alone(shard, error)
            return False
        finally:
            admit()

    def _is_quiet(self) -> bool:
        """Return whether no thread should look now."""
        now = time.monotonic()
        if now >= self._quiet_until or now < self._deaf_until or self._released is None:
            return now < self._quiet_until
        room = next(cache.room for cache in self.caches if cache)  # the caches of a node's sets share one folder
        return room.last_release() == self._released

    def _be_quiet(self, seconds: float, changes: int) -> None:
        """Stop looking for some seconds, unless a shard was released since `changes` was read."""
        with self._changed:
            if changes == self._changes:
                self._quiet_until = time.monotonic() + seconds

    def _leave_alone(self, shard: ShardId | None, error: Exception) -> None:
        """Stop fetching a shard ahead after an error: its reader fetches it again, and raises the error if it recurs.

        Args:
            shard: the shard; None if the error came before one was chosen.
        """
        until = math.inf if isinstance(error, UserError) else time.monotonic() + FAILED_S
        if shard is None:
            self._quiet_until = until
        else:
            self._busy[shard] = until
        passes = isinstance(error, RestartCanHelp | OSError)
        log.log(logging.DEBUG if passes else logging.WARNING, "not fetched ahead of need: %s", first_line(error))

    def _missing(self) -> Iterator[tuple[ShardId, int]]:
        """Yield (shard, first batch) for the shards that are not there, in the order of need, up to the next epoch's end.

        Left out for BUSY_S are those that this process or another one is fetching, and longer those that failed.
        """
        seen: set[ShardId] = set()
        now = time.monotonic()
        for shard, first in self._wanted():
            cache = self.caches[shard[0]]
            if shard in seen or cache is None:
                continue
            seen.add(shard)
            if self._busy.get(shard, 0.0) >= now or self._there.get(shard, 0.0) >= now:
                continue
            if cache.is_there(shard[1]):
                self._there[shard] = now + THERE_S
            else:
                yield shard, first

    def _wanted(self) -> Iterator[tuple[ShardId, int]]:
        current, steps = self._batch_index, self._mine.steps
        if current <= self._assignment.start + 1:
            yield from ((shard, -1) for shard in self._first)
        worker = self._assignment.worker()[0]
        for epoch in (current // steps, current // steps + 1):
            for use in self._mine.uses(epoch):
                turn = worker % len(use.shards)  # processes that share a window begin with different shards
                if use.last >= current and use.first < self._assignment.stop:
                    yield from ((shard, use.first) for shard in use.shards[turn:] + use.shards[:turn])
