"""Samples of one indexed shard set in the order of order.py, or of several mixed sets in the order of mix.py.

Samples are read by their number, so that starting at any batch costs nothing.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

from esvit_scale.data.bad_image import BadImage
from esvit_scale.data.loader import LoaderAssignment, NoValidSamples, reason
from esvit_scale.data.manifest import Manifest
from esvit_scale.data.mix import MixedSets, order_of
from esvit_scale.data.order import Order, SampleAddress
from esvit_scale.data.reader import ShardReader, StorageGone
from esvit_scale.data.remote.ahead import ReadAhead
from esvit_scale.data.worker_batch import SLOW_SECONDS, DecodedSample, decode_for_crops
from esvit_scale.errors import is_machine_fault

FIRST_BATCHES = 2  # whose shards are fetched before those that come later
SUBSTITUTES = 16  # samples tried in turn in place of a bad one before the run stops


@dataclass(frozen=True)
class ShardSamples:
    """The samples that the calling loader process contributes to the batches of an assignment, in order."""

    assignment: LoaderAssignment
    source: Manifest | MixedSets

    def __call__(self) -> Iterator[DecodedSample]:
        """Yield the decoded samples, batch by batch and slot by slot.

        Raises:
            NoValidSamples: a sample and all its substitutes are bad.
            StorageGone: the storage does not answer.
        """
        if isinstance(self.source, Manifest):
            sets, address_of = [("", self.source)], self._addresses(self.source)
        else:
            sets = [(f"{one.name}/", one.manifest) for one in self.source.sets]
            address_of = order_of(self.assignment.config, self.source).address
        slots, images = self.assignment.slots_of_worker(), self.assignment.images_per_slot
        with self._read_ahead(address_of, [manifest for _, manifest in sets]) as ahead:
            caches = ahead.caches if ahead else [None] * len(sets)
            readers = [ShardReader(m, len(sets), cache) for (_, m), cache in zip(sets, caches, strict=True)]
            for batch_index in range(self.assignment.start, self.assignment.stop):
                for reader, gone in zip(readers, ahead.at(batch_index) if ahead else (), strict=False):
                    reader.close_shards(gone)
                for slot in slots:
                    for i in range(images):
                        address = address_of(batch_index, slot, i)
                        prefix, _ = sets[address.set]
                        yield self._read_good(readers[address.set], prefix, address, batch_index, slot * images + i)

    @contextmanager
    def _read_ahead(
        self, address_of: Callable[[int, int, int], SampleAddress], sets: list[Manifest]
    ) -> Iterator[ReadAhead | None]:
        """Yield what fetches the shards of remote sets ahead of need, beginning with the first batches'; None for local sets."""
        if not any(manifest.remote for manifest in sets):
            yield None
            return
        assignment = self.assignment
        first = range(assignment.start, min(assignment.start + FIRST_BATCHES, assignment.stop))
        wanted = []
        for batch_index, slot in product(first, assignment.slots_of_worker()):
            for i in range(assignment.images_per_slot):
                address = address_of(batch_index, slot, i)
                wanted.append((address.set, address.order.locate(address.position)[0]))
        ahead = ReadAhead(assignment, self.source, wanted)
        try:
            yield ahead
        finally:
            ahead.close()

    def _addresses(self, manifest: Manifest) -> Callable[[int, int, int], SampleAddress]:
        """Return a function (batch index, slot, image of the slot) → address in a single set; it caches one order."""
        c, steps = self.assignment.config, self.assignment.steps_per_epoch
        counts = [shard.samples for shard in manifest.shards]
        orders: dict[int, Order] = {}

        def address_of(batch_index: int, slot: int, i: int) -> SampleAddress:
            epoch, step = divmod(batch_index, steps)
            if epoch not in orders:
                orders.clear()
                orders[epoch] = Order(c.seed, epoch, counts, c.train.global_batch, c.slots, c.data.shuffle_window)
            return SampleAddress(0, epoch, orders[epoch].position(step, slot, i), orders[epoch])

        return address_of

    def _read_good(
        self, reader: ShardReader, prefix: str, address: SampleAddress, batch_index: int, batch_position: int
    ) -> DecodedSample:
        """Read and decode the sample at an address, or, if it is bad, its first good substitute from the same set."""
        manifest, order = reader.manifest, address.order
        bad: list[dict[str, Any]] = []
        position, faults = address.position, 0
        for attempt in range(SUBSTITUTES + 1):
            shard, i = order.locate(position)
            key, began = f"#{i}", time.monotonic() - reader.waited_s
            where = {"shard": prefix + manifest.shards[shard].name, "epoch": address.epoch, "position": position}
            try:
                entry = reader.entry(shard, i)
                key = entry.key
                decoded = decode_for_crops(self.assignment.config, address.epoch, key, reader.image(shard, entry))
                sample = DecodedSample(batch_position, key, reader.label(shard, entry), *decoded, bad)
            except (BadImage, OSError) as error:
                stand_in = {"stand_in": True} if attempt else {}  # was tried in place of another bad sample
                bad.append({**where, "key": key, "reason": reason(error), **stand_in})
                faults += is_machine_fault(error)
            else:
                # Waiting for a store is no fault of the sample.
                if (took := time.monotonic() - reader.waited_s - began) > SLOW_SECONDS:
                    bad.append({**where, "key": key, "reason": f"slow: {took:.0f} s to read and decode", "used": True})
                return sample
            position = order.substitute(address.position, attempt)
        if faults == len(bad):
            raise StorageGone(f"{manifest.root}: {faults} reads in a row failed ({bad[-1]['reason']})")
        raise NoValidSamples(
            f"{manifest.root}: {len(bad)} of {len(bad)} samples tried for one place of batch {batch_index} "
            f"failed (last: {bad[-1]['shard']}: {bad[-1]['key']}: {bad[-1]['reason']}); check the set with "
            "`esvit-scale shards verify`"
        )
