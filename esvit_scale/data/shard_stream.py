"""Samples of one indexed shard set in the order of order.py, or of several mixed sets in the order of mix.py.

Samples are read by their number, so that starting at any batch costs nothing.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from esvit_scale.data import signals
from esvit_scale.data.bad_image import BadImage
from esvit_scale.data.loader import LoaderAssignment, NoValidSamples, reason
from esvit_scale.data.manifest import Manifest
from esvit_scale.data.mix import MixedSets, order_of
from esvit_scale.data.order import Order, SampleAddress
from esvit_scale.data.reader import ShardReader, StorageGone
from esvit_scale.data.remote.ahead import ReadAhead
from esvit_scale.data.remote.range_ahead import RangeAhead
from esvit_scale.data.remote.range_reader import RangeReader
from esvit_scale.data.worker_batch import SLOW_SECONDS, DecodedSample, decode_for_crops, decode_modalities, member_rows
from esvit_scale.errors import is_machine_fault

FIRST_BATCHES = 2  # whose shards are fetched before those that come later
SUBSTITUTES = 16  # samples tried in turn in place of a bad one before the run stops


@dataclass(frozen=True)
class ShardSamples:
    """The samples that the calling loader process contributes to the batches of an assignment, in order."""

    assignment: LoaderAssignment
    source: Manifest | MixedSets
    ring: int | None = (
        None  # bytes of the process's ring, where samples of remote sets are read by ranges; None: whole shards
    )

    def __call__(self) -> Iterator[DecodedSample]:
        """Yield the decoded samples, batch by batch, in the order of their places in the batch.

        Raises:
            NoValidSamples: a sample and all its substitutes are bad.
            StorageGone: the storage does not answer.
        """
        address_of = self._addresses()
        if isinstance(self.source, Manifest):
            sets = [("", self.source)]
        else:
            sets = [(f"{one.name}/", one.manifest) for one in self.source.sets]
        with self._read_ahead([manifest for _, manifest in sets]) as (ahead, ranges):
            caches = ahead.caches if ahead else [None] * len(sets)
            readers: list[ShardReader | RangeReader] = [
                RangeReader(m, n, cache, ranges)
                if ranges and cache and cache.by_ranges
                else ShardReader(m, len(sets), cache)
                for n, ((_, m), cache) in enumerate(zip(sets, caches, strict=True))
            ]
            for batch_index, images in self.assignment.parts_of_worker():
                if ranges:
                    ranges.at(batch_index)
                for reader, gone in zip(readers, ahead.at(batch_index) if ahead else (), strict=False):
                    reader.close_shards(gone)
                for image in images:
                    address = address_of(batch_index, *divmod(image, self.assignment.images_per_slot))
                    prefix, _ = sets[address.set]
                    yield self._read_good(readers[address.set], prefix, address, batch_index, image)

    @contextmanager
    def _read_ahead(self, sets: list[Manifest]) -> Iterator[tuple[ReadAhead | None, RangeAhead | None]]:
        """Yield what fetches the shards of remote sets ahead of need, beginning with the first batches', and what fetches
        their samples where these are read by ranges; None for what is not needed.
        """
        if not any(manifest.remote for manifest in sets):
            yield None, None
            return
        assignment = self.assignment
        first = range(assignment.start, min(assignment.start + FIRST_BATCHES, assignment.stop))
        samples_of = self._samples_of(self._addresses())
        wanted = [(number, shard) for batch_index in first for number, shard, _ in samples_of(batch_index)]
        ahead, ranges = ReadAhead(assignment, self.source, wanted, by_ranges=self.ring is not None), None
        try:
            if self.ring is not None and any(cache and cache.by_ranges for cache in ahead.caches):
                # In another thread, hence with addresses of its own: they cache what they computed last.
                ranges = RangeAhead(assignment, self._samples_of(self._addresses()), ahead.caches, self.ring)
            yield ahead, ranges
        finally:
            if ranges:
                ranges.stop()
            ahead.close()
            if ranges:
                ranges.close()

    def _samples_of(
        self, address_of: Callable[[int, int, int], SampleAddress]
    ) -> Callable[[int], list[tuple[int, int, int]]]:
        """Return a function: batch index → (set, shard, number in the shard) of the calling process's samples, in order."""
        per_slot, images_of = self.assignment.images_per_slot, self.assignment.images_of_worker

        def samples(batch_index: int) -> list[tuple[int, int, int]]:
            found = (address_of(batch_index, *divmod(image, per_slot)) for image in images_of(batch_index))
            return [(address.set, *address.order.locate(address.position)) for address in found]

        return samples

    def _addresses(self) -> Callable[[int, int, int], SampleAddress]:
        """Return a function (batch index, slot, image of the slot) → address, which only one thread may call."""
        c, steps = self.assignment.config, self.assignment.steps_per_epoch
        if isinstance(self.source, MixedSets):
            return order_of(c, self.source).address
        counts = self.source.shards.samples
        orders: dict[int, Order] = {}

        def address_of(batch_index: int, slot: int, i: int) -> SampleAddress:
            epoch, step = divmod(batch_index, steps)
            if epoch not in orders:
                orders.clear()
                orders[epoch] = Order(c.seed, epoch, counts, c.train.global_batch, c.slots, c.data.shuffle_window)
            return SampleAddress(0, epoch, orders[epoch].position(step, slot, i), orders[epoch])

        return address_of

    def _read_good(
        self,
        reader: ShardReader | RangeReader,
        prefix: str,
        address: SampleAddress,
        batch_index: int,
        batch_position: int,
    ) -> DecodedSample:
        """Read and decode the sample at an address, or, if it is bad, its first good substitute from the same set."""
        config, manifest, order = self.assignment.config, reader.manifest, address.order
        bad: list[dict[str, Any]] = []
        position, faults = address.position, 0
        for attempt in range(SUBSTITUTES + 1):
            shard, i = order.locate(position)
            key, began = f"#{i}", time.monotonic() - reader.waited_s
            where = {"shard": prefix + manifest.shards[shard].name, "epoch": address.epoch, "position": position}
            try:
                entry = reader.entry(shard, i)
                key = entry.key
                if signals.wanted(config.data):
                    read = partial(reader.member, shard, entry)
                    members = list(entry.members)
                    image, views, problems = decode_modalities(config, address.epoch, key, members, read)
                    bad += member_rows({**where, "key": key}, problems)
                    sample = DecodedSample(batch_position, key, reader.label(shard, entry), *image, bad, views)
                else:
                    decoded = decode_for_crops(config, address.epoch, key, reader.image(shard, entry))
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
