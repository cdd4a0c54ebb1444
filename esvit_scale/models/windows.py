"""Index plans that arrange the tokens of a packed batch in windows, and in groups of four for patch merging.

A packed batch is one list of tokens [N, C]: resolution after resolution, crop after crop. Within a crop, tokens are
stored in the order of the stage's unshifted windows (the storage order), so that unshifted windows are a plain view of
the list if they divide the maps evenly. Plans are made on the host with numpy, once per layout, and cached.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from esvit_scale.models.tables import kept

Grids = tuple[tuple[int, int, int], ...]  # (crops, H, W) of each resolution group

# Added to the attention score of two tokens that are in one window only because of the cyclic shift. The published code
# adds −100, which leaves probabilities of about exp(−100). They change no result, but in fp32 they are subnormal numbers,
# on which CPUs compute many times more slowly (findings/swin_mask_subnormals.sh). At −10⁴, which fp16 can represent, they
# are exactly zero.
MASKED = -1e4


class Permutation(NamedTuple):
    """A plan that assigns tokens to slots. Every token has exactly one slot; the slots without a token are pads."""

    tokens: Tensor  # int64 [slots]: the token of each slot (0 for pads)
    inverse: Tensor  # int64 [N]: the slot of each token
    pads: Tensor  # int64 [pads]: slots without a token
    identity: bool  # whether slot i holds token i for all i, without pads


class WindowPlan(NamedTuple):
    """The windows of one block. They are sorted by mask, so that a mask is added to a slice of the windows."""

    slots: Permutation  # tokens to slots, window after window; slots = windows · window²
    window: int  # tokens along a side
    masks: tuple[tuple[int, int, Tensor], ...]  # (first window, end, mask: float32 [window², window²])
    shift: int  # tokens
    # First window of the last column, of the last row and of the corner, or of what follows where there is none.
    kind_starts: tuple[int, int, int]


class WindowLayout(NamedTuple):
    """The windows of the blocks of one stage with one shift, for a batch of crops."""

    plan: WindowPlan
    heads: int
    depth: int  # values of a head
    blocks: int  # number of blocks with this layout


class _Permute(torch.autograd.Function):
    """A gather of rows whose backward is a gather as well (autograd's own is a scatter-add, several times slower)."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, fill: Tensor | None, to: Tensor, back: Tensor, to_pads: Tensor, back_pads: Tensor
    ) -> Tensor:
        ctx.save_for_backward(back, to_pads, back_pads)
        ctx.fill_dtype = fill.dtype if fill is not None else None
        return _take(rows, to, to_pads, fill)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        back, to_pads, back_pads = ctx.saved_tensors
        rows = _take(grad, back, back_pads, None) if ctx.needs_input_grad[0] else None
        fill = grad.index_select(0, to_pads).sum(0).to(ctx.fill_dtype) if ctx.needs_input_grad[1] else None
        return rows, fill, None, None, None, None


def _take(rows: Tensor, index: Tensor, pads: Tensor, fill: Tensor | None) -> Tensor:
    out = rows.index_select(0, index)
    if pads.numel():
        if fill is None:
            out.index_fill_(0, pads, 0)
        else:
            out.index_copy_(0, pads, fill.to(out.dtype).expand(pads.numel(), -1))
    return out


def window_partition(tokens: Tensor, plan: Permutation, fill: Tensor | None = None) -> Tensor:
    """Put tokens [N, C] into slots [slots, C]; pads hold `fill` [C] (whose gradient is summed over pads) or zeros."""
    if plan.identity:
        return tokens
    no_pads = plan.pads[:0]
    return _Permute.apply(tokens, fill, plan.tokens, plan.inverse, plan.pads, no_pads)


def window_reverse(slots: Tensor, plan: Permutation) -> Tensor:
    """Take tokens [N, C] out of slots [slots, C], the inverse of `window_partition`; the values of pads are dropped."""
    if plan.identity:
        return slots
    no_pads = plan.pads[:0]
    return _Permute.apply(slots, None, plan.inverse, plan.tokens, no_pads, plan.pads)


