"""Attention probabilities of a trunk's blocks, and their conversion from windows to maps [H, W] of the image."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn


class BlockAttention(NamedTuple):
    """The attention probabilities of one block on one image, by windows of L slots.

    `cells` says which token of the map each slot holds; the order of the windows is the trunk's own.
    """

    stage: int  # index of the stage, from 0
    block: int  # index of the block within the stage, from 0
    grid: tuple[int, int]  # (H, W) of the stage's map, in tokens
    probabilities: Tensor  # [windows, heads, L, L] (query, key); each row sums to 1 over the slots of its window
    cells: Tensor  # int64 [windows, L]: row-major index of each slot's token in the unshifted map; −1: padding

    def received(self) -> Tensor:
        """Return the attention that each token receives, [heads, H, W].

        It is the mean over the queries of the token's window, times L, so that uniform attention gives 1. Padding slots
        do not count as queries and are not part of the map.
        """
        asks = (self.cells >= 0).to(self.probabilities.dtype)  # [windows, L]: 1 for a query on a token, 0 on padding
        share = torch.einsum("whqk,wq->whk", self.probabilities, asks) / asks.sum(1)[:, None, None]
        return self._stitched((share * self.cells.shape[1]).transpose(0, 1))

    def row(self, token: int) -> tuple[Tensor, Tensor]:
        """Return the attention of one query, given by its row-major token index: [heads, H, W], zero outside the
        query's window, and the sum of what falls on padding, [heads]."""
        [[window, slot]] = (self.cells == token).nonzero().tolist()
        weights = torch.zeros(*self.cells.shape[:1], *self.probabilities.shape[1:3], dtype=self.probabilities.dtype)
        weights[window] = self.probabilities[window, :, slot]
        pads = (weights[window] * (self.cells[window] < 0)).sum(-1)
        return self._stitched(weights.transpose(0, 1)), pads

    def _stitched(self, values: Tensor) -> Tensor:
        """Map values by window slot [heads, windows, L] to [heads, H, W]; values on padding are dropped."""
        real = self.cells >= 0
        out = values.new_zeros(len(values), self.grid[0] * self.grid[1])
        out[:, self.cells[real]] = values[:, real]
        return out.view(-1, *self.grid)


@contextmanager
def before_forward(modules: Sequence[nn.Module], record: Callable[..., None]) -> Iterator[None]:
    """Within the context, call record(module, inputs) before the forward of every one of these modules."""
    handles = [module.register_forward_pre_hook(record) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
