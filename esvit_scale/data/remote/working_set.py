"""The room that a run needs in the shard cache of a node, known before the run from the manifest and the config."""

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from esvit_scale import store_urls
from esvit_scale.config import Config
from esvit_scale.data.loader import LoaderAssignment
from esvit_scale.data.manifest import Manifest
from esvit_scale.data.mix import MixedSets
from esvit_scale.data.order import steps_per_epoch
from esvit_scale.data.remote.ahead import images_of_node, ranks_per_node
from esvit_scale.data.remote.place import GB, cache_folder, open_set
from esvit_scale.data.remote.ring import LEAST
from esvit_scale.data.remote.room import DEFAULT_SHARE, Room, costs, index_costs
from esvit_scale.data.remote.schedule import Schedule
from esvit_scale.data.remote.shard_cache import LAST_SHARDS
from esvit_scale.errors import UserError

# Shards held for substitutes of bad samples by a loader process, or by those that divide a slot together.
SPARE_SHARDS = 2
RING_BATCHES = 4  # average images of a process in a batch, at least one, for which its ring has room at least
INDEX_HINT = "`esvit-scale shards index SET` and an upload let it read single images by ranges"
MARGIN = 1.05  # factor on the bytes that the schedule needs at a time


class WorkingSet(NamedTuple):
    """Bytes of the remote shards of a run, of the node that needs most."""

    slots: int  # data slots of a node
    least: int  # bytes of the cache without which the run cannot read whole shards
    once: int  # with this no shard is fetched twice in an epoch
    all: int  # of all shards
    fetched: int  # in an epoch, with `once`
    shards_fetched: int
    least_by_ranges: int  # bytes without which the run cannot work at all; equal to `least` for sets without checksums
    fixed_by_ranges: int  # bytes of these that are in no ring: indexes, and shards of sets without checksums
    processes: int  # loader processes of a node
    images: int  # samples that its processes read in an epoch


class _Sizes:
    """The bytes of every shard of every set, 0 for those that do not count, with their sum and the largest."""

    def __init__(self, of_sets: Sequence[NDArray[np.int64]]) -> None:
        self.of_sets = of_sets
        self.total = sum(int(sizes.sum()) for sizes in of_sets)
        self.largest = max(int(sizes.max(initial=0)) for sizes in of_sets)


class _DataSizes:
    """What the working set of every node is computed from, since it takes a look at all shards."""

    def __init__(self, data: Manifest | MixedSets) -> None:
        self.manifests = [data] if isinstance(data, Manifest) else [one.manifest for one in data.sets]
        checked = [bool(m.remote) and m.has_checksums for m in self.manifests]
        self.any_checked = any(checked)
        self.whole = _Sizes([costs(m.shards) * bool(m.remote) for m in self.manifests])
        self.unchecked = _Sizes([s * (not by) for s, by in zip(self.whole.of_sets, checked, strict=True)])
        self.indexes = _Sizes([index_costs(m.shards) * by for m, by in zip(self.manifests, checked, strict=True)])
        samples = sum(m.samples for m, by in zip(self.manifests, checked, strict=True) if by)
        self.image = (self.whole.total - self.unchecked.total) / max(samples, 1)  # average of sets with checksums


