"""ViL, EsViT's four-stage Vision Longformer (2, 2, 6 and 2 blocks), on packed batches: one pass over all crops.

Multi-Scale Vision Longformer (Zhang et al. 2021, https://arxiv.org/abs/2103.15358). Each stage embeds patches of the
previous stage's map, adds its own global tokens (1, 1, 1 and 0) and runs its blocks: in stages 1 and 2 a token attends
to the windows around it, in stages 3 and 4 to the whole map (models/vil_attention.py).

In training, the official code lets queries see their own window and one of the eight around it, drawn at random at
every call of a block; in evaluation they see all nine. Here each crop has its own draw for each block, a hash of its
drop key, which depends neither on the batch nor on the rank; for a single crop the distribution is the official one.
The teacher has no drop keys and sees all nine windows, as in evaluation. (The official teacher is never put into
evaluation mode, so it draws too, which makes its targets noisy.)

If the side of a stage's input is no multiple of the patch size, the remainder is cut off, as in the official code.
"""

import math
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from esvit_scale.config import Config
from esvit_scale.errors import UserError
from esvit_scale.models.block_parts import GeluMlp, add_branch
from esvit_scale.models.distributions import Initializer, normal
from esvit_scale.models.drop_path import draw_of, keep_scales, linear_rates, token_factors
from esvit_scale.models.masking import Mask
from esvit_scale.models.patches import PatchProjection
from esvit_scale.models.shape import Shape, overridden
from esvit_scale.models.tokens import crop_means
from esvit_scale.models.trunk import Features, Grid, MaskGeometry, TokenMap, Trunk
from esvit_scale.models.vil_attention import AROUND, OWN, FullAttention, LongAttention

VIL_2262 = Shape(96, (2, 2, 6, 2), (3, 6, 12, 24), growth=(1, 2, 4, 8))
PATCHES = (4, 2, 2, 2)  # per stage, side of a patch in cells of the previous stage; pixels in the first
GLOBALS = (1, 1, 1, 0)  # per stage, global tokens of a crop
LONG = (True, True, False, False)  # per stage, whether tokens attend to the windows around them, not the whole map
SMALLEST = 32  # pixels: the smallest side of a crop that leaves a token in stage 4
NORM_EPS = 1e-6


def build(config: Config) -> "ViL":
    """Build the ViL that the config describes.

    Raises:
        UserError: overrides do not fit together, or crops are too small to leave a token in stage 4.
    """
    shape = overridden(config, VIL_2262)
    where = ["data.global_crops.size", *(f"data.local_crops.{i}.size" for i in range(len(config.data.local_crops)))]
    sizes = [config.data.global_crops.size, *(crops.size for crops in config.data.local_crops)]
    for name, size in zip(where, sizes, strict=True):
        if size < SMALLEST:
            raise UserError(
                f"{name}: {size} pixels leave {config.model.trunk} no token in stage 4; nearest: {SMALLEST}"
            )
    size, window = config.data.global_crops.size, config.model.window
    return ViL(shape.widths, shape.depths, shape.heads, window, size, config.model.drop_path)


