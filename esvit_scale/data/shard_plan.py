"""The plan of a shard set: which sample goes into which shard, as a pure function of the source and the options.

It is known before an image is read. So shards can be written by any number of processes and jobs, in any order, and again
after a crash, with the same result. A sample that turns out bad is missing from its shard; no other sample moves.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from esvit_scale.data.hashing import hash64, hash_all
from esvit_scale.data.image_folder import printable
from esvit_scale.data.keys import Keys
from esvit_scale.data.order import permutation
from esvit_scale.data.pixel_format import RGB8, PixelFormat
from esvit_scale.data.reencode import KEEP_BYTES, PILLOW, Reencode
from esvit_scale.data.sources.base import Source
from esvit_scale.errors import UserError
from esvit_scale.progress import say

SAMPLES_PER_SHARD = 1000
BLOCKS_TOGETHER = 4  # consecutive blocks whose samples are shuffled together, in a source that is read by blocks


@dataclass(frozen=True)
class Recipe:
    """The options with which a source is written as shard sets; the same recipe and source give the same bytes."""

    samples_per_shard: int = SAMPLES_PER_SHARD
    bytes_per_shard: int | None = None  # limit, by file sizes in the source; replaces samples_per_shard
    seed: int = 0  # random seed of the shuffling and of the split into train and val
    shuffle: bool = True  # False: samples keep the source's order
    min_side: int = 0  # pixels; smaller images are left out
    reencode: Reencode = KEEP_BYTES
    keep: Path | None = None  # a keep-list: the names of the samples to write
    drop_duplicates: bool = False
    val_fraction: float = 0.0  # fraction of the samples that go into `val`; 0: no split
    label_fraction: float = 1.0  # fraction of every class's samples that is written; 1: all, unlabelled ones too
    channels: int = RGB8.channels  # of every image; an image with another number is left out
    bits: int = RGB8.bits  # per channel
    rotate_as_noted: bool = False  # img2dataset: turn images to the orientation that their json records

    @property
    def pixels(self) -> PixelFormat:
        """Return the pixel format of the images."""
        return PixelFormat(self.channels, self.bits)

    def check(self) -> None:
        """Raise UserError if an option is out of its range, or does not go with another one."""
        encoding = self.reencode
        allowed = (
            ("--samples-per-shard", self.samples_per_shard, "a whole number ≥ 1", self.samples_per_shard >= 1),
            ("--val-fraction", self.val_fraction, "0, or a fraction between 0 and 1", 0 <= self.val_fraction < 1),
            ("--channels", self.channels, "1..16 channels", 1 <= self.channels <= 16),
            ("--bits", self.bits, "8 or 16", self.bits in (8, 16)),
            ("--short-side", encoding.short_side, "a whole number ≥ 1", (encoding.short_side or 1) >= 1),
            ("--quality", encoding.quality, "a quality of 1..100", 1 <= (encoding.quality or 90) <= 100),
            ("--format", encoding.format, "jpeg, png or webp", encoding.format in (None, *PILLOW)),
        )
        for option, value, expected, holds in allowed:
            if not holds:
                raise UserError(f"{option}: expected {expected}, got {value!r}")
        if encoding.format == "png" and encoding.quality:
            raise UserError("--quality: PNG is lossless and has none; leave it out, or choose --format jpg or webp")
        if encoding and not self.pixels.is_rgb8:
            raise UserError(
                f"--short-side, --quality and --format write 8-bit RGB, not {self.pixels}; without them files keep their bytes"
            )

    def record(self) -> dict[str, Any]:
        """Return the options as the manifest records them for repairs.

        Options that were added later are recorded only when they differ from their defaults, so that the fingerprints of
        older sets stay the same.
        """
        values = asdict(self) | {"keep": str(self.keep) if self.keep else None}
        if self.pixels.is_rgb8:
            del values["channels"], values["bits"]
        if not self.rotate_as_noted:
            del values["rotate_as_noted"]
        if self.label_fraction == 1:
            del values["label_fraction"]
        return values


class ShardPlan:
    """The assignment of one set's samples to shards.

    Args:
        chosen: numbers of the source's samples that belong to the set, ascending.

    Raises:
        UserError: `bytes_per_shard` is set, but the source does not know its images' sizes.
    """

    def __init__(self, source: Source, keys: Keys, recipe: Recipe, chosen: NDArray[np.int64]) -> None:
        self.source, self.keys, self.recipe = source, keys, recipe
        self._order = chosen[_order(source, recipe, chosen)]
        if recipe.bytes_per_shard:
            self._starts = _starts_by_size(source, self._order, recipe.bytes_per_shard)
        else:
            self._starts = np.append(np.arange(0, len(chosen), recipe.samples_per_shard), len(chosen))

    @property
    def shards(self) -> int:
        """Return the number of shards."""
        return len(self._starts) - 1

    @property
    def samples(self) -> int:
        """Return the number of samples in all shards."""
        return len(self._order)

    def members(self, shard: int) -> list[int]:
        """Return the numbers of a shard's samples, in the order in which they are written.

        For a source with blocks this is the source's order, so that each block is read once per shard.
        """
        numbers = self._order[self._starts[shard] : self._starts[shard + 1]]
        found: list[int] = (numbers if self.source.blocks is None else np.sort(numbers)).tolist()
        return found

    def count(self, shards: range) -> int:
        """Return the number of samples in a range of shards."""
        return int(self._starts[shards.stop] - self._starts[shards.start]) if len(shards) else 0


def fingerprint(source: Source, recipe: Recipe, chosen: NDArray[np.int64]) -> str:
    """Return a hash of the source, the chosen samples and the options, which identifies a set before it is written."""
    digest = hashlib.sha256(source.fingerprint())
    digest.update(json.dumps(recipe.record() | {"keep": None}, sort_keys=True).encode())
    digest.update(np.ascontiguousarray(chosen).data)
    return f"sha256:{digest.hexdigest()}"


def keep_listed(source: Source, path: Path, where: str) -> NDArray[np.int64]:
    """Return the numbers of the samples that a keep-list names.

    Raises:
        UserError: the list cannot be read, or names none of the samples.
    """
    try:
        lines = [line for line in path.read_text("utf-8").splitlines() if line and not line.startswith("#")]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or 'not a text file in UTF-8'}") from None
    wanted = np.unique(hash_all(lines, len(lines)))
    names = hash_all((printable(source.name(i)) for i in range(len(source))), len(source))
    found = np.flatnonzero(np.isin(names, wanted))
    if not len(found):
        raise UserError(f"{path}: names none of the {len(source)} samples of {where}; was it made from another source?")
    absent = len(wanted) - len(np.unique(names[found]))
    if absent:
        say(f"{path}: {absent} of its {len(wanted)} lines name no sample of {where}")
    return found


def split(keys: Keys, chosen: NDArray[np.int64], recipe: Recipe) -> dict[str, NDArray[np.int64]]:
    """Divide samples into `train` and `val`, each by a hash of the seed and its key, whatever other samples there are.

    Raises:
        UserError: one of the two is empty.
    """
    limit = int(recipe.val_fraction * 2**64)
    is_val = np.fromiter((hash64(f"{recipe.seed}/val/{keys[i]}") < limit for i in chosen.tolist()), bool, len(chosen))
    parts = {"train": chosen[~is_val], "val": chosen[is_val]}
    empty = [name for name, part in parts.items() if not len(part)]
    if empty:
        raise UserError(
            f"--val-fraction {recipe.val_fraction}: none of the {len(chosen)} samples falls into {empty[0]}; "
            f"nearest: {0.5 if len(chosen) < 20 else 0.1}"
        )
    return parts


def balanced(keys: Keys, labels: NDArray[np.int32], chosen: NDArray[np.int64], recipe: Recipe) -> NDArray[np.int64]:
    """Return the same fraction of every class: its samples whose keys have the smallest hashes with the seed.

    Of a class with n samples it is round(fraction · n), one at least; samples without a class are left out. A smaller
    fraction is a part of a larger one.

    Raises:
        UserError: no sample has a class.
    """
    hashes = np.fromiter((hash64(f"{recipe.seed}/label/{keys[i]}") for i in chosen.tolist()), np.uint64, len(chosen))
    of_chosen, parts = labels[chosen], []
    for label in np.unique(of_chosen[of_chosen >= 0]).tolist():
        own = np.flatnonzero(of_chosen == label)
        count = max(1, round(recipe.label_fraction * len(own)))
        parts.append(own[np.argsort(hashes[own], kind="stable")[:count]])
    if not parts:
        raise UserError("--fraction: no sample has a label, so that there are no classes to take a fraction of")
    found: NDArray[np.int64] = np.sort(chosen[np.concatenate(parts)])
    return found


def _order(source: Source, recipe: Recipe, chosen: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the order in which the chosen samples are written, as a permutation of 0..len(chosen)-1.

    In a source that is read by blocks, the blocks are permuted and samples are shuffled within BLOCKS_TOGETHER consecutive
    ones.
    """
    n = len(chosen)
    if not recipe.shuffle:
        return np.arange(n)
    if source.blocks is None:
        return permutation(n, recipe.seed, "files")
    cuts = np.unique(np.append(np.searchsorted(chosen, source.blocks), n))
    starts, ends = cuts[:-1], cuts[1:]
    blocks = permutation(len(starts), recipe.seed, "blocks").tolist()
    parts = []
    for at in range(0, len(blocks), BLOCKS_TOGETHER):
        window = np.concatenate([np.arange(starts[b], ends[b]) for b in blocks[at : at + BLOCKS_TOGETHER]])
        parts.append(window[permutation(len(window), recipe.seed, "window", at)])
    return np.concatenate(parts) if parts else np.arange(0)


def _starts_by_size(source: Source, order: NDArray[np.int64], limit: int) -> NDArray[np.int64]:
    sizes = np.fromiter((source.size(i) for i in order.tolist()), np.int64, len(order))
    if not sizes.any():
        raise UserError("--bytes-per-shard: the sizes of this source's images are unknown; use --samples-per-shard")
    starts, filled = [0], 0
    for at, size in enumerate(sizes.tolist()):
        if filled + size > limit and filled:
            starts.append(at)
            filled = 0
        filled += size
    return np.array([*starts, len(order)])
