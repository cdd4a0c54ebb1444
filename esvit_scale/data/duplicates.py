"""The search for duplicates: samples that are the same file, or that look alike.

Identical files are found by a 128-bit hash of their bytes. Similar images are found by a 64-bit perceptual hash (the
signs of an image's 64 lowest frequencies around their median; Zauner 2010, "pHash"): two images are near when at most a
few of these bits differ. To find near pairs, the bits are split into one band more than the number of bits that may
differ: near hashes agree in at least one whole band (Norouzi et al. 2012, multi-index hashing).
"""

import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from esvit_scale import files
from esvit_scale.data import pool
from esvit_scale.data.decode import BadImage, decode
from esvit_scale.data.image_folder import printable
from esvit_scale.data.planned_shard import load
from esvit_scale.data.sources.base import Source

CHUNK = 256  # samples that a job of a worker process reads
ROWS = 512  # rows of a block of comparisons

Hash = NDArray[np.uint64]


def find(source: Source, near: int | None, workers: int) -> NDArray[np.int64]:
    """Return the duplicates as rows [M, 3]: sample to leave out, sample that stays in its place, differing bits.

    Every sample is read once, and decoded if `near` is given.

    Args:
        near: largest number of differing bits in the perceptual hashes of similar images; None: compare only the bytes, and
            give 0 as differing bits.
    """
    everything = np.arange(len(source))
    if near is None:
        exact = duplicates(source, everything, workers)
        return np.column_stack([exact, np.zeros(len(exact), np.int64)])
    hashes, found = _hashes(source, everything, _digest_and_perceptual, 4, workers)
    exact = _same(hashes[:, :2], found)
    rest = np.setdiff1d(np.flatnonzero(found & (hashes[:, 3] > 0)), exact[:, 0], assume_unique=True)
    similar = near_duplicates(hashes[rest, 2], near)
    similar[:, :2] = rest[similar[:, :2]]
    both = np.concatenate([np.column_stack([exact, np.zeros(len(exact), np.int64)]), similar])
    return both[np.argsort(both[:, 0])]


def duplicates(source: Source, chosen: NDArray[np.int64], workers: int) -> NDArray[np.int64]:
    """Read the chosen samples and return pairs [M, 2]: one whose bytes occurred before, the first with these bytes."""
    hashes, found = _hashes(source, chosen, _digest, 2, workers)
    return chosen[_same(hashes, found)]


