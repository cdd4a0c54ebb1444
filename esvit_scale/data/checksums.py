"""Checksums of the single members of a tar, with which a sample that is read by itself can be verified.

They are CRC-32, 4 bytes for each member. Beside the manifest's sha256 of a whole shard, a range needs a check against
what goes wrong on the way: cut, mixed or flipped bytes, or an object that was replaced. CRC-32 finds every error within 32
consecutive bits and all but 1 of 4 billion others, at over 1 GB/s. It does not stop forgers, and neither does the
sha256: who can write the objects of a set can write its manifest. The checksums themselves are covered by the sha256 of
the index in the manifest.
"""

import hashlib
import json
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from esvit_scale import files
from esvit_scale.data import manifest as manifests
from esvit_scale.data import pool
from esvit_scale.data.manifest import INDEX_VERSION, MANIFEST, Entry, Manifest
from esvit_scale.data.shard_table import Shard
from esvit_scale.errors import UserError

PIECE = 1 << 20  # bytes read at a time


def scan(shard: Path) -> list[Entry]:
    """Return the samples of a tar, as `manifest.scan` does, with the checksums of their members.

    Raises:
        OSError: the file cannot be read.
    """
    with shard.open("rb") as tar:
        return [
            entry._replace(checksums={ext: _crc(tar, *place) for ext, place in entry.members.items()})
            for entry in manifests.scan(shard)
        ]


def crc(data: bytes | memoryview) -> int:
    """Return the checksum of a member's bytes."""
    return zlib.crc32(data)


def _crc(tar: Any, offset: int, size: int) -> int:
    tar.seek(offset)
    found = 0
    while size > 0 and (piece := tar.read(min(size, PIECE))):
        found, size = zlib.crc32(piece, found), size - len(piece)
    return found


def add(root: Path, workers: int = 1) -> bool:
    """Write the indexes of a set that have no checksums, or are missing or damaged, and record them in its manifest.

    Return False if there are none.

    Every tar is compared with its sha256 first. The tars and the order of the samples stay, so that runs and checkpoints of
    the set go on. An interrupted call leaves a set that can be used and is completed by the next one.

    Raises:
        UserError: the set lies in a store, or a tar or its number of samples differs from the manifest.
        OSError: the folder cannot be written.
    """
    manifest = manifests.load(root)
    if manifest.remote:
        raise UserError(f"{manifest.remote.url}: add checksums to the set in a folder, and upload it again")
    manifests.check_sizes(manifest)
    sha256s = {number: shard.index_sha256 for number, shard in enumerate(manifest.shards) if has_index(root, shard)}
    jobs = [number for number in range(len(manifest.shards)) if number not in sha256s]
    if not jobs:
        return False
    samples = sum(manifest.shards[number].samples for number in jobs)
    for number, found in pool.each(partial(_write_index, manifest), jobs, workers, samples, "images"):
        sha256s[number] = found
    raw = json.loads((root / MANIFEST).read_bytes())
    shards = [row | {"index_sha256": sha256s[number]} for number, row in enumerate(raw.pop("shards"))]
    raw |= {"index_version": INDEX_VERSION, "shards": shards}
    files.write_bytes(root / MANIFEST, (json.dumps(raw, indent=1) + "\n").encode())
    return True


def has_index(root: Path, shard: Shard) -> bool:
    """Return whether the index of a shard is there, with checksums, and as the manifest says."""
    path = manifests.index_path(root / shard.name)
    return bool(shard.index_sha256) and path.is_file() and files.sha256(path) == shard.index_sha256


def _write_index(manifest: Manifest, number: int, tick: Callable[[], None]) -> str:
    """Write the index of one shard; return the index's sha256."""
    shard = manifest.shards[number]
    path = manifest.root / shard.name
    if files.sha256(path) != shard.sha256:
        raise UserError(
            f"{path}: its sha256 differs from the manifest's; run `esvit-scale shards verify {manifest.root}`"
        )
    entries = scan(path)
    if len(entries) != shard.samples:
        raise UserError(f"{path}: holds {len(entries)} samples; the manifest says {shard.samples}")
    for _ in entries:
        tick()
    index = manifests.dump_index(shard.name, entries)
    files.write_bytes(manifests.index_path(path), index)
    return hashlib.sha256(index).hexdigest()
