"""Index tables of Focal Transformer attention: the queries and keys of each window of a map, cached per map size.

The indices point into the rows of one crop: its h·w tokens row-major, then one pad, then its pooled windows row-major.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from esvit_scale.models.windows import window_cells


class FocalTables(NamedTuple):
    """The index tables of an h × w map: T = h·w tokens in W windows of L = window² slots, each with K keys."""

    cells: Tensor  # int64 [W·L]: the row of each window slot (T, the pad's row, for padding)
    place: Tensor  # int64 [T]: the slot of each token
    keys: Tensor  # int64 [W·K]: the rows of each window's keys: its own slots, the ring around it, pooled windows
    hidden: Tensor  # bool [W, 1, 1, K]: masked keys: pooled windows outside the map, whose entry in `keys` is arbitrary


@lru_cache(maxsize=256)
def focal_tables(h: int, w: int, window: int, expand: int, focal: int, device: torch.device) -> FocalTables:
    """Return the index tables of an h × w map.

    Args:
        window: tokens along a window's side; the map is padded right and bottom to a multiple of it.
        expand: width of the ring in tokens; it wraps around at the padded map's border. 0: no ring.
        focal: side of the square of pooled windows that a window attends to, centred on itself; odd.
    """
    cells, _ = window_cells(h, w, window, 0)  # [W, L], −1: pad
    cells = np.where(cells < 0, h * w, cells)
    place = np.empty(h * w, dtype=np.int64)
    place[cells[cells < h * w]] = np.flatnonzero(cells.reshape(-1) < h * w)
    pooled, outside = _pooled(-(-h // window), -(-w // window), focal)
    keys = [cells, _ring(h, w, window, expand), h * w + 1 + pooled]
    hidden = np.concatenate([np.zeros((len(cells), keys[0].shape[1] + keys[1].shape[1]), dtype=bool), outside], axis=1)
    with torch.inference_mode(False):  # a cached inference tensor could not be saved for a later backward
        put = lambda a: torch.from_numpy(np.ascontiguousarray(a)).to(device)  # noqa: E731
        return FocalTables(
            put(cells.reshape(-1)),
            put(place),
            put(np.concatenate(keys, axis=1).reshape(-1)),
            put(hidden[:, None, None, :]),
        )


@lru_cache(maxsize=256)
def slots_of_rows(h: int, w: int, window: int, expand: int, focal: int, crops: int, device: torch.device) -> "Bags":
    """Return the inverse of `FocalTables.keys`, for `crops` crops: for each row, its positions in the list of keys."""
    keys = focal_tables(h, w, window, expand, focal, torch.device("cpu")).keys
    rows = h * w + 1 + -(-h // window) * -(-w // window)
    order, counts = keys.argsort(stable=True), keys.bincount(minlength=rows)
    first = torch.arange(crops)[:, None] * len(keys)
    with torch.inference_mode(False):
        return Bags((order + first).reshape(-1).to(device), (counts.cumsum(0) - counts + first).reshape(-1).to(device))


class Bags(NamedTuple):
    """For each row, its positions in the list of keys, in the form of `embedding_bag`'s input and offsets."""

    slots: Tensor  # int64 [crops·W·K]: the positions, row after row
    starts: Tensor  # int64 [crops·rows]: the index in `slots` at which a row's positions begin


def ring_positions(window: int, expand: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows and the columns of the ring's tokens, relative to the window's first token.

    They are in the order of the published position bias: the window shifted by (+expand, +expand), (+, −), (−, +) and
    (−, −), of each the tokens outside the window. A token that two of the shifts reach occurs twice.
    """
    y, x = (i.reshape(-1) for i in np.indices((window, window)))
    found = []
    for dy, dx in ((expand, expand), (expand, -expand), (-expand, expand), (-expand, -expand)):
        inside = (y + dy >= 0) & (y + dy < window) & (x + dx >= 0) & (x + dx < window)
        found.append(np.stack([y + dy, x + dx])[:, ~inside])
    ys, xs = np.concatenate(found, axis=1)
    return ys, xs


@lru_cache(maxsize=64)
def pooled_position_index(window: int, focal: int, device: torch.device) -> Tensor:
    """Return the column of the bias table for each pair (query, pooled window): int64 [window²·focal²]."""
    y, x = np.divmod(np.arange(window**2), window)
    j, i = np.divmod(np.arange(focal**2), focal)
    dy, dx = y[:, None] - j[None, :] + focal - 1, x[:, None] - i[None, :] + focal - 1
    with torch.inference_mode(False):
        return torch.from_numpy((dy * (window + focal - 1) + dx).reshape(-1)).to(device)


def _ring(h: int, w: int, window: int, expand: int) -> np.ndarray:
    """Return the rows of the tokens in each window's ring, [W, ring] (h·w, the pad's row, for padding)."""
    rows, cols = -(-h // window), -(-w // window)
    if not expand:
        return np.empty((rows * cols, 0), dtype=np.int64)
    padded = np.full((rows * window, cols * window), h * w)
    padded[:h, :w] = np.arange(h * w).reshape(h, w)
    dy, dx = ring_positions(window, expand)
    y = np.repeat(np.arange(rows) * window, cols)[:, None] + dy
    x = np.tile(np.arange(cols) * window, rows)[:, None] + dx
    return padded[y % len(padded), x % padded.shape[1]]


def _pooled(rows: int, cols: int, focal: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the pooled windows that each window attends to (0 for those outside the map), and which are outside.

    Both are [W, focal²]; pooled windows are numbered row-major.
    """
    reach = np.arange(focal) - focal // 2
    y = np.arange(rows)[:, None] + reach  # [rows, focal]
    x = np.arange(cols)[:, None] + reach
    outside_y, outside_x = (y < 0) | (y >= rows), (x < 0) | (x >= cols)
    outside = outside_y[:, None, :, None] | outside_x[None, :, None, :]
    number = y[:, None, :, None] * cols + x[None, :, None, :]
    shape = (rows * cols, focal**2)
    return np.where(outside, 0, number).reshape(shape), outside.reshape(shape)
