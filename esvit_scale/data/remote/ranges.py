"""Ranges of a remote shard: which members of the tar are fetched with one request, and the check of what comes."""

import logging
import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from esvit_scale.data import checksums
from esvit_scale.data.manifest import Entry, image_member
from esvit_scale.data.remote import shard_cache
from esvit_scale.data.remote.shard_cache import LISTED, REPLACED, ShardCache
from esvit_scale.data.remote.store import Denied, Missing
from esvit_scale.data.tar_names import MAX_MEMBER
from esvit_scale.errors import UserError

log = logging.getLogger("esvit_scale")

GAP = 64 << 10  # bytes between two neighbours that are fetched with them: headers, padding, captions
MOST_BYTES = 8 << 20  # of a range of several members


class Member(NamedTuple):
    """The bytes of a tar's member that a batch needs."""

    sample: int  # its number in the tar
    start: int
    stop: int
    checksum: int
    turn: int  # place in the order of need


def coalesce(members: Iterable[Member]) -> list[list[Member]]:
    """Group the members of one tar into ranges.

    Members share a range if they belong to the same sample or to neighbours, with no more than GAP bytes between them: then
    no other sample's image lies in between, so that no byte belongs to two ranges.
    """
    groups: list[list[Member]] = []
    for member in sorted(set(members), key=lambda m: (m.start, m.stop)):
        last = groups[-1][-1] if groups else None
        if (
            last is not None
            and member.sample - last.sample in (0, 1)
            and member.start - last.stop <= GAP
            and member.stop - groups[-1][0].start <= MOST_BYTES
        ):
            groups[-1].append(member)
        else:
            groups.append([member])
    return groups


def read_verified(cache: ShardCache, shard: int, members: Sequence[Member], urgent: bool) -> bytes:
    """Return the bytes from the first member to the end of the last, each member compared with its checksum.

    Raises:
        UserError: the object is missing or other than the index says, or the server sends whole objects only.
        StoreUnreachable: the store does not answer.
    """
    start, stop = min(m.start for m in members), max(m.stop for m in members)
    name, problem = cache.manifest.shards[shard].name, ""
    for attempt in range(shard_cache.CHANGED_ATTEMPTS):
        try:
            data = cache.store().read(name, start=start, stop=stop, urgent=urgent)
        except (Missing, Denied) as error:
            raise UserError(f"{error}; {LISTED}") from None
        if len(data) == cache.manifest.shards[shard].bytes > stop - start:
            raise UserError(
                f"{cache.address(shard)}: the server ignores ranges and sends the whole object; give data.cache_gb room for "
                "the shards (`doctor --data` prints it), or use another server"
            )
        if len(data) != stop - start:
            problem = f"{len(data)} bytes came of {stop - start}"
        elif any(checksums.crc(memoryview(data)[m.start - start : m.stop - start]) != m.checksum for m in members):
            problem = f"bytes {start}-{stop - 1} differ from their checksums"
        else:
            return data
        log.warning("%s: %s (attempt %d)", cache.address(shard), problem, attempt + 1)
        time.sleep(shard_cache.CHANGED_DELAY_S * attempt)
    raise UserError(f"{cache.address(shard)}: {problem}: {REPLACED}")


def members_of(entry: Entry, sample: int, turn: int = 0, among: Iterable[str] = ()) -> list[Member]:
    """Return what training reads of a sample: its image, its label, and the members of the extensions in `among`.

    Members that the sample lacks, and empty ones, are left out.
    """
    places = [image_member(entry), *(entry.members.get(extension) for extension in ("cls", *among))]
    wanted = [place for place in dict.fromkeys(places) if place is not None and 0 < place[1] <= MAX_MEMBER]
    found = {entry.members[ext]: crc for ext, crc in entry.checksums.items()}
    return [Member(sample, at, at + size, found[at, size], turn) for at, size in wanted if (at, size) in found]