def _same(hashes: Hash, found: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return index pairs [M, 2]: a row of `hashes` that occurred before, and its first occurrence.

    Rows where `found` is False are ignored.
    """
    rows = np.flatnonzero(found)
    _, first, inverse = np.unique(hashes[rows], axis=0, return_index=True, return_inverse=True)
    earlier = first[inverse.reshape(-1)]
    again = np.flatnonzero(earlier != np.arange(len(rows)))
    return np.stack([rows[again], rows[earlier[again]]], 1)


def near_duplicates(hashes: Hash, distance: int) -> NDArray[np.int64]:
    """Return rows [M, 3]: index of a hash to drop, index of the earlier near hash that stays, number of differing bits.

    Args:
        distance: largest number of bits in which near hashes differ.
    """
    dropped: dict[int, tuple[int, int]] = {}
    for later, earlier, bits in near_pairs(hashes, distance).tolist():
        if earlier in dropped and bits == 0:  # the same hash as one that is dropped
            dropped[later] = dropped[earlier]
        elif earlier not in dropped and later not in dropped:
            dropped[later] = (earlier, bits)
    return np.array([(i, *of) for i, of in sorted(dropped.items())], np.int64).reshape(-1, 3)


def write_lists(source: Source, dropped: NDArray[np.int64], out: Path) -> None:
    """Write the keep-list `out` with the names of the samples that stay, and beside it OUT.dropped.tsv with the others.

    Each line of the latter holds the dropped name, the name that is kept in its place, and the number of differing bits.
    """
    gone = set(dropped[:, 0].tolist())
    with files.replacing(out) as tmp, tmp.open("w", encoding="utf-8") as file:
        file.writelines(f"{printable(source.name(i))}\n" for i in range(len(source)) if i not in gone)
    beside = out.with_name(f"{out.name}.dropped.tsv")
    with files.replacing(beside) as tmp, tmp.open("w", encoding="utf-8") as file:
        for i, j, bits in dropped.tolist():
            file.write(f"{printable(source.name(i))}\t{printable(source.name(j))}\t{bits}\n")


def perceptual_hash(data: bytes) -> int | None:
    """Return the 64-bit perceptual hash of an image; None if it cannot be read or has no structure (a plain colour)."""
    try:
        image = decode(data)
    except BadImage:
        return None
    grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS), np.float64)
    low = _DCT @ grey @ _DCT.T  # [8, 8]
    rest = low.reshape(-1)[1:]
    if np.abs(rest).max() < 8:  # at full contrast it is about 32·255
        return None
    bits = low.reshape(-1) > np.median(rest)
    return int(np.packbits(bits).view(">u8")[0])


_DCT = np.cos(np.pi / 32 * np.outer(np.arange(8), np.arange(32) + 0.5)) * 0.25


def near_pairs(hashes: Hash, distance: int) -> NDArray[np.int64]:
    """Return sorted rows [M, 3] (later index, earlier index, differing bits), one for each pair of near hashes.

    Only the first occurrence of a hash is paired with other hashes; its repetitions are paired with it (0 bits).
    """
    values, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    again = np.flatnonzero(first[inverse] != np.arange(len(hashes)))
    pairs = [np.stack([again, first[inverse[again]], np.zeros_like(again)], 1)]
    edges = np.linspace(0, 64, distance + 2).astype(int)
    for low, high in pairwise(edges.tolist()):
        band = (values >> np.uint64(low)) & np.uint64(2 ** (high - low) - 1)
        order = np.argsort(band, kind="stable")
        cuts = np.flatnonzero(np.diff(band[order])) + 1
        for group in np.split(order, cuts):
            if len(group) > 1 and distance:
                pairs += list(_near_in(group, values, first, distance))
    return np.unique(np.concatenate(pairs), axis=0)


def _near_in(
    group: NDArray[np.int64], values: Hash, first: NDArray[np.int64], distance: int
) -> Iterator[NDArray[np.int64]]:
    for at in range(0, len(group), ROWS):
        rows, columns = group[at : at + ROWS], group[at:]
        bits = _bit_count(values[rows][:, None] ^ values[columns][None])
        r, c = np.nonzero((bits <= distance) & (bits > 0))
        one, other = first[rows[r]], first[columns[c]]
        yield np.stack([np.maximum(one, other), np.minimum(one, other), bits[r, c].astype(np.int64)], 1)


_BITS16 = np.array([i.bit_count() for i in range(1 << 16)], np.uint8)


def _bit_count(values: Hash) -> NDArray[np.uint8]:
    return _BITS16[np.ascontiguousarray(values).view(np.uint16)].reshape(*values.shape, 4).sum(-1, dtype=np.uint8)


def _digest(data: bytes) -> list[int]:
    digest = hashlib.blake2b(data, digest_size=16).digest()
    return [int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")]


def _digest_and_perceptual(data: bytes) -> list[int]:
    """Return the two halves of a file's digest, its perceptual hash (or 0), and whether it has a perceptual hash."""
    perceptual = perceptual_hash(data)
    return [*_digest(data), perceptual or 0, perceptual is not None]


def _hashes(
    source: Source, chosen: NDArray[np.int64], hash_of: Callable[[bytes], list[int] | None], width: int, workers: int
) -> tuple[Hash, NDArray[np.bool_]]:
    """Return the hashes [N, width] of the chosen samples, and which samples could be read [N]."""
    hashes, found = np.zeros((len(chosen), width), np.uint64), np.zeros(len(chosen), bool)
    starts = range(0, len(chosen), CHUNK)
    for start, rows in pool.each(
        partial(_chunk, source, chosen, hash_of), starts, workers, len(chosen), "images hashed"
    ):
        for at, row in enumerate(rows, start):
            if row is not None:
                hashes[at], found[at] = row, True
    return hashes, found


def _chunk(
    source: Source,
    chosen: NDArray[np.int64],
    hash_of: Callable[[bytes], list[int] | None],
    start: int,
    tick: Callable[[], None],
) -> list[list[int] | None]:
    rows: list[list[int] | None] = []
    for i in chosen[start : start + CHUNK].tolist():
        tick()
        try:
            rows.append(hash_of(load(source, i).data))
        except (BadImage, OSError):
            rows.append(None)
    return rows