def check(
    config: Config, data: object, world_size: int, nodes: "Sequence[WorkingSet | None] | None" = None
) -> list[str]:
    """Check that the cache has room for the remote shards that the run needs at a time, those of data.held_out included.

    Args:
        nodes: what `of_own_node` returned on every rank; None: computed here, for one node after the other.

    Returns:
        The lines that a start prints about room and need; none if all data is local.

    Raises:
        UserError: data.cache_gb, or the disk without it, is too small; the message has the number that works.
    """
    folder, room = cache_folder(config.data.cache_dir), _room(config, data)
    if room is None:
        return []
    limit = room.limit
    given = "data.cache_gb" if config.data.cache_gb is not None else f"{folder}: {DEFAULT_SHARE:.0%} of its free space"
    if not _remote(data):
        least = held_out_bytes(config, world_size)
        if limit < least:
            raise UserError(
                f"{given}: {_gb(limit)} GB, but the ranks of a node read from {_gb(least)} GB of data.held_out at a time: set "
                f"data.cache_gb={_gb(least)} or more, on a disk that has it (data.cache_dir)"
            )
        _disk(folder, limit, least)
        return [f"{'cache':<10} {folder}: at most {_gb(limit)} GB, for data.held_out"]
    assert isinstance(data, Manifest | MixedSets)
    known = [node for node in nodes or () if node is not None]
    found = max(known, key=lambda node: node.least) if known else working_set(config, data, world_size)
    if limit < found.least_by_ranges:
        by_ranges = f"; single images can be read by ranges from data.cache_gb={_gb(found.least_by_ranges)} on"
        raise UserError(
            f"{given}: {_gb(limit)} GB, but {found.slots} data slots on a node × data.shuffle_window="
            f"{config.data.shuffle_window} shards read from {_gb(found.least)} GB at a time: set data.cache_gb="
            f"{_gb(found.least)} or more ({_gb(found.once)}: no shard is fetched twice in an epoch), on a disk that has it "
            "(data.cache_dir), or use more nodes, a smaller data.shuffle_window or smaller shards"
            + (by_ranges if found.least_by_ranges < found.least else "; " + INDEX_HINT)
        )
    _disk(folder, limit, found.least_by_ranges)
    return [
        f"{'cache':<10} {folder}: at most {_gb(limit)} GB; {found.slots} slots on a node read from {_gb(found.least)} GB at a "
        f"time, and need {found.shards_fetched:,} shards ({_gb(found.fetched)} GB) of {_gb(found.all)} GB an epoch"
        + _advice(found, limit)
    ]


def _advice(found: WorkingSet, limit: int) -> str:
    """Return what a start adds about a cache that does not hold all that is needed."""
    if limit < found.least:
        return (
            f"; the limit is too small for whole shards, so single images are read by ranges, with up to {found.images:,} requests "
            f"an epoch; data.cache_gb={_gb(found.least)} would fetch whole shards"
        )
    return "" if limit >= found.once else f"; data.cache_gb={_gb(found.once)} would fetch no shard twice in an epoch"


def ring_bytes(config: Config, data: Manifest | MixedSets, rank: int, world_size: int) -> int | None:
    """Return the bytes in which each loader process of a rank's node keeps ranges; None where whole shards are fetched.

    Ranges are read where the cache has no room for the shards that the node's slots read from at a time.
    """
    room = _room(config, data) if any(manifest.has_checksums for manifest in _remote(data)) else None
    if room is None:
        return None
    limit, local = room.limit, ranks_per_node(world_size)
    found = _of_node(
        config, data, _DataSizes(data), rank // local * local, world_size, held_out_bytes(config, world_size)
    )
    if limit >= found.least:
        return None
    return max(limit - found.fixed_by_ranges, 0) // found.processes


def working_set(config: Config, data: Manifest | MixedSets, world_size: int) -> WorkingSet:
    """Return the room that the remote shards of a run need on the node that needs most, in its first epoch."""
    local = ranks_per_node(world_size)
    held_out, sizes = held_out_bytes(config, world_size), _DataSizes(data)
    ranks = range(0, world_size, local)
    return max(
        (_of_node(config, data, sizes, rank, world_size, held_out) for rank in ranks), key=lambda node: node.least
    )


def of_own_node(config: Config, data: object, rank: int, world_size: int, held_out: int) -> WorkingSet | None:
    """Return the working set of the node whose first rank is `rank`; None on its other ranks and for local data.

    All ranks of a large job compute theirs at the same time, because one after the other takes minutes. Nothing is asked
    of a store here: if that failed on one rank, the others would wait for it.

    Args:
        held_out: what `held_out_bytes` returned on rank 0.
    """
    if rank % ranks_per_node(world_size) or not _remote(data):
        return None
    assert isinstance(data, Manifest | MixedSets)
    return _of_node(config, data, _DataSizes(data), rank, world_size, held_out)


