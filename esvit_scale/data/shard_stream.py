"""Samples of an indexed shard set in the order of order.py: starting at any batch costs nothing."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from esvit_scale.data.decode import BadImage
from esvit_scale.data.job import Job
from esvit_scale.data.loader import OnlyBad, reason
from esvit_scale.data.manifest import Manifest
from esvit_scale.data.order import Order
from esvit_scale.data.reader import ShardReader
from esvit_scale.data.views import SLOW_S, Sample, decode_for_views

SUBSTITUTES = 16  # tried in turn for one bad sample before the run stops


class _Place(NamedTuple):
    batch_index: int
    epoch: int
    order: Order
    position: int  # in the epoch's order
    batch_position: int  # in the global batch


@dataclass(frozen=True)
class ShardSamples:
    """This worker's samples of the batches of a job, in order."""

    job: Job
    manifest: Manifest

    def __call__(self) -> Iterator[Sample]:
        reader = ShardReader(self.manifest)
        for place in self._places():
            yield self._read_good(reader, place)

    def _places(self) -> Iterator[_Place]:
        job, epoch, order = self.job, -1, None
        slots, per_slot = job.slots_of_worker(), job.per_slot
        for batch_index in range(job.start, job.stop):
            if order is None or batch_index // job.steps != epoch:
                epoch = batch_index // job.steps
                order = self._order(epoch)
            for slot in slots:
                for i in range(per_slot):
                    position = order.position(batch_index % job.steps, slot, i)
                    yield _Place(batch_index, epoch, order, position, slot * per_slot + i)

    def _order(self, epoch: int) -> Order:
        c = self.job.config
        counts = [shard.samples for shard in self.manifest.shards]
        return Order(c.seed, epoch, counts, c.train.global_batch, c.slots, c.data.shuffle_window)

    def _read_good(self, reader: ShardReader, place: _Place) -> Sample:
        """The sample of a place, or the first good one among its substitutes."""
        bad: list[dict[str, Any]] = []
        position = place.position
        for attempt in range(SUBSTITUTES + 1):
            shard, i = place.order.locate(position)
            key, began = f"#{i}", time.monotonic()
            where = {"shard": self.manifest.shards[shard].name, "epoch": place.epoch, "position": position}
            try:
                entry = reader.entry(shard, i)
                key = entry.key
                views, scales, levels = decode_for_views(self.job.config, place.epoch, key, reader.image(shard, entry))
                sample = Sample(place.batch_position, key, reader.label(shard, entry), views, scales, levels, bad)
            except (BadImage, OSError) as error:
                bad.append({**where, "key": key, "reason": reason(error)})
            else:
                if (took := time.monotonic() - began) > SLOW_S:
                    bad.append({**where, "key": key, "reason": f"slow: {took:.0f} s to read and decode", "used": True})
                return sample
            position = place.order.substitute(place.position, attempt)
        raise OnlyBad(
            f"{self.manifest.root}: {len(bad)} of {len(bad)} samples tried for one place of batch {place.batch_index} "
            f"failed (last: {bad[-1]['shard']}: {bad[-1]['key']}: {bad[-1]['reason']}); check the set with "
            "`esvit-scale shards verify`"
        )