class ViL(Trunk):
    """A ViL trunk of four stages.

    Args:
        widths, depths, heads: C, number of blocks, and number of attention heads of each of the four stages.
        window: tokens along a window's side (stages 1 and 2).
        size: side of the global crops in pixels; the bias tables of stages 3 and 4 are made for their maps.
        drop_path: stochastic-depth rate of the last block; rates grow linearly from 0.
    """

    def __init__(
        self,
        widths: tuple[int, ...],
        depths: tuple[int, ...],
        heads: tuple[int, ...],
        window: int = 7,
        size: int = 224,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.dim, self.depths, self.channels = widths[-1], tuple(depths), tuple(widths)
        self.reductions = tuple(4 * 2**s for s in range(len(PATCHES)))
        self.drop_rates = linear_rates(drop_path, sum(depths))
        stages = []
        for s, (before, width) in enumerate(zip((3, *widths), widths, strict=False)):
            size //= PATCHES[s]
            reach = window if LONG[s] else size
            blocks = [Block(width, heads[s], GLOBALS[s], LONG[s], reach) for _ in range(depths[s])]
            stages.append(Stage(PatchEmbed(before, width, PATCHES[s], GLOBALS[s]), blocks))
        self.layers = nn.ModuleList(stages)
        self.norm = nn.LayerNorm(self.dim, eps=NORM_EPS)

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
        return MaskGeometry(self.channels[0], PATCHES[0], math.prod(PATCHES[1:]), cuts_remainder=True)

    @property
    def patch_projection(self) -> nn.Module:
        """The first layer, which `model.freeze_patch_embed` keeps at its random values."""
        return self.stages[0].patch_embed.proj

    def forward(self, crops: list[Tensor], drop_keys: Tensor | None = None, mask: Mask | None = None) -> Features:
        """Compute the features of all crops (`Trunk.forward`); a crop's view is the mean of its regions."""
        *_, (tokens, grids, _) = self._block_outputs(crops, drop_keys, mask)
        regions = self.norm(tokens)
        return Features(crop_means(regions, grids), regions, grids)

    def block_maps(self, crops: list[Tensor]) -> Iterator[TokenMap]:
        """Yield the token map of every block; the view of a crop in stages 1 to 3 is its global token."""
        return (_token_map(*output) for output in self._block_outputs(crops, None))

    def _block_outputs(
        self, crops: list[Tensor], drop_keys: Tensor | None, mask: Mask | None = None
    ) -> Iterator[tuple[Tensor, list[Grid], int]]:
        """Yield (tokens, grids, g) after each block: tokens [N, C], where each crop's g global tokens come first."""
        scales = keep_scales(drop_keys, torch.tensor(self.drop_rates)) if drop_keys is not None else None
        maps, i = crops, 0
        for s, (stage, g) in enumerate(zip(self.stages, GLOBALS, strict=True)):
            tokens, grids = stage.patch_embed(maps, mask if s == 0 else None, self.mask_geometry.patches)
            for block in stage.blocks:
                sequences = [(n, 1, g + h * w) for n, h, w in grids]
                keep = token_factors(scales, self.drop_rates, i, sequences, tokens.dtype)
                neighbours = sampled_neighbours(drop_keys, i) if drop_keys is not None and LONG[s] else None
                tokens = self.run_block(block, tokens, grids, *keep, neighbours)
                i += 1
                yield tokens, grids, g
            per_crop = zip(_per_crop(tokens, grids, g), grids, strict=True)
            maps = [rows[:, g:].unflatten(1, (h, w)).permute(0, 3, 1, 2) for rows, (_, h, w) in per_crop]


class Stage(nn.Module):
    """A container for a stage's patch embedding and blocks. It has no forward: `ViL` calls its parts."""

    def __init__(self, patch_embed: "PatchEmbed", blocks: list["Block"]) -> None:
        super().__init__()
        self.patch_embed = patch_embed
        self.blocks = nn.ModuleList(blocks)


class PatchEmbed(nn.Module):
    """Patch embedding: projects patches of p×p cells to tokens and norms them; each crop's global tokens come first."""

    def __init__(self, channels: int, dim: int, patch: int, globals_: int) -> None:
        super().__init__()
        self.proj = PatchProjection(channels, dim, patch)
        self.norm_embed = nn.LayerNorm(dim, eps=NORM_EPS)
        self.cls_token = nn.Parameter(torch.zeros(1, globals_, dim)) if globals_ else None

    def initial_values(self) -> dict[str, Initializer]:
        """Return the initialisers of the module's own parameters, by name (models/initialize.py)."""
        return {"cls_token": normal(0.02)} if self.cls_token is not None else {}

    def forward(self, maps: list[Tensor], mask: Mask | None = None, cell: int = 1) -> tuple[Tensor, list[Grid]]:
        """Embed maps, [N_g, channels, H, W] per resolution; return tokens [N, C], global ones included, and grids.

        Patches that `mask` hides, with `cell` patches along a cell's side, become its token.
        """
        patch = self.proj.stride[0]
        grids = [(x.shape[0], x.shape[2] // patch, x.shape[3] // patch) for x in maps]
        cells = [_patches(x.to(self.proj.weight.dtype), patch) for x in maps]
        tokens = self.norm_embed(self.proj(torch.cat(cells)))
        if mask is not None:
            tokens = mask.hide(tokens, grids, cell)
        if self.cls_token is None:
            return tokens, grids
        crops = [
            torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), 1).flatten(0, 1)
            for x in _per_crop(tokens, grids, 0)
        ]
        return torch.cat(crops), grids


class Block(nn.Module):
    """A pre-norm block: windowed or full attention, then an MLP.

    It is called once per forward, for all crops: ZeRO-3 gathers it once, checkpointing recomputes it as a whole.
    """

    def __init__(self, dim: int, heads: int, globals_: int, long: bool, reach: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = LongAttention(dim, heads, globals_, reach) if long else FullAttention(dim, heads, globals_, reach)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = GeluMlp(dim, ends_block=True)

    def forward(
        self,
        tokens: Tensor,
        grids: list[Grid],
        keep_attn: Tensor | None,
        keep_mlp: Tensor | None,
        neighbours: Tensor | None,
    ) -> Tensor:
        """Map tokens [N, C] to [N, C].

        Args:
            keep_attn, keep_mlp: [N, 1], the factors of the two branches (0: dropped); None: 1.
            neighbours: int64 [ΣB], as in `LongAttention`.
        """
        tokens = add_branch(tokens, self.attn(self.norm1(tokens), grids, neighbours), keep_attn)
        return add_branch(tokens, self.mlp(self.norm2(tokens)), keep_mlp)


def sampled_neighbours(drop_keys: Tensor, block: int) -> Tensor:
    """Return the index of a neighbouring window for every crop: int64 [ΣB], in 0 … 8 but never `OWN`.

    It is drawn uniformly, by a hash of the crop's drop key and the block.
    """
    drawn = draw_of(drop_keys, block, AROUND - 1)
    return drawn + (drawn >= OWN)


def _patches(x: Tensor, patch: int) -> Tensor:
    """Cut maps [n, channels, H, W] into patches [n·h·w, channels · p²]; a remainder right or bottom is left out."""
    h, w = x.shape[2] // patch, x.shape[3] // patch
    cells = x[:, :, : h * patch, : w * patch].unflatten(3, (w, patch)).unflatten(2, (h, patch))
    return cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(0, 2)


def _per_crop(tokens: Tensor, grids: list[Grid], g: int) -> list[Tensor]:
    """View packed tokens [N, C] as one tensor [n, g + h·w, C] per resolution."""
    groups = tokens.split([n * (g + h * w) for n, h, w in grids])
    return [rows.view(n, g + h * w, -1) for rows, (n, h, w) in zip(groups, grids, strict=True)]


def _token_map(tokens: Tensor, grids: list[Grid], g: int) -> TokenMap:
    if not g:
        return TokenMap(tokens, grids)
    crops = _per_crop(tokens, grids, g)
    return TokenMap(torch.cat([x[:, g:].flatten(0, 1) for x in crops]), grids, torch.cat([x[:, 0] for x in crops]))
