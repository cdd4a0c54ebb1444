"""Which sample goes into which shard: a pure function of the source and the options, known before anything is read.

So shards can be written by any number of processes and jobs, in any order, again after a crash, and come out the same.
A sample that turns out bad leaves its shard one short; nothing moves.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from esvit_scale.data.image_folder import printable
from esvit_scale.data.keys import Keys, hash64, hashes
from esvit_scale.data.order import permutation
from esvit_scale.data.pixel_format import RGB8, PixelFormat
from esvit_scale.data.reencode import KEEP_BYTES, Reencode
from esvit_scale.data.sources.base import Source
from esvit_scale.errors import UserError
from esvit_scale.progress import say

SAMPLES_PER_SHARD = 1000
BLOCKS_TOGETHER = 4  # blocks of a source whose samples are shuffled together, where it cannot be read at random


@dataclass(frozen=True)
class Recipe:
    """How a source becomes a shard set; the same recipe and source give the same bytes."""

    samples_per_shard: int = SAMPLES_PER_SHARD
    bytes_per_shard: int | None = None  # of image files as the source has them; instead of samples_per_shard
    seed: int = 0
    shuffle: bool = True  # else the source's order
    min_side: int = 0  # pixels; a smaller image is left out
    reencode: Reencode = KEEP_BYTES
    keep: Path | None = None  # a keep-list: the names of the samples to write
    drop_duplicates: bool = False
    val_fraction: float = 0.0
    channels: int = RGB8.channels  # of every image; an image of others is left out
    bits: int = RGB8.bits
    rotate_as_noted: bool = False  # img2dataset: turn images by the orientation that their json notes

    @property
    def pixels(self) -> PixelFormat:
        return PixelFormat(self.channels, self.bits)

    def record(self) -> dict[str, Any]:
        """For the manifest: what a repair needs to know. Options that came later stand in it only where they are not at
        their defaults, so that other sets keep the fingerprints that they had."""
        values = asdict(self) | {"keep": str(self.keep) if self.keep else None}
        if self.pixels.is_rgb8:
            del values["channels"], values["bits"]
        if not self.rotate_as_noted:
            del values["rotate_as_noted"]
        return values


class ShardPlan:
    """The shards of one set.

    Args:
        chosen: numbers of the source's samples that belong to the set, ascending.

    Raises:
        UserError: sizes are asked for and the source does not know them.
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
        return len(self._starts) - 1

    @property
    def samples(self) -> int:
        return len(self._order)

    def members(self, shard: int) -> list[int]:
        """Numbers of the samples of a shard, in its order: of a source with blocks the source's, so that each block is
        read once a shard."""
        numbers = self._order[self._starts[shard] : self._starts[shard + 1]]
        found: list[int] = (numbers if self.source.blocks is None else np.sort(numbers)).tolist()
        return found

    def count(self, shards: range) -> int:
        return int(self._starts[shards.stop] - self._starts[shards.start]) if len(shards) else 0


def fingerprint(source: Source, recipe: Recipe, chosen: NDArray[np.int64]) -> str:
    """Identifies a set before it is written: the source's samples, which of them, and every option that matters."""
    digest = hashlib.sha256(source.fingerprint())
    digest.update(json.dumps(recipe.record() | {"keep": None}, sort_keys=True).encode())
    digest.update(np.ascontiguousarray(chosen).data)
    return f"sha256:{digest.hexdigest()}"


def keep_listed(source: Source, path: Path, where: str) -> NDArray[np.int64]:
    """The numbers of the samples that a keep-list names.

    Raises:
        UserError: cannot be read, or names none of them.
    """
    try:
        lines = [line for line in path.read_text("utf-8").splitlines() if line and not line.startswith("#")]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or 'not a text file in UTF-8'}") from None
    wanted = np.unique(hashes(lines, len(lines)))
    names = hashes((printable(source.name(i)) for i in range(len(source))), len(source))
    found = np.flatnonzero(np.isin(names, wanted))
    if not len(found):
        raise UserError(f"{path}: names none of the {len(source)} samples of {where}; was it made from another source?")
    absent = len(wanted) - len(np.unique(names[found]))
    if absent:
        say(f"{path}: {absent} of its {len(wanted)} lines name nothing in {where}")
    return found


def split(keys: Keys, chosen: NDArray[np.int64], recipe: Recipe) -> dict[str, NDArray[np.int64]]:
    """`train` and `val` by a hash of seed and key: a sample stays where it is when others come or go.

    Raises:
        UserError: one of them is empty.
    """
    limit = int(recipe.val_fraction * 2**64)
    is_val = np.fromiter((hash64(f"{recipe.seed}/val/{keys[i]}") < limit for i in chosen.tolist()), bool, len(chosen))
    parts = {"train": chosen[~is_val], "val": chosen[is_val]}
    empty = [name for name, part in parts.items() if not len(part)]
    if empty:
        raise UserError(
            f"--val-fraction {recipe.val_fraction}: of {len(chosen)} samples none falls into {empty[0]}; "
            f"nearest: {0.5 if len(chosen) < 20 else 0.1}"
        )
    return parts


def _order(source: Source, recipe: Recipe, chosen: NDArray[np.int64]) -> NDArray[np.int64]:
    """A permutation of 0..len(chosen)-1. Where a source is read by blocks, blocks are permuted and samples are shuffled
    within BLOCKS_TOGETHER consecutive ones."""
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
        raise UserError("--bytes-per-shard: this source does not know its images' sizes; use --samples-per-shard")
    starts, filled = [0], 0
    for at, size in enumerate(sizes.tolist()):
        if filled + size > limit and filled:
            starts.append(at)
            filled = 0
        filled += size
    return np.array([*starts, len(order)])
