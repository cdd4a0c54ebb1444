"""Samples of an indexed shard set in the order of order.py, or of several in that of mix.py: starting at any batch costs
nothing."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from esvit_scale.data.decode import BadImage
from esvit_scale.data.job import Job
from esvit_scale.data.loader import OnlyBad, reason
from esvit_scale.data.manifest import Manifest
from esvit_scale.data.mix import Draw, MixedSets, order_of
from esvit_scale.data.order import Order
from esvit_scale.data.reader import ShardReader, StorageGone
from esvit_scale.data.views import SLOW_S, Sample, decode_for_views
from esvit_scale.errors import is_machine_fault

SUBSTITUTES = 16  # tried in turn for one bad sample before the run stops


class _Place(NamedTuple):
    batch_index: int
    batch_position: int  # in the global batch
    set: int  # 0, unless sets are mixed
    epoch: int  # of the set
    order: Order
    position: int  # in the order


@dataclass(frozen=True)
class ShardSamples:
    """This worker's samples of the batches of a job, in order."""

    job: Job
    source: Manifest | MixedSets

    def __call__(self) -> Iterator[Sample]:
        if isinstance(self.source, Manifest):
            sets, places = [("", self.source)], self._places(self._in_order())
        else:
            sets = [(f"{one.name}/", one.manifest) for one in self.source.sets]
            places = self._places(order_of(self.job.config, self.source).draw)
        readers = [ShardReader(manifest, len(sets)) for _, manifest in sets]
        for place in places:
            prefix, manifest = sets[place.set]
            yield self._read_good(readers[place.set], manifest, prefix, place)

    def _places(self, draw: Callable[[int, int, int], Draw]) -> Iterator[_Place]:
        job = self.job
        slots, per_slot = job.slots_of_worker(), job.per_slot
        for batch_index in range(job.start, job.stop):
            for slot in slots:
                for i in range(per_slot):
                    number, epoch, position, order = draw(batch_index, slot, i)
                    yield _Place(batch_index, slot * per_slot + i, number, epoch, order, position)

    def _in_order(self) -> Callable[[int, int, int], Draw]:
        """Draws from the only set, an epoch of the job at a time."""
        assert isinstance(self.source, Manifest)
        c, steps, counts = self.job.config, self.job.steps, [shard.samples for shard in self.source.shards]
        orders: dict[int, Order] = {}

        def draw(batch_index: int, slot: int, i: int) -> Draw:
            epoch, step = divmod(batch_index, steps)
            if epoch not in orders:
                orders.clear()
                orders[epoch] = Order(c.seed, epoch, counts, c.train.global_batch, c.slots, c.data.shuffle_window)
            return Draw(0, epoch, orders[epoch].position(step, slot, i), orders[epoch])

        return draw

    def _read_good(self, reader: ShardReader, manifest: Manifest, prefix: str, place: _Place) -> Sample:
        """The sample of a place, or the first good one among its substitutes, which are of the same set."""
        bad: list[dict[str, Any]] = []
        position, faults = place.position, 0
        for attempt in range(SUBSTITUTES + 1):
            shard, i = place.order.locate(position)
            key, began = f"#{i}", time.monotonic()
            where = {"shard": prefix + manifest.shards[shard].name, "epoch": place.epoch, "position": position}
            try:
                entry = reader.entry(shard, i)
                key = entry.key
                views, scales, levels = decode_for_views(self.job.config, place.epoch, key, reader.image(shard, entry))
                sample = Sample(place.batch_position, key, reader.label(shard, entry), views, scales, levels, bad)
            except (BadImage, OSError) as error:
                stand_in = {"stand_in": True} if attempt else {}  # tried in the place of one that was bad itself
                bad.append({**where, "key": key, "reason": reason(error), **stand_in})
                faults += is_machine_fault(error)
            else:
                if (took := time.monotonic() - began) > SLOW_S:
                    bad.append({**where, "key": key, "reason": f"slow: {took:.0f} s to read and decode", "used": True})
                return sample
            position = place.order.substitute(place.position, attempt)
        if faults == len(bad):
            raise StorageGone(f"{manifest.root}: {faults} reads in a row failed ({bad[-1]['reason']})")
        raise OnlyBad(
            f"{manifest.root}: {len(bad)} of {len(bad)} samples tried for one place of batch {place.batch_index} "
            f"failed (last: {bad[-1]['shard']}: {bad[-1]['key']}: {bad[-1]['reason']}); check the set with "
            "`esvit-scale shards verify`"
        )
