"""Shared memory for the crops of a few batches, which the loader processes of a rank fill side by side.

Each loader process writes its rows of a batch straight into the batch's place, so that the parent joins them without a
copy on a CPU; with a GPU they are copied once, into page-locked memory. A place is used again once nothing in the parent
refers to the batch any more.
"""

import os
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from esvit_scale.data.loader import PREFETCH, pixel_memory


def places_for(workers: int, parts: int) -> int:
    """Return how many batches must have a place, so that no two meet in one.

    A loader process starts a part when the one PREFETCH before its own was fetched, hence PREFETCH · workers parts after
    one that was; the two more are the batch that trains and the one that is being joined.

    Args:
        workers: number of loader processes of a rank.
        parts: number of parts of a batch; fewer than workers where these take turns.
    """
    return -(-PREFETCH * workers // parts) + 2


class BatchMemory:
    """Places for batches in shared memory; batch b has place b modulo their number.

    Build it before the loader processes start: they inherit it.

    Args:
        shapes: of a whole batch's crops, per resolution group: [V_g, B, S_g, S_g, channels].
        dtype: of a pixel.
        places: how many batches have a place.

    Raises:
        RuntimeError: there is too little shared memory.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, places: int) -> None:
        self._places = [[pixel_memory(dtype, *shape, shared=True) for shape in shapes] for _ in range(places)]
        self._held = pixel_memory(torch.uint8, places, len(shapes), shared=True).zero_()  # 1: the parent still uses it

    def _place(self, batch_index: int) -> int:
        return batch_index % len(self._places)

    def claim(self, batch_index: int, rows: slice) -> list[Tensor] | None:
        """Return a loader process's rows of a batch to write to, per group; None while the place is in use."""
        return None if self._held[self._place(batch_index)].any() else self.rows(batch_index, rows)

    def rows(self, batch_index: int, rows: slice) -> list[Tensor]:
        """Return rows of the batch in a place, per group [V_g, rows, S_g, S_g, channels]."""
        return [group[:, rows] for group in self._places[self._place(batch_index)]]

    def take(self, batch_index: int) -> list[Tensor]:
        """Return a whole batch in its place, which is free again when no tensor refers to its memory any more."""
        place, held = self._places[self._place(batch_index)], self._held[self._place(batch_index)].numpy()
        held[:] = 1
        taken = []
        for group, pixels in enumerate(place):
            array = pixels.numpy()  # a new array object, which lives as long as the storage that is made from it
            weakref.finalize(array, _release, held, group, os.getpid()).atexit = False
            taken.append(torch.from_numpy(array))
        return taken


def _release(held: NDArray[Any], group: int, owner: int) -> None:
    """Mark a group of a place as free, unless this is a forked process that drops its copy of the owner's tensors."""
    if os.getpid() == owner:
        held[group] = 0
