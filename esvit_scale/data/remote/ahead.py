"""Fetching of shards ahead of need, and letting go of those that are not needed any more, in one loader process."""

import logging
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from heapq import heappop, heappush
from pathlib import Path

from esvit_scale.data.loader import LoaderAssignment
from esvit_scale.data.manifest import Manifest
from esvit_scale.data.mix import MixedSets
from esvit_scale.data.remote.room import NEVER
from esvit_scale.data.remote.schedule import Schedule, ShardId
from esvit_scale.data.remote.shard_cache import ShardCache
from esvit_scale.division import share
from esvit_scale.errors import RestartCanHelp, UserError

log = logging.getLogger("esvit_scale")

THREADS = 4  # transfers at a time of one process
JOIN_S = 5.0  # seconds to wait for a transfer under way at the end
AGAIN_S = 0.25  # seconds until a shard for which there was no room, or which another process fetches, is tried again


def node_slots(assignment: LoaderAssignment) -> range:
    """Return the data slots of all ranks on this process's node, which share its cache."""
    size, slots = assignment.world_size, assignment.config.slots
    local = min(ranks_per_node(size), size)
    node = assignment.rank // local
    parts = [range(slots)[share(slots, rank, size)] for rank in range(node * local, min((node + 1) * local, size))]
    return range(parts[0].start, parts[-1].stop)


def ranks_per_node(world_size: int) -> int:
    """Return the number of ranks on a node, as torchrun or srun say it; 1 where nobody says it."""
    told = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE") or ""
    return max(min(int(told) if told.isdecimal() else 1, world_size), 1)


class ReadAhead:
    """The remote shards of one loader process: it fetches them before the order needs them.

    Args:
        assignment: of the process.
        data: its shard set or mix.
        first: the shards of the first batches, in the order in which they are read; they are fetched before others.
    """

    def __init__(self, assignment: LoaderAssignment, data: Manifest | MixedSets, first: Iterable[ShardId]) -> None:
        self._assignment, self._batch_index = assignment, assignment.start
        sets = [data] if isinstance(data, Manifest) else [one.manifest for one in data.sets]
        self._node = Schedule(assignment.config, data, node_slots(assignment))
        self._mine = Schedule(assignment.config, data, assignment.slots_of_worker())
        self._ids = {m.root / shard.name: (n, i) for n, m in enumerate(sets) for i, shard in enumerate(m.shards)}
        self.caches = [ShardCache(manifest, self._next_use) if manifest.remote else None for manifest in sets]
        self._live: list[tuple[int, tuple[ShardId, ...]]] = []  # heap of (last batch, shards) of current uses
        self._coming = (use for epoch in self._epochs() for use in self._mine.uses(epoch))
        self._upcoming = next(self._coming, None)
        self._queue, self._changed, self._stopped = self._wanted(list(first)), threading.Condition(), False
        self._queue_lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(THREADS)]
        for thread in self._threads:
            thread.start()

    def at(self, batch_index: int) -> Sequence[set[int]]:
        """Say that `batch_index` is made next; return for every set the shards that it may close now."""
        if batch_index == self._batch_index and self._live:
            return ()
        while self._upcoming is not None and self._upcoming.first <= batch_index:
            heappush(self._live, (self._upcoming.last, self._upcoming.shards))
            self._upcoming = next(self._coming, None)
        while self._live and self._live[0][0] < batch_index:
            heappop(self._live)
        with self._changed:
            self._batch_index = batch_index
            self._changed.notify_all()
        needed = {shard for _, shards in self._live for shard in shards}
        return [
            cache.keep({i for number, i in needed if number == of}) if cache else set()
            for of, cache in enumerate(self.caches)
        ]

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

    def _next_use(self, path: Path) -> float:
        shard = self._ids.get(path)
        return NEVER if shard is None else self._node.next_use(shard, self._batch_index)

    def _wanted(self, first: list[ShardId]) -> Iterator[tuple[ShardId, int, int]]:
        """Yield (shard, first batch, last batch) in the order of need, up to the end of the next epoch."""
        start, steps = self._assignment.start, self._mine.steps
        for shard in dict.fromkeys(first):
            yield shard, -1, start
        worker = self._assignment.worker()[0]
        for epoch in self._epochs():
            with self._changed:
                self._changed.wait_for(lambda e=epoch: self._stopped or e * steps <= self._batch_index + steps)
            for use in self._mine.uses(epoch):
                turn = worker % len(use.shards)  # processes that share a window begin with different shards
                for shard in use.shards[turn:] + use.shards[:turn]:
                    if use.last >= start and use.first < self._assignment.stop:
                        yield shard, use.first, use.last

    def _run(self) -> None:
        while not self._stopped:
            with self._queue_lock:
                shard, first, last = next(self._queue, ((-1, -1), 0, 0))
            if shard[0] < 0:
                return
            self._fetch(shard, first, last)

    def _fetch(self, shard: ShardId, first: int, last: int) -> None:
        """Fetch a shard as soon as there is room for it, unless its use is over before."""
        cache = self.caches[shard[0]]
        while cache is not None and not self._stopped and last >= self._batch_index:
            try:
                if cache.fetch_ahead(shard[1], first):
                    return
            except (UserError, RestartCanHelp, OSError) as error:  # whoever reads the shard meets it again
                log.debug("%s", error)
                return
            with self._changed:
                self._changed.wait(AGAIN_S)