def total_tokens(grids: Grids) -> int:
    """Return N, the number of tokens of all crops."""
    return sum(n * h * w for n, h, w in grids)


def merged(grids: Grids) -> Grids:
    """Return the grids after patch merging, which halves the sides of maps and rounds up."""
    return tuple((n, -(-h // 2), -(-w // 2)) for n, h, w in grids)


@lru_cache(maxsize=256)
def window_plan(grids: Grids, window: int, shift: int, device: torch.device) -> WindowPlan:
    """Return the plan that arranges a packed batch in windows of side `window`, shifted by `shift` tokens.

    Maps are padded right and bottom to a multiple of the window, then rolled by −shift; the padding is not masked. A
    shifted map has four kinds of windows: interior (no mask), last column, last row and corner.
    """
    slots, kinds, first = [], [], 0
    for n, h, w in grids:
        cells, kind = _windows(h, w, window, shift)
        cells = np.where(cells >= 0, _storage(h, w, window)[cells], -1)
        slots.append(_repeat(cells, n, h * w, first))
        kinds.append(np.tile(kind, n))
        first += n * h * w
    kind = np.concatenate(kinds)
    order = np.argsort(kind, kind="stable")
    ends = np.cumsum(np.bincount(kind, minlength=4))
    with torch.inference_mode(False):  # a cached inference tensor could not be saved for a later backward
        masks = tuple(
            (int(ends[k - 1]), int(ends[k]), torch.from_numpy(_mask(window, shift, k)).to(device))
            for k in (1, 2, 3)
            if ends[k] > ends[k - 1]
        )
        starts = (int(ends[0]), int(ends[1]), int(ends[2]))
        return WindowPlan(_permutation(np.concatenate(slots)[order], first, device), window, masks, shift, starts)


@lru_cache(maxsize=256)
def merge_plan(grids: Grids, window: int, next_window: int, device: torch.device) -> Permutation:
    """Return the plan that puts the four tokens that become one merged token side by side.

    Their order is (0,0), (1,0), (0,1), (1,1), as (row, column). Tokens are in the storage order of windows of side
    `window`, merged tokens in that of `next_window`.
    """
    slots, first = [], 0
    for n, h, w in grids:
        h2, w2 = -(-h // 2), -(-w // 2)
        padded = np.full((2 * h2, 2 * w2), -1)
        padded[:h, :w] = _storage(h, w, window).reshape(h, w)
        quads = padded.reshape(h2, 2, w2, 2).transpose(0, 2, 3, 1).reshape(h2 * w2, 4)
        slots.append(_repeat(quads[_order(h2, w2, next_window)], n, h * w, first))
        first += n * h * w
    with torch.inference_mode(False):
        return _permutation(np.concatenate(slots), first, device)


@lru_cache(maxsize=256)
def storage_plan(grids: Grids, window: int, device: torch.device) -> Permutation:
    """Return the plan from the row-major order of tokens to the storage order of a stage with this window.

    `window_partition` applies it, `window_reverse` undoes it.
    """
    slots, first = [], 0
    for n, h, w in grids:
        slots.append(_repeat(_order(h, w, window), n, h * w, first))
        first += n * h * w
    with torch.inference_mode(False):
        return _permutation(np.concatenate(slots), first, device)


@lru_cache(maxsize=256)
def crop_of_token(grids: Grids, device: torch.device) -> Tensor:
    """Return the index of the crop that each token belongs to, int64 [N]."""
    tokens = np.concatenate([np.full(n, h * w) for n, h, w in grids])
    with torch.inference_mode(False):
        return torch.from_numpy(np.repeat(np.arange(len(tokens)), tokens)).to(device)


@kept
def relative_position_index(window: int, device: torch.device) -> Tensor:
    """Return the row of the position-bias table for each (query, key) of a window: int64 [window⁴].

    The row is (dy + w−1)·(2w−1) + dx + w−1, for a query that is (dy, dx) away from the key and w = `window`.
    """
    y, x = np.divmod(np.arange(window * window), window)
    dy, dx = y[:, None] - y[None, :], x[:, None] - x[None, :]
    index = (dy + window - 1) * (2 * window - 1) + dx + window - 1
    return torch.from_numpy(index.reshape(-1)).to(device)


def window_cells(h: int, w: int, window: int, shift: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens in the windows of an h × w map, and the pairs of them that must not see each other.

    Returns:
        int64 [windows, window²], the row-major token of each slot (−1: a pad), and bool [windows, window², window²],
        True for pairs of slots that are in one window only because of the cyclic shift. Windows are in row-major order.
    """
    cells, kinds = _windows(h, w, window, shift)
    return cells, np.stack([_mask(window, shift, kind) < 0 for kind in kinds])


# --- the windows of one map, as numpy arrays -------------------------------------------------------------------------


def _windows(h: int, w: int, window: int, shift: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the row-major token of each slot [windows, window²] (−1: pad) and each window's mask class [windows]."""
    rows, cols = -(-h // window), -(-w // window)
    padded = np.full((rows * window, cols * window), -1)
    padded[:h, :w] = np.arange(h * w).reshape(h, w)
    rolled = np.roll(padded, (-shift, -shift), axis=(0, 1))
    cells = rolled.reshape(rows, window, cols, window).transpose(0, 2, 1, 3).reshape(rows * cols, window * window)
    kind = np.zeros((rows, cols), dtype=np.int64)
    if shift:
        kind[:, -1] += 1
        kind[-1, :] += 2
    return cells, kind.reshape(-1)


def _mask(window: int, shift: int, kind: int) -> np.ndarray:
    """Return the mask of a window of class `kind`, float32 [window², window²].

    It is 0 between slots of the same region of the unrolled map, and MASKED between slots of different regions.
    """
    wrapped = np.arange(window) >= window - shift
    region = 2 * (wrapped & bool(kind & 2))[:, None] + (wrapped & bool(kind & 1))[None, :]
    region = region.reshape(-1)
    return np.where(region[:, None] == region[None, :], 0.0, MASKED).astype(np.float32)


def _order(h: int, w: int, window: int) -> np.ndarray:
    """Return the storage order of a crop's tokens: the row-major token at each position, [h·w]."""
    cells = _windows(h, w, window, 0)[0].reshape(-1)
    return cells[cells >= 0]


def _storage(h: int, w: int, window: int) -> np.ndarray:
    """Return the position in the storage order of each row-major token, [h·w]; the inverse of `_order`."""
    return np.argsort(_order(h, w, window))


def _repeat(cells: np.ndarray, n: int, tokens: int, first: int) -> np.ndarray:
    """Return the tokens in the slots of n crops, from those of one map, `cells` (−1: a pad).

    Crops have `tokens` tokens each and lie one after the other in the packed batch, from token `first` on.
    """
    starts = first + tokens * np.arange(n).reshape(-1, *[1] * cells.ndim)
    return np.where(cells >= 0, cells + starts, -1).reshape(-1, *cells.shape[1:])


def _permutation(cells: np.ndarray, tokens: int, device: torch.device) -> Permutation:
    flat = cells.reshape(-1)
    real = np.flatnonzero(flat >= 0)
    inverse = np.empty(tokens, dtype=np.int64)
    inverse[flat[real]] = real
    identity = len(flat) == tokens and bool((inverse == np.arange(tokens)).all())
    index, pads = np.maximum(flat, 0), np.flatnonzero(flat < 0)
    put = lambda a: torch.from_numpy(np.ascontiguousarray(a)).to(device)  # noqa: E731
    return Permutation(put(index), put(inverse), put(pads), identity)