def _of_node(
    config: Config, data: Manifest | MixedSets, sizes: _DataSizes, rank: int, world_size: int, held_out: int
) -> WorkingSet:
    """Return the working set of the node whose first rank is `rank`."""
    steps, local = steps_per_epoch(data.samples, config.train.global_batch), ranks_per_node(world_size)
    assignment = LoaderAssignment(config, rank, world_size, 0, steps, steps)
    images = images_of_node(assignment)  # of a batch
    slots = assignment.slots_of(images)
    schedule = Schedule(config, data, slots)
    used = {shard for use in schedule.uses(0) for shard in use.shards if sizes.manifests[shard[0]].remote}
    processes = local * max(config.data.workers, 1)
    # Processes that divide a slot need no more substitutes in a batch together than one process would need.
    holders = local * max(min(config.data.workers, len(slots) // local), 1)

    def need(counted: _Sizes, once: bool) -> int:
        spare = SPARE_SHARDS * holders * counted.largest
        return min(int(MARGIN * schedule.peak_bytes(counted.of_sets, once)) + spare, counted.total)

    # By ranges: the indexes in the place of the shards, and a ring for each process.
    fixed = need(sizes.unchecked, False) + held_out + need(sizes.indexes, True)
    ring = max(int(RING_BATCHES * max(len(images) / processes, 1) * sizes.image), LEAST)
    least = need(sizes.whole, False) + held_out
    return WorkingSet(
        slots=len(slots),
        least=least,
        once=need(sizes.whole, True) + held_out,
        all=sizes.whole.total,
        fetched=sum(int(sizes.whole.of_sets[number][shard]) for number, shard in used),
        shards_fetched=len(used),
        least_by_ranges=min(fixed + processes * ring, least) if sizes.any_checked else least,
        fixed_by_ranges=fixed,
        processes=processes,
        images=steps * len(images),
    )


def _remote(data: object) -> list[Manifest]:
    """Return the remote shard sets of a run's data."""
    manifests = [one.manifest for one in data.sets] if isinstance(data, MixedSets) else [data]
    return [manifest for manifest in manifests if isinstance(manifest, Manifest) and manifest.remote]


def _room(config: Config, data: object) -> Room | None:
    """Return the room of the cache that a run uses on this node; None if it needs none."""
    if not _remote(data) and not (config.train.knn_every and store_urls.is_set_url(config.data.held_out)):
        return None
    limit = None if config.data.cache_gb is None else int(config.data.cache_gb * GB)
    return Room(cache_folder(config.data.cache_dir), limit)


def _disk(folder: Path, limit: int, least: int) -> None:
    """Raise UserError if the cache's disk has less than the limit."""
    free = shutil.disk_usage(folder).free + Room(folder, None).held()
    if limit > free:
        raise UserError(
            f"data.cache_gb: {_gb(limit)} GB, but {folder} has {_gb(free)} GB; set data.cache_gb={_gb(least)} to "
            f"{_gb(int(free * 0.95))}, or name a folder on a larger disk in data.cache_dir"
        )


def held_out_bytes(config: Config, world_size: int) -> int:
    """Return the bytes of the shards that a node's ranks hold while they read the held-out images of train.knn_every.

    Raises:
        UserError, StoreUnreachable: the set cannot be opened.
    """
    ranks, place = ranks_per_node(world_size), config.data.held_out
    if not config.train.knn_every or not store_urls.is_set_url(place):
        return 0
    return int(np.sort(costs(open_set(place, config.data).shards))[-LAST_SHARDS * ranks :].sum())


def _gb(size: int) -> str:
    """Return bytes in GB with three digits, rounded up, so that the number that is named works."""
    return f"{math.ceil(size / 1e6) / 1e3:.3f}".rstrip("0").rstrip(".")
