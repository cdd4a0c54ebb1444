"""Samples of shards by number: `pread` through the index, so that any sample costs one small read and no scan."""

import os
from collections import OrderedDict

from esvit_scale.data.decode import BadImage
from esvit_scale.data.manifest import MAX_MEMBER, Entry, Index, Manifest, image_member, parse_label, read_index

OPEN_FILES = 32
INDEX_BYTES = 64 << 20


class ShardReader:
    """Reads a set's samples with at most OPEN_FILES files open and about INDEX_BYTES of indexes in memory. Make one
    per process: its files are opened on first use."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._files: OrderedDict[int, tuple[int, int]] = OrderedDict()  # shard → (file descriptor, size)
        self._indexes: OrderedDict[int, Index] = OrderedDict()
        self._index_bytes = 0

    def entry(self, shard: int, i: int) -> Entry:
        """Raises BadImage (no such sample, index line corrupt) or OSError (missing file, mount gone)."""
        try:
            return self._index(shard)[i]
        except IndexError:
            raise BadImage(f"sample {i} is not in the shard (truncated?)") from None
        except (ValueError, TypeError):
            raise BadImage(f"the index line of sample {i} is corrupt") from None

    def image(self, shard: int, entry: Entry) -> bytes:
        """The bytes of the sample's image file. Raises BadImage or OSError."""
        place = image_member(entry)
        if place is None:
            raise BadImage(f"no image among its members ({', '.join(entry.members) or 'none'})")
        return self._pread(shard, *place)

    def label(self, shard: int, entry: Entry) -> int:
        """The sample's class, -1 without one. Raises BadImage or OSError."""
        return parse_label(self._pread(shard, *entry.members["cls"])) if "cls" in entry.members else -1

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1][0])

    def _pread(self, shard: int, offset: int, size: int) -> bytes:
        handle, length = self._file(shard)
        if size > MAX_MEMBER or offset + size > length:
            raise BadImage("lies beyond the end of the shard (truncated)")
        data = os.pread(handle, size, offset)
        if len(data) != size:
            raise BadImage(f"{len(data)} of {size} bytes could be read")
        return data

    def _file(self, shard: int) -> tuple[int, int]:
        found = self._files.get(shard)
        if found is None:
            while len(self._files) >= OPEN_FILES:
                os.close(self._files.popitem(last=False)[1][0])
            handle = os.open(self._manifest.root / self._manifest.shards[shard].name, os.O_RDONLY | os.O_CLOEXEC)
            found = self._files[shard] = (handle, os.fstat(handle).st_size)
        else:
            self._files.move_to_end(shard)
        return found

    def _index(self, shard: int) -> Index:
        found = self._indexes.get(shard)
        if found is None:
            found = self._indexes[shard] = read_index(self._manifest.root / self._manifest.shards[shard].name)
            self._index_bytes += found.nbytes
            while self._index_bytes > INDEX_BYTES and len(self._indexes) > 1:
                self._index_bytes -= self._indexes.popitem(last=False)[1].nbytes
        else:
            self._indexes.move_to_end(shard)
        return found
