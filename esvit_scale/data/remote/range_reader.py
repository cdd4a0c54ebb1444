"""Reader of single samples of a remote set, from the ranges that were fetched ahead or else from the store."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from esvit_scale.data import manifest as manifests
from esvit_scale.data.bad_image import BadImage
from esvit_scale.data.manifest import Entry, Manifest, image_member
from esvit_scale.data.remote.range_ahead import RangeAhead
from esvit_scale.data.remote.ranges import members_of, read_verified
from esvit_scale.data.remote.shard_cache import ShardCache
from esvit_scale.data.remote.store import StoreUnreachable
from esvit_scale.data.tar_names import MAX_MEMBER, parse_label


class RangeReader:
    """Reader of the samples of one set by ranges, in the place of ShardReader.

    Raises (every method):
        BadImage: the sample is damaged or missing.
        UserError: an object is missing, or not what the manifest says.
        StoreUnreachable: the store does not answer, or the cache's disk is full or broken.
    """

    def __init__(self, manifest: Manifest, number: int, cache: ShardCache, ahead: RangeAhead) -> None:
        self.manifest, self._number, self._cache, self._ahead = manifest, number, cache, ahead
        self.waited_s = 0.0  # seconds of waiting for the store so far

    def entry(self, shard: int, i: int) -> Entry:
        """Return the index entry of sample `i` of a shard."""
        try:
            with self._waiting():
                if (found := self._ahead.entry((self._number, shard, i))) is not None:
                    return found
                path = self._cache.path(shard)
                return manifests.parse_index(path.read_bytes(), self.manifest.shards[shard].name)[i]
        except IndexError:
            raise BadImage(f"sample {i} is not in the shard") from None
        except (ValueError, TypeError):
            raise BadImage(f"the index line of sample {i} is corrupt") from None

    def image(self, shard: int, entry: Entry) -> bytes:
        """Return the bytes of the sample's image file."""
        place = image_member(entry)
        if place is None:
            raise BadImage(f"no image among its members ({', '.join(entry.members) or 'none'})")
        if place[1] > MAX_MEMBER:
            raise BadImage("is larger than an image may be")
        return self._bytes(shard, entry, *place)

    def member(self, shard: int, entry: Entry, extension: str) -> bytes:
        """Return the bytes of the sample's member of an extension."""
        place = entry.members[extension]
        if place[1] > MAX_MEMBER:
            raise BadImage("is larger than a member may be")
        return self._bytes(shard, entry, *place)

    def label(self, shard: int, entry: Entry) -> int:
        """Return the sample's class number, -1 without one."""
        return parse_label(self._bytes(shard, entry, *entry.members["cls"])) if "cls" in entry.members else -1

    def close_shards(self, shards: Iterable[int]) -> None:
        """Do nothing: no file of a shard is open."""

    def _bytes(self, shard: int, entry: Entry, start: int, size: int) -> bytes:
        if not size:
            return b""
        with self._waiting():
            found = self._ahead.bytes_at((self._number, shard, start), size)
            if found is not None and len(found) == size:
                return found
            wanted = [
                m for m in members_of(entry, 0, among=entry.members) if (m.start, m.stop) == (start, start + size)
            ]
            if not wanted:
                raise BadImage("its index has no checksum of it")
            return read_verified(self._cache, shard, wanted, urgent=True)

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """Count the time of the block as waiting, and take an OSError for one of the cache's disk."""
        began = time.monotonic()
        try:
            yield
        except OSError as error:
            raise StoreUnreachable(
                f"{self._cache.folder}: {error.strerror or error}; the cache's disk is broken"
            ) from None
        finally:
            self.waited_s += time.monotonic() - began
