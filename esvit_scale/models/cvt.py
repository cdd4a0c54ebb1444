"""CvT as in EsViT's code (its variant "v4 s1"), with the crops of all sizes packed into one forward.

Convolutional vision Transformer (Wu et al. 2021, https://arxiv.org/abs/2103.15808) with four stages and window
attention. Overlapping convolutions make the tokens of a stage; a block's queries, keys and values come from a depthwise
convolution, batch norm and a 1×1 convolution. There are no position embeddings, no shifted windows and no class token.

The tokens of all crops form one list [N, C], row-major within each crop: layer norms and 1×1 convolutions run once over
it. Layers that need a map (k×k convolutions, batch norm, windows) run once per resolution group. As in the official
code, a map is padded with zeros, right and bottom, to whole windows *before* the depthwise convolution, so that padding
is convolved, counted in the batch's statistics, projected and attended to like any token.

Parameter names and shapes are the official ones, so checkpoints map by name.
"""

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esvit_scale.config import Config
from esvit_scale.models.batch_norm import BatchNorm
from esvit_scale.models.block_parts import add_branch
from esvit_scale.models.distributions import Initializer, constant, normal
from esvit_scale.models.drop_path import keep_scales, linear_rates, token_factors
from esvit_scale.models.point_conv import PointConv, QuickGeluConv
from esvit_scale.models.shape import Shape, overridden
from esvit_scale.models.tokens import crop_means, groups, split
from esvit_scale.models.trunk import Features, Grid, TokenMap, Trunk

S1 = Shape(64, (2, 2, 6, 2), (1, 3, 6, 12), growth=(1, 3, 6, 12))
NORM_EPS = 1e-5
MLP_RATIO = 4


def build(config: Config) -> "CvT":
    """Return the CvT that the config describes; raise UserError if its overrides of the shape do not fit together."""
    shape = overridden(config, S1)
    return CvT(shape.widths, shape.depths, shape.heads, config.model.window, config.model.drop_path)


class CvT(Trunk):
    """A CvT of four stages.

    Args:
        widths, depths, heads: per stage.
        window: tokens along a window's side; on a smaller map, windows are as wide as the map's shorter side.
        drop_path: stochastic-depth rate of the last block; rates grow linearly from 0.
    """

    def __init__(
        self,
        widths: tuple[int, ...],
        depths: tuple[int, ...],
        heads: tuple[int, ...],
        window: int = 7,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.dim, self.depths, self.channels = widths[-1], tuple(depths), tuple(widths)
        self.reductions = tuple(4 * 2**s for s in range(len(depths)))
        self.drop_rates = linear_rates(drop_path, sum(depths))
        for s, (before, width) in enumerate(zip((3, *widths), widths, strict=False)):
            embed = Embedding(before, width, kernel=3 if s else 7, stride=2 if s else 4, padding=1 if s else 2)
            blocks = [Block(width, heads[s], window) for _ in range(depths[s])]
            setattr(self, f"stage{s}", Stage(embed, blocks))
        self.norm = nn.LayerNorm(self.dim, eps=NORM_EPS)

    @property
    def stages(self) -> list["Stage"]:
        """The stages in order."""
        return [cast(Stage, getattr(self, f"stage{s}")) for s in range(len(self.depths))]

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks of all stages, in order."""
        return [block for stage in self.stages for block in stage.blocks]

    @property
    def patch_projection(self) -> nn.Module:
        """The first layer, which `model.freeze_patch_embed` keeps at its random values."""
        return self.stages[0].embed.proj

    def forward(self, crops: list[Tensor], drop_keys: Tensor | None = None) -> Features:
        """Compute the features of all crops, as in `Trunk.forward`; the view is the mean of a crop's region tokens."""
        *_, (tokens, grids) = self._block_outputs(crops, drop_keys)
        regions = self.norm(tokens)
        return Features(crop_means(regions, grids), regions, grids)

    def block_maps(self, crops: list[Tensor]) -> Iterator[TokenMap]:
        """Yield the token map of every block, in order, before the final norm."""
        return (TokenMap(*output) for output in self._block_outputs(crops, None))

    def _block_outputs(self, crops: list[Tensor], drop_keys: Tensor | None) -> Iterator[tuple[Tensor, list[Grid]]]:
        """Yield the tokens [N, C] of all crops and their grids after each block."""
        scales = keep_scales(drop_keys, torch.tensor(self.drop_rates)) if drop_keys is not None else None
        maps, i = crops, 0
        for stage in self.stages:
            tokens, grids = stage.embed(maps)
            for block in stage.blocks:
                keep = token_factors(scales, self.drop_rates, i, grids, tokens.dtype)
                tokens = self.run_block(block, tokens, grids, *keep)
                i += 1
                yield tokens, grids
            maps = [_as_map(rows, grid) for rows, grid in groups(tokens, grids)]


class Stage(nn.ModuleList):
    """Container of a stage's embedding convolution and its blocks, with the official names; `CvT` calls them."""

    def __init__(self, embed: "Embedding", blocks: list["Block"]) -> None:
        super().__init__([embed, nn.ModuleDict({"layers": nn.ModuleList(blocks)})])

    @property
    def embed(self) -> "Embedding":
        """The convolution that makes the stage's tokens."""
        return cast(Embedding, self[0])

    @property
    def blocks(self) -> list["Block"]:
        """The stage's blocks, in order."""
        return list(self[1]["layers"])  # type: ignore[index]


class Embedding(nn.Module):
    """The embedding at the start of a stage: a convolution over overlapping patches, then a layer norm."""

    def __init__(self, channels: int, dim: int, kernel: int, stride: int, padding: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, kernel, stride, padding)
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)

    def initial_values(self) -> dict[str, Initializer]:
        """Return the initialisers of the convolution's parameters, by name (models/initialize.py)."""
        return {"proj.weight": normal(0.02), "proj.bias": constant(0.0)}

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, list[Grid]]:
        """Map maps [N_g, channels, H, W], one tensor per resolution, to tokens [N, C] of all crops and their grids."""
        out = [self.proj(x.to(self.proj.weight.dtype)) for x in maps]
        return self.norm(torch.cat([_as_rows(x) for x in out])), [(x.shape[0], x.shape[2], x.shape[3]) for x in out]


