"""When a run needs which shard: a pure function of the data's order, like the order itself.

A slot (order.py) reads a stretch of an epoch's order, hence the shuffle windows that lie in it, one after the other. A
`Use` is one of them: the batches in which one slot may read any of one window's shards. Windows that reach from one slot
into the next are used twice in an epoch, by the first slot at its end and by the second at its start.

In a mix, a slot's draws from one set are a stretch of that set's order. They are read at an even rate but for up to two
draws, by which each use is widened.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from esvit_scale.config import Config
from esvit_scale.data.manifest import Manifest
from esvit_scale.data.mix import MixedOrder, MixedSets, order_of
from esvit_scale.data.order import Order, steps_per_epoch
from esvit_scale.data.remote.room import NEVER

SLACK = 8  # number of batches by which the processes of a node may differ in progress

ShardId = tuple[int, int]  # number of the set in a mix (0 for a single set), number of the shard


class Use(NamedTuple):
    """The batches in which one slot reads from one shuffle window."""

    first: int  # batch index
    last: int  # batch index, inclusive
    shards: tuple[ShardId, ...]


class Stretch(NamedTuple):
    """A stretch of one set's order that a slot reads in one epoch of the run."""

    set: int
    order: Order
    positions: range
    first: float  # batch index at its first position
    last: float  # batch index after its last position
    slack: float = 0.0  # batches by which a position between them may be read earlier or later


class Schedule:
    """The uses of shards by a range of slots, over all epochs.

    Args:
        config: of the run.
        data: its shard set or mix.
        slots: those of a node, or of a process.
    """

    def __init__(self, config: Config, data: Manifest | MixedSets, slots: Sequence[int]) -> None:
        self._config, self._slots = config, slots
        self._sets = [data] if isinstance(data, Manifest) else [one.manifest for one in data.sets]
        self.steps = steps_per_epoch(data.samples, config.train.global_batch)
        self._mixed = order_of(config, data) if isinstance(data, MixedSets) else None
        self._uses = lru_cache(3)(self._uses_of)
        self._times = lru_cache(3)(self._times_of)

    def uses(self, epoch: int) -> list[Use]:
        """Return the uses in one epoch, in the order in which they begin."""
        return self._uses(epoch)

    def next_use(self, shard: ShardId, batch_index: int) -> float:
        """Return the first batch from `batch_index` on that may read a shard, in this epoch or the next; else NEVER."""
        epoch = batch_index // self.steps
        for when in (epoch, epoch + 1):
            for first, last in self._times(when).get(shard, ()):
                if last >= batch_index:
                    return max(first, batch_index)
        return NEVER

    def peak_bytes(self, sizes: "Sequence[NDArray[np.int64]]", once: bool, epoch: int = 0) -> int:
        """Return the most bytes of shards that are needed at one time in an epoch.

        Args:
            sizes: for every set, the bytes of each of its shards; 0 for those that do not count.
            once: count a shard from its first use to its last, so that none is fetched twice; otherwise during its uses.
        """
        spans: list[tuple[int, int, int]] = []  # first, last, bytes
        for shard, times in self._times(epoch).items():
            merged = [(times[0][0], max(last for _, last in times))] if once else _merged(times)
            spans += [(first, last, int(sizes[shard[0]][shard[1]])) for first, last in merged]
        changes = sorted([(first, size) for first, _, size in spans] + [(last + 1, -size) for _, last, size in spans])
        most = held = 0
        for _, change in changes:
            held += change
            most = max(most, held)
        return most

    def _times_of(self, epoch: int) -> dict[ShardId, list[tuple[int, int]]]:
        times: dict[ShardId, list[tuple[int, int]]] = defaultdict(list)
        for use in self.uses(epoch):
            for shard in use.shards:
                times[shard].append((use.first, use.last))
        return times

    def _uses_of(self, epoch: int) -> list[Use]:
        found = [use for slot in self._slots for stretch in self._stretches(epoch, slot) for use in _uses(stretch)]
        return sorted(found, key=lambda use: use.first)

    def _stretches(self, epoch: int, slot: int) -> Iterator[Stretch]:
        first = epoch * self.steps
        if self._mixed is not None:
            for number in range(len(self._sets)):
                yield from self._mixed_stretches(self._mixed, epoch, slot, number)
            return
        c = self._config
        order = _order(c.seed, epoch, self._sets[0], c.train.global_batch, c.slots, c.data.shuffle_window)
        start, stop = order.position(0, slot, 0), order.position(self.steps, slot, 0)
        yield Stretch(0, order, range(start, stop), first, first + self.steps)

    def _mixed_stretches(self, mixed: MixedOrder, epoch: int, slot: int, number: int) -> Iterator[Stretch]:
        samples, draws = self._sets[number].samples, mixed.draws(epoch, slot, number)
        for set_epoch in range(draws.start // samples, -(-draws.stop // samples)) if draws else ():
            part = range(max(draws.start, set_epoch * samples), min(draws.stop, (set_epoch + 1) * samples))
            rate, begin = self.steps / len(draws), epoch * self.steps
            positions = range(part.start - set_epoch * samples, part.stop - set_epoch * samples)
            first, last = ((at - draws.start) * rate + begin for at in (part.start, part.stop))
            yield Stretch(number, mixed.order(number, set_epoch), positions, first, last, 1 + 2 * rate)


@lru_cache(4)
def _order(seed: int, epoch: int, manifest: Manifest, global_batch: int, slots: int, window: int) -> Order:
    return Order(seed, epoch, manifest.shards.samples, global_batch, slots, window)


def _uses(stretch: Stretch) -> Iterator[Use]:
    positions, length = stretch.positions, stretch.last - stretch.first
    for window, part in stretch.order.windows(positions):
        first, last = (
            stretch.first + (at - positions.start) * length / len(positions) for at in (part.start, part.stop - 1)
        )
        shards = tuple((stretch.set, shard) for shard in stretch.order.shards_of_window(window))
        yield Use(max(int(first - stretch.slack), 0), int(last + stretch.slack), shards)


def _merged(times: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return intervals, each SLACK wider on both sides, joined where they overlap."""
    merged: list[tuple[int, int]] = []
    for first, last in sorted(times):
        first, last = first - SLACK, last + SLACK
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    return merged
