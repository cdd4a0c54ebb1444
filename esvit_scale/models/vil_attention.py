"""The two attentions of Vision Longformer: over a window and its neighbours, and over the whole map.

Multi-Scale Vision Longformer (Zhang et al. 2021, https://arxiv.org/abs/2103.15358), as in the code that EsViT uses. A
crop has T = g + H·W tokens: its global tokens, then its map row by row. In both attentions, linear layers run once over
the packed tokens [N, C] of all crops; scores are computed resolution by resolution.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esvit_scale.models.distributions import Initializer, normal
from esvit_scale.models.tables import kept
from esvit_scale.models.trunk import Grid
from esvit_scale.models.windows import relative_position_index

OWN = 4  # index of a query's own window in the 3×3 windows around it, row by row
AROUND = 9  # the number of these windows


class LongAttention(nn.Module):
    """Attention of a crop's map tokens to the nearby windows, and of its global tokens to everything.

    A map token sees the global tokens, its own window and the eight windows around it; a global token sees all tokens.
    Maps are padded right and bottom to whole windows; pads and windows outside the map are never attended to.

    Args:
        globals_: g, global tokens of a crop.
        window: tokens along a window's side; the bias table covers distances of less than two windows.
    """

    def __init__(self, dim: int, heads: int, globals_: int, window: int) -> None:
        super().__init__()
        self.heads, self.globals, self.window, self.scale = heads, globals_, window, (dim // heads) ** -0.5
        self.query = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.local_relative_position_bias_table = nn.Parameter(torch.zeros((4 * window - 1) ** 2, heads))
        self.g2l_relative_position_bias = nn.Parameter(torch.zeros(2, heads, globals_))
        self.g2g_relative_position_bias = nn.Parameter(torch.zeros(heads, globals_, globals_))

    def initial_values(self) -> dict[str, Initializer]:
        """Return the initialisers of the module's own parameters, by name (models/initialize.py)."""
        return {name: normal(0.02) for name, _ in self.named_parameters(recurse=False)}

    def forward(self, tokens: Tensor, grids: list[Grid], neighbours: Tensor | None) -> Tensor:
        """Map tokens [N, C] to [N, C].

        Args:
            neighbours: int64 [ΣB], per crop the one of the nine windows that queries see beside their own (never
                `OWN` itself); None: they see all nine.
        """
        q, kv = self.query(tokens) * self.scale, self.kv(tokens)
        bias = self.window_bias()
        counts = [n * (self.globals + h * w) for n, h, w in grids]
        drawn = [None] * len(grids) if neighbours is None else neighbours.split([n for n, _, _ in grids])
        mixed = []
        for q_rows, kv_rows, grid, draw in zip(q.split(counts), kv.split(counts), grids, drawn, strict=True):
            crops = q_rows.view(grid[0], -1, q.shape[1]), kv_rows.view(grid[0], -1, kv.shape[1])  # [n, T, C and 2C]
            mixed.append(torch.cat((self._global(*crops), self._local(*crops, grid, bias, draw)), 1).flatten(0, 1))
        return self.proj(torch.cat(mixed))

    def window_bias(self) -> Tensor:
        """Return the bias of every query of a window and every key of the nine, [heads, L, 9, L], L = window²."""
        length, index = self.window**2, around_index(self.window, self.query.weight.device)
        rows = _wide(self.local_relative_position_bias_table).index_select(0, index)
        return rows.view(length, AROUND, length, self.heads).permute(3, 0, 1, 2)

    def _global(self, q: Tensor, kv: Tensor) -> Tensor:
        """Return the attention output of the global tokens, [n, g, C], from q [n, T, C] and kv [n, T, 2C]."""
        to_map = _wide(self.g2l_relative_position_bias)[0].unsqueeze(-1).expand(-1, -1, q.shape[1] - self.globals)
        bias = torch.cat((_wide(self.g2g_relative_position_bias), to_map), -1)  # [heads, g, T]
        return self._attend(q[:, : self.globals], kv, bias)

    def _local(self, q: Tensor, kv: Tensor, grid: Grid, bias: Tensor, draw: Tensor | None) -> Tensor:
        """Return the attention output of the map's tokens, [n, H·W, C], from q [n, T, C] and kv [n, T, 2C].

        `bias` is `window_bias()`; `draw` is the part of `neighbours` that belongs to these n crops.
        """
        _, h, w = grid
        queries = to_windows(q[:, self.globals :], h, w, self.window)  # [n, windows, L, C]
        windows = to_windows(kv[:, self.globals :], h, w, self.window)  # [n, windows, L, 2C]
        around = neighbourhood(h, w, self.window, q.device)
        seen, bias, hidden = _all(windows, bias, around) if draw is None else _drawn(windows, bias, around, draw)
        # The global keys stand first.
        to_globals = _wide(self.g2l_relative_position_bias)[1][:, None].expand(bias.shape[0], -1, bias.shape[2], -1)
        bias = torch.cat((to_globals, bias), -1).unsqueeze(1)  # [1 or n, 1, heads, L, g + keys]
        hidden = F.pad(hidden, (self.globals, 0))[:, :, None, None]  # [1 or n, windows, 1, 1, g + keys]
        global_keys = kv[:, None, : self.globals].expand(-1, windows.shape[1], -1, -1)
        mixed = self._attend(queries, torch.cat((global_keys, seen), 2), bias, hidden)
        return from_windows(mixed, h, w, self.window)

    def _attend(self, q: Tensor, kv: Tensor, bias: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Return the multi-head attention of q […, L, C] to kv […, keys, 2C]; `bias` and `hidden` as in `attend`."""
        k, v = (x.unflatten(-1, (self.heads, -1)).transpose(-2, -3) for x in kv.chunk(2, -1))  # […, heads, keys, d]
        mixed = attend(q.unflatten(-1, (self.heads, -1)).transpose(-2, -3), k, v, bias, hidden)
        return mixed.transpose(-2, -3).flatten(-2)


class FullAttention(nn.Module):
    """softmax(QKᵀ/√d + relative position bias) V over all tokens of a crop.

    Args:
        globals_: g, global tokens of a crop.
        side: tokens along a side of a global crop's map, for which the bias table is made. For other maps its bias
            matrix [side², side²] is resized bicubically as if it were an image, as in the official code.
    """

    def __init__(self, dim: int, heads: int, globals_: int, side: int) -> None:
        super().__init__()
        self.heads, self.globals, self.side, self.scale = heads, globals_, side, (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.local_relative_position_bias_table = nn.Parameter(torch.zeros((2 * side - 1) ** 2, heads))
        if globals_:
            self.g2l_relative_position_bias = nn.Parameter(torch.zeros(2, heads, globals_))
            self.g2g_relative_position_bias = nn.Parameter(torch.zeros(heads, globals_, globals_))

    def initial_values(self) -> dict[str, Initializer]:
        """Return the initialisers of the module's own parameters, by name (models/initialize.py)."""
        return {name: normal(0.02) for name, _ in self.named_parameters(recurse=False)}

    def forward(self, tokens: Tensor, grids: list[Grid], neighbours: Tensor | None) -> Tensor:
        """Map tokens [N, C] to [N, C]; `neighbours` is not used."""
        qkv = self.qkv(tokens)
        built = self.map_bias()
        mixed = []
        for rows, (n, h, w) in zip(qkv.split([n * (self.globals + h * w) for n, h, w in grids]), grids, strict=True):
            q, k, v = rows.view(n, -1, 3, self.heads, tokens.shape[1] // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
            out = attend(q * self.scale, k, v, self._bias(built, h * w))  # [n, heads, T, d]
            mixed.append(out.transpose(1, 2).flatten(2).flatten(0, 1))
        return self.proj(torch.cat(mixed))

    def map_bias(self) -> Tensor:
        """Return the bias of every query and key of a global crop's map, [heads, side², side²]."""
        length, index = self.side**2, relative_position_index(self.side, self.qkv.weight.device)
        rows = _wide(self.local_relative_position_bias_table).index_select(0, index)
        return rows.view(length, length, -1).permute(2, 0, 1)

    def _bias(self, local: Tensor, tokens: int) -> Tensor:
        """Return the bias [heads, T, T] of crops with g global tokens and a map of `tokens` tokens.

        `local` is the bias of a global crop's map, from `map_bias`.
        """
        if tokens != self.side**2:
            local = F.interpolate(local[None], size=(tokens, tokens), mode="bicubic")[0]
        if not self.globals:
            return local
        g2l = self.g2l_relative_position_bias.to(local.dtype)
        of_globals = torch.cat(
            (self.g2g_relative_position_bias.to(local.dtype), g2l[0, :, :, None].expand(-1, -1, tokens)), -1
        )
        of_map = torch.cat((g2l[1, :, None].expand(-1, tokens, -1), local), -1)
        return torch.cat((of_globals, of_map), 1)


def _wide(bias: Tensor) -> Tensor:
    """Return a bias table in fp32 or wider, because the gradient of a bias sums those of thousands of scores."""
    return bias.to(torch.promote_types(bias.dtype, torch.float32))


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, hidden: Tensor | None = None) -> Tensor:
    """Return softmax(QKᵀ + bias) V, […, L, d], from q […, L, d] (already scaled), k and v […, keys, d].

    Scores and softmax are computed in fp32 or wider.

    Args:
        bias: added to the scores; broadcast to […, L, keys].
        hidden: bool, True for keys that queries do not see; broadcast to […, L, keys].
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q @ k.transpose(-2, -1)).to(wide) + bias.to(wide)
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores.softmax(-1).to(v.dtype) @ v


class Neighbourhood(NamedTuple):
    """The 3×3 windows around every window of a map, both in row-major order."""

    windows: Tensor  # int64 [windows, 9]: the indices of the nine (0 for those outside the map)
    hidden: Tensor  # bool [windows, 9, L]: slots outside the map


@kept
def neighbourhood(h: int, w: int, window: int, device: torch.device) -> Neighbourhood:
    """Return the 3×3 windows around every window of a map of h × w tokens."""
    rows, columns = -(-h // window), -(-w // window)
    y, x = np.divmod(np.arange(rows * columns), columns)
    dy, dx = np.divmod(np.arange(AROUND), 3)
    y, x = y[:, None] + dy - 1, x[:, None] + dx - 1  # [windows, 9]
    inside = (y >= 0) & (y < rows) & (x >= 0) & (x < columns)
    slot_y, slot_x = np.divmod(np.arange(window * window), window)
    hidden = ~inside[..., None] | (y[..., None] * window + slot_y >= h) | (x[..., None] * window + slot_x >= w)
    put = lambda a: torch.from_numpy(np.ascontiguousarray(a)).to(device)  # noqa: E731
    return Neighbourhood(put(np.where(inside, y * columns + x, 0)), put(hidden))


@kept
def around_index(window: int, device: torch.device) -> Tensor:
    """Return the row of the bias table for each (query, one of the nine windows, key in it): int64 [L·9·L].

    The row is (Δy + 2w−1)·(4w−1) + Δx + 2w−1, for a query that is (Δy, Δx) away from the key; w = `window`, L = w².
    """
    y, x = np.divmod(np.arange(window * window), window)
    dy, dx = np.divmod(np.arange(AROUND), 3)
    key_y, key_x = (dy[:, None] - 1) * window + y, (dx[:, None] - 1) * window + x  # [9, L]
    rows, columns = y[:, None, None] - key_y + 2 * window - 1, x[:, None, None] - key_x + 2 * window - 1
    return torch.from_numpy((rows * (4 * window - 1) + columns).reshape(-1)).to(device)


def to_windows(x: Tensor, h: int, w: int, side: int) -> Tensor:
    """Arrange row-major maps [n, h·w, C] as windows [n, windows, side², C], padded with zeros."""
    maps = F.pad(x.unflatten(1, (h, w)), (0, 0, 0, -w % side, 0, -h % side))
    return maps.unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


def from_windows(windows: Tensor, h: int, w: int, side: int) -> Tensor:
    """Arrange windows [n, windows, side², C] as row-major maps [n, h·w, C], without the padding."""
    rows = windows.unflatten(2, (side, side)).unflatten(1, (-(-h // side), -1))
    return rows.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :h, :w].flatten(1, 2)


def _all(windows: Tensor, bias: Tensor, around: Neighbourhood) -> tuple[Tensor, Tensor, Tensor]:
    """Return keys, bias and mask for queries that see all nine windows around them.

    Args:
        windows: [n, windows, L, 2C], keys and values.
        bias: [heads, L, 9, L].
        around: the nine windows around each window.

    Returns:
        Keys and values [n, windows, keys, 2C], bias [1, heads, L, keys], hidden [1, windows, keys], with keys = 9·L.
    """
    seen = windows.index_select(1, around.windows.view(-1)).unflatten(1, (-1, AROUND)).flatten(2, 3)
    return seen, bias.flatten(2)[None], around.hidden.flatten(1)[None]


def _drawn(windows: Tensor, bias: Tensor, around: Neighbourhood, draw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same as `_all` for queries that see their own window and the one that their crop drew.

    `draw` is int64 [n], the index of the drawn window among the nine. Bias and hidden have n as their first dimension,
    and keys = 2·L.
    """
    n, count = windows.shape[:2]
    chosen = around.windows.t()[draw] + torch.arange(n, device=draw.device)[:, None] * count  # [n, windows]
    neighbours = windows.flatten(0, 1).index_select(0, chosen.view(-1)).view(windows.shape)
    hidden = around.hidden.transpose(0, 1)  # [9, windows, L]
    bias = bias.permute(2, 0, 1, 3)  # [9, heads, L, L]
    return (
        torch.cat((windows, neighbours), 2),
        torch.cat((bias[OWN].expand(n, -1, -1, -1), bias.index_select(0, draw)), -1),
        torch.cat((hidden[OWN].expand(n, -1, -1), hidden[draw]), -1),
    )
