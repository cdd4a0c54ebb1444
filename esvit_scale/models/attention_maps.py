"""Attention probabilities of a trunk's blocks, stitched from windows to maps of the image."""

from typing import NamedTuple

import torch
from torch import Tensor


class BlockAttention(NamedTuple):
    """One block's attention on one image. Windows come in the trunk's order; `cells` says what they cover."""

    stage: int  # from 0, as is the block within its stage
    block: int
    grid: tuple[int, int]  # tokens (H, W) of the stage's map
    probabilities: Tensor  # [windows, heads, L, L]; a row is one query's, over its window's slots, and sums to 1
    cells: Tensor  # int64 [windows, L]: row-major token of each slot, shift undone; −1: padding

    def received(self) -> Tensor:
        """Return the attention that each token gets from the queries of its window, as a multiple of an even share:
        [heads, H, W]. Queries on padding do not count, and what falls on padding is left out."""
        asks = (self.cells >= 0).to(self.probabilities.dtype)  # [windows, L]
        share = torch.einsum("whqk,wq->whk", self.probabilities, asks) / asks.sum(1)[:, None, None]
        return self._stitched((share * self.cells.shape[1]).transpose(0, 1))

    def row(self, token: int) -> tuple[Tensor, Tensor]:
        """Return one query's attention [heads, H, W], zero outside its window, and what it gives to padding [heads]."""
        [[window, slot]] = (self.cells == token).nonzero().tolist()
        weights = torch.zeros(*self.cells.shape[:1], *self.probabilities.shape[1:3], dtype=self.probabilities.dtype)
        weights[window] = self.probabilities[window, :, slot]
        pads = (weights[window] * (self.cells[window] < 0)).sum(-1)
        return self._stitched(weights.transpose(0, 1)), pads

    def _stitched(self, values: Tensor) -> Tensor:
        """Map [heads, windows, L] to [heads, H, W]: every token lies in exactly one window."""
        real = self.cells >= 0
        out = values.new_zeros(len(values), self.grid[0] * self.grid[1])
        out[:, self.cells[real]] = values[:, real]
        return out.view(-1, *self.grid)
