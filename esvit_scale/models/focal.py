"""Focal Transformer (Yang et al. 2021, https://arxiv.org/abs/2107.00641), as in its published code.

A window of 7×7 queries attends to three kinds of keys: its own 49 tokens; the ring of tokens up to 3 away, which wraps
around at the map's border and gives 132 keys (12 of its 120 tokens occur twice); and pooled windows, each a learned
weighted sum of 49 tokens, in a square of 7×7, 5×5, 3×3 and 1×1 windows in stages 1 to 4. Each kind has its own position
biases. Of the published variants, these are the models without overlapping convolutions (patches are 4×4, merging is a
2×2 convolution) and without shifted windows.

The published code fixes window and ring of each stage for one image size. This trunk fixes them for the size of the
global crops, as EsViT's Swin does; a stage whose map is not larger than the window has one window and no ring. Crops of
any size then run as in the published blocks: after the norm, a map is padded with zeros, right and bottom, to whole
windows; the padding is not masked; rings and pooled windows are those of the padded map; pooled windows outside it are
masked. Patch embedding and merging pad with zeros, as in `Swin`, where the published ones leave out what does not fill
a patch; the two agree for image sides that are multiples of 32.

Parameter names are the published ones.
"""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esvit_scale.config import Config
from esvit_scale.errors import UserError
from esvit_scale.models.block_parts import GeluMlp, add_branch
from esvit_scale.models.drop_path import keep_scales, linear_rates, token_factors
from esvit_scale.models.focal_attention import FocalAttention, WindowPool, as_windows
from esvit_scale.models.masking import Mask
from esvit_scale.models.patches import PatchProjection, pixel_rows
from esvit_scale.models.shape import Shape, overridden
from esvit_scale.models.swin import PATCH, stage_window
from esvit_scale.models.tokens import as_maps, crop_means
from esvit_scale.models.trunk import Features, MaskGeometry, TokenMap, Trunk
from esvit_scale.models.windows import Grids, merged

EXPAND = 3  # tokens: width of the ring
FOCAL_WINDOWS = (7, 5, 3, 1)  # side of the square of pooled windows, per stage; further stages take the last value

