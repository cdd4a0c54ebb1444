"""The writer of one tar of a shard set and its index; the same samples give the same bytes."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import webdataset as wds

from esvit_scale import files
from esvit_scale.data import checksums
from esvit_scale.data import manifest as manifests
from esvit_scale.data.decode import EXTENSIONS
from esvit_scale.data.keys import SAFE_KEY
from esvit_scale.data.raster import ARRAY
from esvit_scale.data.shard_table import Shard
from esvit_scale.data.signal_members import IMAGE, MODALITIES, is_member, member_of
from esvit_scale.data.sources.base import EXTRAS


class Sample(NamedTuple):
    """A sample as it is written into a shard: an encoded image with its key and label, and further members.

    A sample that has sound, video or text may lack the image; its `data` and `ext` are then empty.
    """

    key: str  # unique in the set; letters, digits, `_`, `-`, and `/` between parts
    label: int | None  # class number
    ext: str  # extension of the image file: jpg, png, …
    data: bytes  # the image file
    extras: Mapping[str, bytes] = {}  # further members by extension: txt, json, those of signals.py


def write_shard(path: Path, samples: Iterable[Sample], keys: set[str]) -> Shard:
    """Write samples as the tar `path`, with its index, and return its row for the manifest.

    The tar appears under its name only when it is complete, after the index.

    Args:
        keys: the keys that are already in the set; the keys of this shard are added to it.

    Raises:
        ValueError: a key is repeated or not safe.
        OSError: the tar cannot be written, for example because the disk is full.
    """
    written = 0
    with files.replacing(path) as tmp:
        with tmp.open("wb") as file:
            hashed = _Hashed(file)
            with wds.TarWriter(hashed, encoder=False, mtime=0, user="", group="") as tar:
                for sample in samples:
                    tar.write(_members(sample, keys))
                    written += 1
        entries = checksums.scan(tmp)
        if len(entries) != written:
            raise RuntimeError(f"{path}: {written} samples written, {len(entries)} found")
        index = manifests.dump_index(path.name, entries)
        files.write_bytes(manifests.index_path(path), index)
    return Shard(path.name, written, hashed.bytes, hashed.sha256.hexdigest(), hashlib.sha256(index).hexdigest())


def _members(sample: Sample, keys: set[str]) -> dict[str, Any]:
    extras = {ext: data for ext, data in sample.extras.items() if ext in EXTRAS or is_member(ext)}
    known = sample.ext in (*EXTENSIONS, ARRAY) if sample.ext else bool(extras)
    if sample.key in keys or not SAFE_KEY.fullmatch(sample.key) or not known:
        raise ValueError(f"sample {sample.key!r}.{sample.ext}: the key is repeated or not safe, or no image's ending")
    keys.add(sample.key)
    members: dict[str, Any] = {"__key__": sample.key, **({sample.ext: sample.data} if sample.ext else {})}
    if sample.label is not None:
        members["cls"] = b"%d" % sample.label
    return members | extras


def counted(samples: Iterable[Sample], found: Counter[str]) -> Iterator[Sample]:
    """Yield the samples, and count in `found` how many have an image, audio, video and text."""
    for sample in samples:
        found[IMAGE] += bool(sample.ext)
        found.update(modality for modality in MODALITIES if member_of(sample.extras, modality))
        yield sample


class _Hashed:
    """A writable file that computes the sha256 and length of what is written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self.bytes = 0

    def write(self, data: bytes) -> int:
        """Write bytes to the file, add them to the hash and the length, and return how many the file took."""
        self.sha256.update(data)
        self.bytes += len(data)
        return self._file.write(data)
