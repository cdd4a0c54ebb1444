"""Masks of global crops: which cells of the last stage are hidden from the trunk, and the token that hides them.

A cell is a region token's part of the image. All patches of a hidden cell are replaced by one learned token right after
the patch embedding, so that every stage hides the same part of the image: a cell is an integer number of tokens at each
of them. Which cells these are is a function of the crop's drop key, a hash of (seed, step, position of the image in the
global batch, crop), so that it does not depend on rank, world size, micro-batches or recomputation.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from esvit_scale.models.distributions import Initializer, normal
from esvit_scale.models.drop_path import draw_of
from esvit_scale.models.tables import kept
from esvit_scale.models.trunk import Grid, MaskGeometry
from esvit_scale.models.windows import Permutation

BLOCKS = 12  # largest number of blocks that are laid; single cells are added if these hide too few
SMALLEST_BLOCK = 4  # number of cells, as in BEiT and iBOT
ASPECTS = np.exp(np.linspace(np.log(0.3), np.log(1 / 0.3), 16))  # height by width of a block
_FIRST_DRAW = 1 << 16  # of `draw_of`, above the indices of all blocks of a network
_NOISE = 1 << 12  # of the draws for single cells, above those for blocks


class MaskToken(nn.Module):
    """The learned token, [C], that takes the place of hidden patches; the student's network owns it, not the trunk."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.zeros(width))

    def initial_values(self) -> dict[str, Initializer]:
        """Return the initialiser of the token, SimMIM's; zeros would be scaled up 1000-fold by a norm without positions."""
        return {"values": normal(0.02)}

    def forward(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """Return tokens [N, C] with the token in all rows where `hidden` [N, 1] is True."""
        return torch.where(hidden, self.values.to(tokens.dtype), tokens)


class Mask(NamedTuple):
    """The hidden cells of the global crops of a batch, and the token that hides them."""

    cells: Tensor  # bool [2B, h, w], True for a hidden cell
    token: MaskToken

    def hide(self, tokens: Tensor, grids: Sequence[Grid], patches: int, order: Permutation | None = None) -> Tensor:
        """Return the tokens [N, C] of the patches of all crops, those of hidden cells replaced.

        Args:
            grids: the grids of patches of every resolution; the first is the global crops'.
            patches: patches along the side of a cell.
            order: the order in which the tokens are stored; None: row-major.
        """
        rows = hidden_patches(self.cells, grids, patches)
        return self.token(tokens, (rows if order is None else rows[order.tokens])[:, None])


def hidden_patches(cells: Tensor, grids: Sequence[Grid], patches: int) -> Tensor:
    """Return which patches of all crops belong to hidden cells, bool [N], row-major; arguments as in `Mask.hide`.

    A patch beyond the last cell, which a trunk that cuts off remainders has, is not hidden.
    """
    n, h, w = cells.shape
    large = cells[:, :, None, :, None].expand(n, h, patches, w, patches).reshape(n, h * patches, w * patches)
    found = cells.new_zeros(sum(count * height * width for count, height, width in grids))
    _, height, width = grids[0]
    large = large[:, :height, :width]
    maps = found[: n * height * width].view(n, height, width)
    maps[:, : large.shape[1], : large.shape[2]] = large
    return found


def cells_of(geometry: MaskGeometry, side: int) -> int:
    """Return the number of cells along the side of a crop of `side` pixels."""
    pixels = geometry.patch * geometry.patches
    return side // pixels if geometry.cuts_remainder else -(-side // pixels)


@torch.no_grad()
def draw_cells(keys: Tensor, h: int, w: int, share: float, ratio: tuple[float, float]) -> Tensor:
    """Draw block masks of h × w cells, bool [n, h, w], for crops with the keys [n] (`drop_path.drop_keys`).

    A crop is masked with probability `share`. The number of its hidden cells is uniform between the two fractions
    `ratio` of all cells, rounded, at least one and not all. Blocks of random area, aspect and place are laid one after
    the other until they cover that many; the last block is filled row by row. Only integers are drawn and compared, so
    that all devices draw the same masks.
    """
    total = h * w
    low, high = (min(max(round(fraction * total), 1), total - 1) for fraction in ratio)
    masked = draw_of(keys, _FIRST_DRAW, 1 << 20) < round(share * (1 << 20))
    count = low + draw_of(keys, _FIRST_DRAW + 1, high - low + 1)  # [n]
    cell = torch.arange(total, device=keys.device)
    row, column = cell // w, cell % w
    order = torch.full((len(keys), total), (BLOCKS << 24), device=keys.device)
    order += draw_of(keys[:, None], _FIRST_DRAW + _NOISE + cell, 1 << 24)  # of single cells, after all blocks
    sizes = block_sizes(h, w, keys.device)
    for block in reversed(range(BLOCKS)):
        draws = [_FIRST_DRAW + 2 + 4 * block + i for i in range(4)]
        smallest = count.clamp_max(SMALLEST_BLOCK)
        area = smallest + _draw_below(keys, draws[0], count - smallest + 1)
        size = sizes[area, draw_of(keys, draws[1], len(ASPECTS))]  # [n, 2]
        top = _draw_below(keys, draws[2], h - size[:, 0] + 1)[:, None]
        left = _draw_below(keys, draws[3], w - size[:, 1] + 1)[:, None]
        within = (row >= top) & (row < top + size[:, :1]) & (column >= left) & (column < left + size[:, 1:])
        order = torch.where(within, (block << 24) + cell, order)
    place = order.argsort(dim=1, stable=True).argsort(dim=1)  # of each cell in the order in which cells are hidden
    return ((place < count[:, None]) & masked[:, None]).view(-1, h, w)


def _draw_below(keys: Tensor, draw: int, choices: Tensor) -> Tensor:
    """Draw an integer below `choices` [n] for each key [n]."""
    return draw_of(keys, draw, 1 << 24) % choices


@kept
def block_sizes(h: int, w: int, device: torch.device) -> Tensor:
    """Return the height and width of a block of so many cells and of each of ASPECTS, int64 [1 + h·w, aspects, 2]."""
    area = np.arange(1 + h * w)[:, None]
    height = np.clip(np.rint(np.sqrt(area * ASPECTS)), 1, h)
    width = np.clip(np.rint(np.sqrt(area / ASPECTS)), 1, w)
    return torch.from_numpy(np.stack([height, width], -1).astype(np.int64)).to(device)