class Block(nn.ModuleList):
    """Window attention and MLP, pre-norm.

    A forward calls a block once, for all crops: it is the unit of ZeRO-3 gathering and of activation checkpointing.
    """

    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__([PreNorm(dim, Attention(dim, heads, window)), PreNorm(dim, ConvMlp(dim))])

    def forward(self, tokens: Tensor, grids: list[Grid], keep_attn: Tensor | None, keep_mlp: Tensor | None) -> Tensor:
        """Map tokens [N, C] to [N, C]; keep_* [N, 1] are the branches' drop-path factors (0: dropped), None is 1."""
        attention, mlp = self
        tokens = add_branch(tokens, attention(tokens, grids), keep_attn)
        return add_branch(tokens, mlp(tokens), keep_mlp)


class PreNorm(nn.Module):
    """A residual branch (attention or MLP) behind its layer norm; `Block` adds its output to the input."""

    def __init__(self, dim: int, fn: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.fn = fn

    def forward(self, tokens: Tensor, *plan: list[Grid]) -> Tensor:
        """Map tokens [N, C] to the branch's output [N, C]; `plan` (for attention, the grids) is passed on to it."""
        return self.fn(self.norm(tokens), *plan)


class Attention(nn.Module):
    """Window attention softmax(QKᵀ/√C) V. As in the official code, C is the block's width, not a head's width."""

    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window, self.scale = heads, window, dim**-0.5
        self.qkv = ConvProjection(dim)
        self.proj_out = PointConv(dim, dim)

    def forward(self, tokens: Tensor, grids: list[Grid]) -> Tensor:  # [N, C] → [N, C]
        """Map tokens [N, C] to [N, C]."""
        sides = [min(self.window, h, w) for _, h, w in grids]
        padded = [(n, h + -h % side, w + -w % side) for (n, h, w), side in zip(grids, sides, strict=True)]
        qkv = self.qkv(tokens, list(zip(grids, padded, strict=True)))  # [slots, 3C]
        mixed = []
        for rows, side, (n, high, wide), (_, h, w) in zip(split(qkv, padded), sides, padded, grids, strict=True):
            slots = self._attend(rows.view(n, high // side, side, wide // side, side, 3, self.heads, -1))
            mixed.append(slots.view(n, high, wide, -1)[:, :h, :w].reshape(n * h * w, -1))
        return self.proj_out(torch.cat(mixed))

    def _attend(self, qkv: Tensor) -> Tensor:
        """Compute the attention within the windows of one resolution.

        Args:
            qkv: [n, R, side, K, side, 3, heads, d] on padded maps of R × K windows.

        Returns:
            [n, R, side, K, side, heads, d].
        """
        n, rows, side, columns, _, _, heads, depth = qkv.shape
        windows = qkv.permute(5, 0, 1, 3, 6, 2, 4, 7).reshape(3, n * rows * columns, heads, side * side, depth)
        q, k, v = windows.unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, scale=self.scale)  # [windows, heads, L, d]
        return mixed.view(n, rows, columns, heads, side, side, depth).permute(0, 1, 4, 2, 5, 3, 6).contiguous()


class ConvProjection(nn.Module):
    """The qkv projection: depthwise 3×3 convolution and batch norm, per resolution, then a 1×1 convolution."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dw = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.bn = BatchNorm(dim)
        self.pw = PointConv(dim, 3 * dim)

    def initial_values(self) -> dict[str, Initializer]:
        """Return the initialiser of the depthwise convolution's weight, by name (models/initialize.py)."""
        return {"dw.weight": normal(0.02)}

    def forward(self, tokens: Tensor, grids: list[tuple[Grid, Grid]]) -> Tensor:
        """Map tokens [N, C] to qkv [slots, 3C] for every cell of the padded maps, row-major.

        Args:
            grids: the grid of the map and that of the padded map, for each resolution.
        """
        rows = []
        for group, (grid, (_, high, wide)) in zip(split(tokens, [g for g, _ in grids]), grids, strict=True):
            padded = F.pad(_as_map(group, grid), (0, wide - grid[2], 0, high - grid[1]))
            rows.append(_as_rows(self.bn(self.dw(padded))))
        return self.pw(torch.cat(rows))


class ConvMlp(nn.Module):
    """The MLP of a block: two 1×1 convolutions, C to 4C to C, with quick GELU x·σ(1.702 x) between them."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(PointConv(dim, MLP_RATIO * dim), nn.Identity(), QuickGeluConv(MLP_RATIO * dim, dim))

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens [N, C] to [N, C]."""
        return self.net(tokens)


def _as_map(rows: Tensor, grid: Grid) -> Tensor:
    """View the rows [n·h·w, C] of one resolution as maps [n, C, h, w] in channels-last memory, without a copy."""
    return rows.view(*grid, -1).permute(0, 3, 1, 2)


def _as_rows(maps: Tensor) -> Tensor:  # [n, C, h, w] → [n·h·w, C]
    return maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])
