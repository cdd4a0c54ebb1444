"""The order of several shard sets that are mixed by weight: a pure function of (seed, epoch, manifests).

An epoch of a mix is T = ⌊M/B⌋ steps of B images, M being data.epoch_samples, or the samples of all sets together. As in
order.py, slot s of S gives B/S images to every step: its images u = t·B/S + i. A fixed pattern says from which set a
slot draws image u, so that the sets' shares follow the weights at every step and in every slot. With two sets, the slot
draws from the first one where ⌊u·w + φ⌋ increases from u to u + 1; w is the first set's share of the weight, and φ a
phase that differs from slot to slot. With more sets, this rule first separates the last set's images from the others',
and then divides the latter among the other sets in the same way.

So a formula gives the number of samples that a slot has drawn from a set before any position. With it, all draws from a
set are numbered g = 0, 1, 2, … over the whole run, whoever reads them. Draw g is sample g mod N of the set's own epoch
⌊g/N⌋, in the order of order.py, where N is the number of samples in the set. A set that is used up begins its next
epoch, with other crops, whatever the other sets do; within an epoch of a set every sample comes exactly once.

    photos  N = 6: 0 5 3 1 4 2 | 2 4 0 …     draws 0-5 are its epoch 0, draws 6-11 its epoch 1
    sketches N = 2: 1 0 | 0 1 | 1 0 | …
"""

import math
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from itertools import chain, count
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from esvit_scale.config import Config, Data
from esvit_scale.data import manifest as manifests
from esvit_scale.data.hashing import derive_seed
from esvit_scale.data.manifest import Manifest
from esvit_scale.data.order import Order, SampleAddress, permutation, steps_per_epoch
from esvit_scale.data.remote import place
from esvit_scale.data.tar_names import TAR
from esvit_scale.errors import UserError
from esvit_scale.store_urls import is_set_url

CACHED_SHARDS = 1 << 20  # shards whose permutations are cached, over all epochs of all sets


class MixedSet(NamedTuple):
    """One of the shard sets of a mix."""

    name: str  # the name of its folder, made unique
    manifest: Manifest
    weight: Fraction


@dataclass(frozen=True)
class MixedSets:
    """The shard sets of data.mix."""

    sets: tuple[MixedSet, ...]
    samples: int  # per epoch of the mix

    @staticmethod
    def wanted(data: Data) -> bool:
        """Return whether data.mix names folders of shard sets only; a mix with plain tars among them is streamed."""
        return bool(data.mix) and not any(_names_tars(mixed.urls) for mixed in data.mix)

    @staticmethod
    def open(data: Data) -> "MixedSets":
        """Read the manifest of every set and compare the sizes of its shard files with it.

        Raises:
            UserError: data.train is set too, or a set is damaged or empty.
        """
        if data.train:
            raise UserError("data.mix: data.train is set too; list every set in data.mix, or give data.train alone")
        found: list[MixedSet] = []
        for mixed in data.mix:
            manifest = place.open_set(mixed.urls, data)
            manifests.check_sizes(manifest)
            if not manifest.samples:
                raise UserError(f"data.mix: {manifest.root} holds no samples; leave it out")
            name, taken = _name(mixed.urls) or "set", {one.name for one in found}
            unique = next(n for n in chain([name], (f"{name}-{i}" for i in count(2))) if n not in taken)
            found.append(MixedSet(unique, manifest, Fraction(repr(mixed.weight))))
        return MixedSets(tuple(found), data.epoch_samples or sum(one.manifest.samples for one in found))

    def moved(self, move: Callable[[Manifest], Manifest]) -> "MixedSets":
        """Return the same sets, each with the manifest that `move` returns for it."""
        return replace(self, sets=tuple(one._replace(manifest=move(one.manifest)) for one in self.sets))


def _name(urls: str) -> str:
    return urls.rstrip("/").rpartition("/")[2] if is_set_url(urls) else Path(urls).resolve().name


def _names_tars(urls: str) -> bool:
    if is_set_url(urls):
        return False
    folder = Path(urls)
    if folder.is_dir():
        return not manifests.is_shard_set(folder) and any(folder.glob("*.tar"))
    return urls.startswith("pipe:") or "://" in urls or "{" in urls or TAR.search(urls) is not None


def require_epoch_samples(data: Data) -> None:
    """Raise UserError if a config names plain tars, which do not say how many samples they hold, and no epoch's length.

    A local tar that is not there is named first.
    """
    named = [mixed.urls for mixed in data.mix] or [data.train]
    if data.epoch_samples is not None or not any(map(_names_tars, named)):
        return
    for urls in named:
        if TAR.search(urls) and "://" not in urls and not re.search(r"^pipe:|[{*?[]", urls) and not Path(urls).exists():
            raise UserError(f"data: {urls}: no such tar")
    squeezed = next((urls for urls in named if TAR.search(urls) and not urls.lower().endswith(".tar")), None)
    raise UserError(
        f"data.epoch_samples: not set; {f'{squeezed} is a compressed tar, and' if squeezed else 'plain'} tars do not "
        "say how many samples they hold: set the number of samples in an epoch, or write an indexed set with "
        f"`esvit-scale shards create`{' from the decompressed tar' if squeezed else ''}"
    )


def epoch_samples(data: Data) -> int:
    """Return the number of samples in an epoch of the data that a config names, from manifests and the config alone.

    Raises:
        UserError: a manifest cannot be read, or plain tars are named without data.epoch_samples.
    """
    if MixedSets.wanted(data):
        return data.epoch_samples or sum(place.open_set(mixed.urls, data).samples for mixed in data.mix)
    if is_set_url(data.train) or manifests.is_shard_set(Path(data.train)) or data.epoch_samples is None:
        return place.open_set(data.train, data).samples
    return data.epoch_samples


