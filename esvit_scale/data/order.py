"""The order of samples: a pure function of (seed, epoch, manifest), the same at any world size and worker count.

An epoch's order is the shards permuted, then the samples shuffled within windows of `shuffle_window` consecutive
shards, so that a reader touches few shards at a time. Of its N positions the first T·B are used (T = ⌊N/B⌋ steps of B
images); the last N mod B are dropped. Slot s of S reads the contiguous positions [s·L, (s+1)·L) with L = T·B/S, and the
global batch of step t holds positions s·L + t·(B/S) + i of every slot s, in the order of (s, i). Ranks and loader workers
divide this list of B images (loader.py): their number decides who reads a sample, never which samples a batch holds.
stream.py shows an example.

This module imports numpy only. Its state is O(shards), plus a bounded cache of chunks of window permutations. Random
numbers are raw bits of a numpy bit generator, whose streams numpy guarantees; numpy's `Generator` methods may change
between releases.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from esvit_scale.data.hashing import derive_seed
from esvit_scale.errors import UserError

CHUNK = 1024  # consecutive offsets of a shuffle window that are cached together
CACHED_CHUNKS = 1024  # two for each of 512 slots, 8 MB


class Order:
    """The order of samples in one epoch.

    Args:
        seed, epoch: whole numbers ≥ 0.
        counts: number of samples in every shard, in the manifest's order.
        global_batch: B, images per step over all ranks.
        slots: S, the number of slots; divides B.
        shuffle_window: number of consecutive shards whose samples are shuffled together.
        chunks: a cache of permutations to be shared with orders of other seeds or epochs; None: a cache of its own.

    Raises:
        UserError: fewer samples than one batch, or slots that do not divide the batch.
    """

    def __init__(
        self,
        seed: int,
        epoch: int,
        counts: "Sequence[int] | NDArray[np.int64]",
        global_batch: int,
        slots: int,
        shuffle_window: int,
        chunks: "OrderedDict[tuple[int, ...], NDArray[np.int64]] | None" = None,
    ) -> None:
        counts = np.asarray(counts, dtype=np.int64)
        if global_batch % slots:
            raise UserError(f"data.slots: {slots} slots do not divide train.global_batch={global_batch}")
        self.samples = int(counts.sum())
        self.steps = steps_per_epoch(self.samples, global_batch)
        self._seed, self._epoch = seed, epoch
        self._per_slot = global_batch // slots
        self._slot_length = self.steps * self._per_slot  # L
        self._shards = permutation(len(counts), seed, epoch, "shards")
        self._starts = np.concatenate([[0], np.cumsum(counts[self._shards])])  # first position of each shard
        self._shuffle_window = shuffle_window
        self._window_starts = np.append(self._starts[:-1:shuffle_window], self.samples)
        self._chunks = OrderedDict() if chunks is None else chunks

    def position(self, step: int, slot: int, i: int) -> int:
        """Return the position in the epoch's order of image `i` (0..B/S-1) of a slot in the global batch of a step."""
        return slot * self._slot_length + step * self._per_slot + i

    def locate(self, position: int) -> tuple[int, int]:
        """Return (shard, index in the shard) of a position in 0..N-1; shards are numbered as in the manifest."""
        if not 0 <= position < self.samples:
            raise IndexError(f"position {position} is not in 0..{self.samples - 1}")
        window = int(np.searchsorted(self._window_starts, position, side="right")) - 1
        start = int(self._window_starts[window])
        shuffled = start + self._shuffle(window, position - start)
        shard = int(np.searchsorted(self._starts, shuffled, side="right")) - 1
        return int(self._shards[shard]), shuffled - int(self._starts[shard])

    def windows(self, positions: range) -> Iterator[tuple[int, range]]:
        """Yield the shuffle windows of a range of positions: each window's number, and its part of the range."""
        first, last = np.searchsorted(self._window_starts, [positions.start, positions.stop - 1], side="right") - 1
        for window in range(int(first), int(last) + 1):
            start, stop = self._window_starts[window : window + 2].tolist()
            if start < stop and positions:
                yield window, range(max(start, positions.start), min(stop, positions.stop))

    def shuffled(self, window: int) -> NDArray[np.int64]:
        """Return a window's permutation: at each offset from its first position, the offset of a sample in its shards."""
        size = int(self._window_starts[window + 1] - self._window_starts[window])
        return permutation(size, self._seed, self._epoch, "window", window)

    def shards_of_window(self, window: int) -> list[int]:
        """Return the numbers of the shards whose samples a window shuffles."""
        first = window * self._shuffle_window
        found: list[int] = self._shards[first : first + self._shuffle_window].tolist()
        return found

    def substitute(self, position: int, attempt: int) -> int:
        """Return the position of the sample that replaces the bad one at `position`.

        Each attempt (0, 1, …) has a random position of its own, a function of seed, epoch, position and attempt.
        """
        if self.samples == 1:
            return position
        other = derive_seed(self._seed, self._epoch, "substitute", position, attempt) % (self.samples - 1)
        return other + (other >= position)

    def _shuffle(self, window: int, offset: int) -> int:
        """Map an offset in a shuffle window through the window's permutation.

        A chunk of mapped offsets is cached, since a slot reads them one after the other; the permutation is computed
        again for every chunk.
        """
        chunk = offset // CHUNK
        key = (self._seed, self._epoch, window, chunk)
        found = self._chunks.get(key)
        if found is None:
            found = self._chunks[key] = self.shuffled(window)[chunk * CHUNK : (chunk + 1) * CHUNK].copy()
            if len(self._chunks) > CACHED_CHUNKS:
                self._chunks.popitem(last=False)
        else:
            self._chunks.move_to_end(key)
        return int(found[offset - chunk * CHUNK])


class SampleAddress(NamedTuple):
    """Where one image of a batch is found: a position in the order of an epoch of a set."""

    set: int  # its number among the mixed sets; 0 for a single set
    epoch: int  # the set's own epoch
    position: int  # in `order`
    order: Order  # the order of that epoch


def steps_per_epoch(samples: int, global_batch: int) -> int:
    """Return T = ⌊N/B⌋, the steps of an epoch of N samples in batches of B.

    Raises:
        UserError: the set is smaller than one batch.
    """
    if samples < global_batch:
        raise UserError(
            f"train.global_batch: {global_batch} images, but the set holds {samples} samples; "
            + (f"set train.global_batch={samples} or less" if samples else "write shards with samples first")
        )
    return samples // global_batch


def permutation(n: int, *key: int | str) -> NDArray[np.int64]:
    """Return a permutation of 0..n-1 drawn from `key`: indices sorted by random high bits, ties broken by the index."""
    low = np.uint64(max(n - 1, 1).bit_length())
    bits = np.asarray(np.random.PCG64(derive_seed(*key)).random_raw(n), dtype=np.uint64)
    tagged = np.sort((bits >> low << low) | np.arange(n, dtype=np.uint64))
    return (tagged & ((np.uint64(1) << low) - np.uint64(1))).astype(np.int64)
