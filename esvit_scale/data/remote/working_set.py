"""The room that a run needs in the shard cache of a node, known before the run from the manifest and the config."""

import math
import shutil
from typing import NamedTuple

from esvit_scale import store_urls
from esvit_scale.config import Config
from esvit_scale.data.loader import LoaderAssignment
from esvit_scale.data.manifest import Manifest
from esvit_scale.data.mix import MixedSets
from esvit_scale.data.order import steps_per_epoch
from esvit_scale.data.remote.ahead import node_slots, ranks_per_node
from esvit_scale.data.remote.place import cache_folder, open_set
from esvit_scale.data.remote.room import DEFAULT_SHARE, Room, cost
from esvit_scale.data.remote.schedule import Schedule
from esvit_scale.data.remote.shard_cache import LAST_SHARDS
from esvit_scale.errors import UserError

SPARE_SHARDS = 2  # shards that a loader process may hold for substitutes of bad samples, beside those of its slots
MARGIN = 1.05  # factor on the bytes that the schedule needs at a time


class WorkingSet(NamedTuple):
    """Bytes of the remote shards of a run, of the node that needs most."""

    slots: int  # data slots of a node
    least: int  # below this the run cannot work
    once: int  # with this no shard is fetched twice in an epoch
    all: int  # of all shards
    fetched: int  # in an epoch, with `once`
    shards_fetched: int


def check(config: Config, data: object, world_size: int) -> list[str]:
    """Check that the cache has room for the remote shards that the run needs at a time.

    Returns:
        The lines that a start prints about room and need; none for local data.

    Raises:
        UserError: data.cache_gb, or the disk without it, is too small; the message has the number that works.
    """
    if not isinstance(data, Manifest | MixedSets):
        return []
    manifests = [data] if isinstance(data, Manifest) else [one.manifest for one in data.sets]
    remote = [manifest for manifest in manifests if manifest.remote]
    if not remote:
        return []
    found = working_set(config, data, world_size)
    folder = cache_folder(config.data.cache_dir)
    limit = Room(folder, remote[0].remote.limit if remote[0].remote else None).limit
    given = "data.cache_gb" if config.data.cache_gb is not None else f"{folder}: {DEFAULT_SHARE:.0%} of its free space"
    if limit < found.least:
        raise UserError(
            f"{given}: {_gb(limit)} GB, but {found.slots} data slots on a node × data.shuffle_window="
            f"{config.data.shuffle_window} shards read from {_gb(found.least)} GB at a time: set data.cache_gb="
            f"{_gb(found.least)} or more ({_gb(found.once)}: no shard is fetched twice in an epoch), on a disk that has it "
            "(data.cache_dir), or use more nodes, a smaller data.shuffle_window or smaller shards"
        )
    free = shutil.disk_usage(folder).free + Room(folder, None).held()
    if limit > free:
        raise UserError(
            f"data.cache_gb: {_gb(limit)} GB, but {folder} has {_gb(free)} GB; set data.cache_gb={_gb(found.least)} to "
            f"{_gb(int(free * 0.95))}, or name a folder on a larger disk in data.cache_dir"
        )
    again = "" if limit >= found.once else f"; data.cache_gb={_gb(found.once)} would fetch no shard twice in an epoch"
    return [
        f"{'cache':<10} {folder}: at most {_gb(limit)} GB; {found.slots} slots on a node read from {_gb(found.least)} GB at a "
        f"time, and need {found.shards_fetched:,} shards ({_gb(found.fetched)} GB) of {_gb(found.all)} GB an epoch{again}"
    ]


def working_set(config: Config, data: Manifest | MixedSets, world_size: int) -> WorkingSet:
    """Return the room that the remote shards of a run need on the node that needs most, in its first epoch."""
    manifests = [data] if isinstance(data, Manifest) else [one.manifest for one in data.sets]
    steps, local = steps_per_epoch(data.samples, config.train.global_batch), ranks_per_node(world_size)
    everything = {(n, i): cost(shard) for n, m in enumerate(manifests) if m.remote for i, shard in enumerate(m.shards)}
    held_out = _held_out(config, local)
    spare = SPARE_SHARDS * local * max(config.data.workers, 1) * max(everything.values(), default=0)
    nodes = []
    for rank in range(0, world_size, local):
        slots = node_slots(LoaderAssignment(config, rank, world_size, 0, steps, steps))
        schedule = Schedule(config, data, slots)
        shards = {shard for use in schedule.uses(0) for shard in use.shards if shard in everything}
        least, once = (
            min(int(MARGIN * schedule.peak_bytes(everything, only)) + spare, sum(everything.values())) + held_out
            for only in (False, True)
        )
        fetched = sum(everything[shard] for shard in shards)
        nodes.append(WorkingSet(len(slots), least, once, sum(everything.values()), fetched, len(shards)))
    return max(nodes, key=lambda node: node.least)


def _held_out(config: Config, ranks: int) -> int:
    """Return the bytes of the shards that a node's ranks hold while they read the held-out images of train.knn_every."""
    place = config.data.held_out
    if not config.train.knn_every or not store_urls.is_set_url(place):
        return 0
    costs = sorted(map(cost, open_set(place, config.data).shards), reverse=True)
    return sum(costs[: LAST_SHARDS * ranks])


def _gb(size: int) -> str:
    """Return bytes in GB with three digits, rounded up, so that the number that is named works."""
    return f"{math.ceil(size / 1e6) / 1e3:.3f}".rstrip("0").rstrip(".")