def order_of(config: Config, data: MixedSets) -> "MixedOrder":
    """Return the order in which a run reads the samples of its mixed sets.

    Raises:
        UserError: no image of a set would ever be drawn, or the mix is smaller than a batch.
    """
    sets = [(one.weight, one.manifest.shards.samples) for one in data.sets]
    batch = config.train.global_batch
    steps = steps_per_epoch(data.samples, batch)
    order = MixedOrder(config.seed, sets, steps, batch, config.slots, config.data.shuffle_window)
    for one, images in zip(data.sets, order.an_epoch, strict=True):
        if not images:
            share = one.weight / sum(other.weight for other in data.sets)
            raise UserError(
                f"data.mix: {one.name} has {float(share):.2g} of the total weight, too little for one of an epoch's "
                f"{steps * batch} images; give it more weight, or set data.epoch_samples={math.ceil(4 / share)} or more"
            )
    return order


class MixedOrder:
    """The order of samples in a mix, over all epochs.

    Args:
        seed: a whole number ≥ 0.
        sets: for every set, its weight and the number of samples in each of its shards.
        steps, global_batch, slots: T, B and S, as above; S divides B.
        shuffle_window: number of consecutive shards whose samples are shuffled together.
    """

    def __init__(
        self,
        seed: int,
        sets: "Sequence[tuple[Fraction, Sequence[int] | NDArray[np.int64]]]",
        steps: int,
        global_batch: int,
        slots: int,
        shuffle_window: int,
    ) -> None:
        self._seed, self._steps, self._slots, self._window = seed, steps, slots, shuffle_window
        self._per_slot = global_batch // slots
        self._counts = [np.asarray(counts, np.int64) for _, counts in sets]
        self._samples = [int(counts.sum()) for counts in self._counts]
        weights = [weight for weight, _ in sets]
        sums = [sum(weights[: k + 1], Fraction()) for k in range(len(weights))]
        # For every k, the share that sets 0..k-1 have of the weight of sets 0..k, as (numerator, denominator)
        self._shares = [(sums[k - 1] / sums[k]).as_integer_ratio() if k else (0, 1) for k in range(len(sets))]
        self._phases = [(2 * permutation(slots, seed, "phases", k) + 1).tolist() for k in range(len(sets))]
        self._orders: OrderedDict[tuple[int, int], Order] = OrderedDict()
        self._chunks: OrderedDict[tuple[int, ...], NDArray[np.int64]] = OrderedDict()

    def address(self, batch_index: int, slot: int, i: int) -> SampleAddress:
        """Return where image `i` (0..B/S-1) of a slot in global batch `batch_index` is found."""
        epoch, step = divmod(batch_index, self._steps)
        u = step * self._per_slot + i
        before, after = self._drawn(slot, u), self._drawn(slot, u + 1)
        number = next(k for k in range(len(before)) if after[k] > before[k])
        g = epoch * self.an_epoch[number] + self._starts[slot][number] + before[number]
        set_epoch, position = divmod(g, self._samples[number])
        return SampleAddress(number, set_epoch, position, self._order(number, set_epoch))

    def images(self, batches: int) -> list[int]:
        """Return how many images of each set the first `batches` global batches hold."""
        epochs, steps = divmod(batches, self._steps)
        of_slots = [self._drawn(slot, steps * self._per_slot) for slot in range(self._slots)]
        return [
            epochs * whole + sum(part) for whole, part in zip(self.an_epoch, zip(*of_slots, strict=True), strict=True)
        ]

    def draws(self, epoch: int, slot: int, number: int) -> range:
        """Return the draws from set `number` that a slot makes in an epoch of the mix, numbered over the whole run."""
        first = epoch * self.an_epoch[number] + self._starts[slot][number]
        return range(first, first + self._drawn(slot, self._steps * self._per_slot)[number])

    def order(self, number: int, epoch: int) -> Order:
        """Return the order of one of a set's own epochs."""
        return self._order(number, epoch)

    def _drawn(self, slot: int, u: int) -> list[int]:
        """Return how many of the first `u` images of a slot in an epoch come from each set."""
        drawn = []
        for k in reversed(range(len(self._shares))):
            numerator, denominator = self._shares[k]
            # ⌊u · share + φ⌋ with φ = phase / 2S, in whole numbers
            whole = 2 * self._slots * denominator
            others = (2 * self._slots * u * numerator + self._phases[k][slot] * denominator) // whole
            drawn.append(u - others)
            u = others
        return drawn[::-1]

    @cached_property
    def _starts(self) -> list[list[int]]:
        """Return a table [slots + 1][sets] of the draws from each set in an epoch.

        Row s counts the draws of the slots before s, and the last row those of all slots.
        """
        starts = [[0] * len(self._shares)]
        for slot in range(self._slots):
            drawn = self._drawn(slot, self._steps * self._per_slot)
            starts.append([a + b for a, b in zip(starts[-1], drawn, strict=True)])
        return starts

    @cached_property
    def an_epoch(self) -> list[int]:
        """Return how many images of an epoch come from each set."""
        return self._starts[-1]

    def _order(self, number: int, epoch: int) -> Order:
        found = self._orders.get((number, epoch))
        if found is None:
            seed = derive_seed(self._seed, "mix", number)
            found = Order(seed, epoch, self._counts[number], 1, 1, self._window, self._chunks)
            self._orders[number, epoch] = found
            while sum(len(self._counts[k]) for k, _ in self._orders) > CACHED_SHARDS and len(self._orders) > 1:
                self._orders.popitem(last=False)
        else:
            self._orders.move_to_end((number, epoch))
        return found