SHAPES = {
    "focal_t": Shape(96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "focal_s": Shape(96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "focal_b": Shape(128, (2, 2, 18, 2), (4, 8, 16, 32)),
}


def build(config: Config) -> Trunk:
    """Return the focal transformer that `config.model.trunk` names.

    Raises:
        UserError: the config's overrides of the shape do not fit together, or crops or windows are too small.
    """
    shape = overridden(config, SHAPES[config.model.trunk])
    size, window = config.data.global_crops.size, config.model.window
    smallest = PATCH * 2 ** (len(shape.depths) - 1)
    if size < smallest:
        raise UserError(
            f"data.global_crops.size: {size} pixels leave nothing for stage {len(shape.depths)}; at least {smallest}"
        )
    if window < EXPAND and size // PATCH > window:
        raise UserError(
            f"model.window: {window} is too small: {config.model.trunk} attends to a ring {EXPAND} tokens wide around each "
            f"window, which must be at least as wide; set model.window to {EXPAND} or more"
        )
    return Focal(shape.embed_dim, shape.depths, shape.heads, window, size, config.model.drop_path)


class Focal(Trunk):
    """The Focal Transformer trunk; its arguments are those of `Swin`."""

    def __init__(
        self,
        embed_dim: int,
        depths: tuple[int, ...],
        heads: tuple[int, ...],
        window: int = 7,
        size: int = 224,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.depths = tuple(depths)
        self.channels = tuple(embed_dim * 2**s for s in range(len(depths)))
        self.reductions = tuple(PATCH * 2**s for s in range(len(depths)))
        self.dim = self.channels[-1]
        self.drop_rates = linear_rates(drop_path, sum(depths))
        self.patch_embed = PatchEmbed(PatchProjection(3, embed_dim, PATCH), embed_dim)
        stages = []
        for s, (depth, n_heads, width) in enumerate(zip(depths, heads, self.channels, strict=True)):
            side, _ = stage_window(size, window, s)
            expand = EXPAND if size // PATCH // 2**s > window else 0
            focal = FOCAL_WINDOWS[min(s, len(FOCAL_WINDOWS) - 1)]
            blocks = [Block(width, n_heads, side, expand, focal) for _ in range(depth)]
            stages.append(Stage(blocks, width if s < len(depths) - 1 else None))
        self.layers = nn.ModuleList(stages)
        self.norm = nn.LayerNorm(self.dim)

    @property
    def stages(self) -> list["Stage"]:
        """The stages in order."""
        return cast(list[Stage], list(self.layers))

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks of all stages, in order."""
        return [block for stage in self.stages for block in stage.blocks]

    @property
    def mask_geometry(self) -> MaskGeometry:
        """The geometry of masks, whose tokens `forward` replaces after the patch embedding."""
        return MaskGeometry(self.channels[0], PATCH, 2 ** (len(self.depths) - 1))

    @property
    def patch_projection(self) -> nn.Module:
        """The first layer, which `model.freeze_patch_embed` keeps at its random values."""
        return self.patch_embed.proj

    def forward(self, crops: list[Tensor], drop_keys: Tensor | None = None, mask: Mask | None = None) -> Features:
        """Compute the features of all crops, as in `Trunk.forward`; the view is the mean of a crop's region tokens."""
        *_, (tokens, grids) = self._block_outputs(crops, drop_keys, mask)
        regions = self.norm(tokens)
        return Features(crop_means(regions, grids), regions, list(grids))

    def block_maps(self, crops: list[Tensor]) -> Iterator[TokenMap]:
        """Yield the token map of every block, in order, before the final norm."""
        return (TokenMap(tokens, list(grids)) for tokens, grids in self._block_outputs(crops, None))

    def _block_outputs(self, crops: list[Tensor], drop_keys: Tensor | None, mask: Mask | None = None) -> Any:
        """Yield the tokens [N, C] of all crops (row-major within each crop) and their grids after each block."""
        scales = keep_scales(drop_keys, torch.tensor(self.drop_rates)) if drop_keys is not None else None
        grids: Grids = tuple((x.shape[0], -(-x.shape[-2] // PATCH), -(-x.shape[-1] // PATCH)) for x in crops)
        dtype = self.patch_embed.proj.weight.dtype
        tokens = self.patch_embed(torch.cat([pixel_rows(x.to(dtype), PATCH) for x in crops]))  # [N, C]
        if mask is not None:
            tokens = mask.hide(tokens, grids, self.mask_geometry.patches)
        i = 0
        for stage in self.stages:
            for block in stage.blocks:
                keep = token_factors(scales, self.drop_rates, i, grids, tokens.dtype)
                tokens = self.run_block(block, tokens, grids, *keep)
                i += 1
                yield tokens, grids
            if stage.downsample is not None:
                tokens = stage.downsample(torch.cat([quads(maps) for maps in as_maps(tokens, grids)]))
                grids = merged(grids)


class PatchEmbed(nn.Module):
    """A linear projection of flattened patches, then a layer norm: the stem, and the merging between stages.

    Args:
        proj: the projection of rows [N, values of a patch].
        dim: C, the projection's output width.
    """

    def __init__(self, proj: nn.Conv2d, dim: int) -> None:
        super().__init__()
        self.proj = proj
        self.norm = nn.LayerNorm(dim)

    def forward(self, patches: Tensor) -> Tensor:  # [N, values of a patch] → [N, C]
        """Map patches [N, values of a patch] to tokens [N, C]."""
        return self.norm(self.proj(patches))


class QuadProjection(nn.Conv2d):
    """The published 2×2 convolution between stages, with its parameters, applied to rows of 2×2 tokens."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, 2 * dim, 2, stride=2)

    def forward(self, quads: Tensor) -> Tensor:  # [N, 4C] (y, x, C) → [N, 2C]
        """Map the values of 2×2 tokens, [N, 4C] in the order (y, x, channel), to merged tokens [N, 2C]."""
        return F.linear(quads, self.weight.permute(0, 2, 3, 1).flatten(1), self.bias)


class Stage(nn.Module):
    """Container of a stage's blocks and the merging after them (None in the last stage); `Focal` calls them."""

    def __init__(self, blocks: list["Block"], width: int | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = None if width is None else PatchEmbed(QuadProjection(width), 2 * width)


class Block(nn.Module):
    """Focal attention and MLP, pre-norm.

    A forward calls a block once, for all crops: it is the unit of ZeRO-3 gathering and of activation checkpointing.
    """

    def __init__(self, dim: int, heads: int, window: int, expand: int, focal: int) -> None:
        super().__init__()
        self.pool_layers = nn.ModuleList([WindowPool(window)])
        self.norm1 = nn.LayerNorm(dim)
        self.attn = FocalAttention(dim, heads, window, expand, focal)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = GeluMlp(dim, ends_block=True)

    def forward(self, tokens: Tensor, grids: Grids, keep_attn: Tensor | None, keep_mlp: Tensor | None) -> Tensor:
        """Map tokens [N, C] to [N, C]; keep_* [N, 1] are the branches' drop-path factors (0: dropped), None is 1."""
        normed = self.norm1(tokens)
        tokens = add_branch(tokens, self.attn(normed, self.pool_layers[0](normed, grids), grids), keep_attn)
        return add_branch(tokens, self.mlp(self.norm2(tokens)), keep_mlp)


def quads(maps: Tensor) -> Tensor:
    """Map maps [n, H, W, C], zero-padded to even sides, to rows of 2×2 tokens (y, x, C): [n·⌈H/2⌉·⌈W/2⌉, 4C]."""
    windows = as_windows(maps, 2)  # [n, ⌈H/2⌉, 2, ⌈W/2⌉, 2, C]
    return windows.transpose(2, 3).reshape(-1, 4 * maps.shape[-1])
