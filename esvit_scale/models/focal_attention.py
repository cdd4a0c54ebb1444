"""Focal attention on packed crops: each window attends to its own tokens, the ring around it and pooled windows.

Per-token layers run once over the tokens of all crops; pooling and attention run once per resolution group.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from esvit_scale.models.distributions import Initializer, constant, normal
from esvit_scale.models.focal_windows import FocalTables, focal_tables, pooled_position_index, slots_of_rows
from esvit_scale.models.products import Linear
from esvit_scale.models.tokens import as_maps
from esvit_scale.models.windows import Grids, relative_position_index


class WindowPool(nn.Linear):
    """The pooling of each window to one row: a learned weighted sum of its tokens plus a bias, shared by channels."""

    def __init__(self, window: int) -> None:
        super().__init__(window**2, 1)
        self.window = window

    def forward(self, tokens: Tensor, grids: Grids) -> Tensor:  # type: ignore[override]  # [N, C] → [ΣW, C]
        """Map tokens [N, C] to the pooled windows of all crops, [ΣW, C]; incomplete windows are padded with zeros."""
        side, pooled = self.window, []
        weight = self.weight.view(side, 1, side, 1)  # over [n, ·, side, ·, side, C]
        for maps in as_maps(tokens, grids):
            pooled.append((as_windows(maps, side) * weight).sum((2, 4)).flatten(0, 2))
        return torch.cat(pooled) + self.bias


class FocalAttention(nn.Module):
    """Multi-head attention softmax(QKᵀ/√d + bias) V from each window to its own tokens, its ring and pooled windows.

    Args:
        dim, heads: C, and the number of heads.
        window: tokens along a window's side.
        expand: width of the ring in tokens; 0: no ring.
        focal: side of the square of pooled windows that a window attends to.
    """

    def __init__(self, dim: int, heads: int, window: int, expand: int, focal: int) -> None:
        super().__init__()
        self.window, self.expand, self.focal = window, expand, focal
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        if expand:
            ring = 4 * window**2 - 4 * (window - expand) ** 2
            self.relative_position_bias_table_to_neighbors = nn.Parameter(torch.zeros(1, heads, window**2, ring))
        to_windows = nn.Parameter(torch.zeros(heads, (window + focal - 1) ** 2))
        self.relative_position_bias_table_to_windows = nn.ParameterList([to_windows])
        self.qkv = RowsLinear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def initial_values(self) -> dict[str, Initializer]:
        """Return the initialisers of the module's own parameters, by name (models/initialize.py)."""
        ring = {"relative_position_bias_table_to_neighbors": normal(0.02)} if self.expand else {}
        return {
            "relative_position_bias_table": constant(0.0),
            "relative_position_bias_table_to_windows.0": normal(0.02),
            **ring,
        }

    def forward(self, tokens: Tensor, pooled: Tensor, grids: Grids) -> Tensor:  # [N, C], [ΣW, C] → [N, C]
        """Map normed tokens [N, C] and the pooled windows [ΣW, C] to the branch's output [N, C]."""
        of_tokens, of_pooled, of_pad = self.qkv(tokens, pooled)
        bias, mixed = self.position_bias(tokens.device), []
        coarse = tuple((n, -(-h // self.window), -(-w // self.window)) for n, h, w in grids)
        for fine, wide, (n, h, w) in zip(as_maps(of_tokens, grids), as_maps(of_pooled, coarse), grids, strict=True):
            rows = torch.cat([fine.flatten(1, 2), of_pad.expand(n, 1, -1), wide.flatten(1, 2)], 1)  # [n, T + 1 + W, 3C]
            layout = (h, w, self.window, self.expand, self.focal)
            mixed.append(MixWindows.apply(rows, bias, layout).flatten(0, 1))
        return self.proj(torch.cat(mixed))

    def position_bias(self, device: torch.device) -> Tensor:
        """Return the position bias of each of a window's L queries for each of its K keys, [heads, L, K]."""
        length, table = self.window**2, self.relative_position_bias_table
        own = table.index_select(0, relative_position_index(self.window, device)).view(length, length, -1)
        index = pooled_position_index(self.window, self.focal, device)
        to_windows = self.relative_position_bias_table_to_windows[0].index_select(1, index).unflatten(1, (length, -1))
        ring = [self.relative_position_bias_table_to_neighbors[0]] if self.expand else []
        return torch.cat([own.permute(2, 0, 1), *ring, to_windows], -1)


class RowsLinear(Linear):
    """The qkv projection of tokens, pooled windows and a pad (a zero token, whose qkv is the bias)."""

    def forward(self, tokens: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        """Map tokens [N, C] and pooled windows [ΣW, C] to their qkv, [N, 3C] and [ΣW, 3C], and the pad's, [1, 3C]."""
        few = super().forward(torch.cat([pooled, pooled.new_zeros(1, pooled.shape[1])]))
        return super().forward(tokens), few[:-1], few[-1:]


class MixWindows(torch.autograd.Function):
    """Autograd function of the attention of n crops of one size: softmax(QKᵀ/√d + bias) V in every window.

    Inputs are the qkv rows [n, R, 3C] (for each crop T tokens, a pad and W pooled windows), the bias [heads, L, K] and
    the layout (h, w, window, expand, focal); the output is [n, T, C].

    It has its own backward to save memory, because each row is a key of many windows: only rows, probabilities and the
    output are saved, and the windows' keys and values are gathered again. Products run in the rows' precision, the
    softmax in fp32 or wider.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, bias: Tensor, layout: tuple[int, ...]) -> Tensor:
        """Return the attention output of every token, [n, T, C]."""
        tables = focal_tables(*layout, rows.device)
        q, k, v = lay_out(rows, tables, len(bias))
        wide = torch.promote_types(rows.dtype, torch.float32)
        scores = torch.add(bias.to(wide), q @ k.transpose(-2, -1), alpha=q.shape[-1] ** -0.5)  # [n, W, heads, L, K]
        attention = scores.masked_fill_(tables.hidden, -torch.inf).softmax(-1).to(rows.dtype)
        mixed = (attention @ v).transpose(2, 3).flatten(3).flatten(1, 2)  # [n, W·L, C]
        out = mixed.index_select(1, tables.place)
        ctx.layout, ctx.bias_dtype = layout, bias.dtype
        ctx.save_for_backward(rows, attention, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of rows and bias from that of the output, [n, T, C]."""
        rows, attention, out = ctx.saved_tensors
        tables = focal_tables(*ctx.layout, rows.device)
        n, windows, heads, length, _ = attention.shape
        wide = torch.promote_types(grad.dtype, torch.float32)
        q, k, v = lay_out(rows, tables, heads)
        # Σ_j P_ij dP_ij = dO_i·O_i: the inner sum of the softmax's backward, from d products instead of K.
        inner = (grad * out).unflatten(2, (heads, -1)).sum(-1, dtype=wide)  # [n, T, heads]
        slots = lambda x: F.pad(x, (0, 0, 0, 1)).index_select(1, tables.cells).unflatten(1, (windows, length))  # noqa: E731
        inner = slots(inner).transpose(2, 3).unsqueeze(-1)  # [n, W, heads, L, 1]
        grad = slots(grad).unflatten(3, (heads, -1)).transpose(2, 3)  # [n, W, heads, L, d], zero on pads
        grad_scores = torch.sub(grad @ v.transpose(-2, -1), inner).mul_(attention)
        grad_bias = grad_scores.sum((0, 1)).to(ctx.bias_dtype) if ctx.needs_input_grad[1] else None
        grad_scores = grad_scores.mul_(q.shape[-1] ** -0.5).to(grad.dtype)
        grad_q = (grad_scores @ k).transpose(2, 3).flatten(3).flatten(1, 2)  # [n, W·L, C]
        grad_k, grad_v = grad_scores.transpose(-2, -1) @ q, attention.transpose(-2, -1) @ grad
        grad_kv = torch.stack([grad_k, grad_v]).permute(1, 2, 4, 0, 3, 5).flatten(3).flatten(0, 2)  # [n·W·K, 2C]
        bags, width = slots_of_rows(*ctx.layout, n, rows.device), q.shape[-1] * heads
        grad_rows = torch.zeros_like(rows)
        grad_rows[..., width:] = F.embedding_bag(bags.slots, grad_kv, bags.starts, mode="sum").view(n, -1, 2 * width)
        grad_rows[:, : len(tables.place), :width] = grad_q.index_select(1, tables.place)
        return grad_rows, grad_bias, None


def lay_out(rows: Tensor, tables: FocalTables, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gather each window's queries [n, W, heads, L, d], keys and values [n, W, heads, K, d] from rows [n, R, 3C]."""
    windows, width = len(tables.hidden), rows.shape[2] // 3
    q = rows[..., :width].index_select(1, tables.cells).unflatten(1, (windows, -1)).unflatten(3, (heads, -1))
    kv = rows[..., width:].index_select(1, tables.keys).unflatten(1, (windows, -1)).unflatten(3, (2, heads, -1))
    k, v = kv.permute(3, 0, 1, 4, 2, 5)
    return q.transpose(2, 3), k, v


def as_windows(maps: Tensor, side: int) -> Tensor:
    """Split maps [n, H, W, C], padded with zeros right and bottom, to [n, ⌈H/side⌉, side, ⌈W/side⌉, side, C]."""
    h, w = maps.shape[1:3]
    if h % side or w % side:
        maps = F.pad(maps, (0, 0, 0, -w % side, 0, -h % side))
    return maps.unflatten(2, (-1, side)).unflatten(1, (-1, side))
