"""Swin V1 on packed batches: one forward pass over all crops of all sizes.

Swin Transformer (Liu et al. 2021) as EsViT runs it (Li et al. 2022). A stage's windows have the same size for every
crop, so the tokens of all crops form one list [N, C]: per-token layers run once over it, and the windows of all crops
share one attention call. The results equal those of one pass per resolution, and ZeRO-3 gathers each layer only once.

Parameter names are the official ones, so checkpoints map by name.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esvit_scale.models import swin_detectors, swin_forms
from esvit_scale.models.attention_maps import BlockAttention, before_forward
from esvit_scale.models.block_parts import GeluMlp, add_branch
from esvit_scale.models.descriptions import DetectorForm, HuggingFaceForm, TimmForm, TrunkCard, TrunkFormulas
from esvit_scale.models.distributions import Initializer, normal
from esvit_scale.models.drop_path import keep_scales, linear_rates, token_factors
from esvit_scale.models.masking import Mask
from esvit_scale.models.patches import PatchProjection
from esvit_scale.models.products import Linear
from esvit_scale.models.swin_costs import SwinFormulas
from esvit_scale.models.swin_plain import PlainSwin
from esvit_scale.models.tokens import crop_means, split
from esvit_scale.models.trunk import Features, MaskGeometry, TokenMap, Trunk
from esvit_scale.models.window_attention import attend_math, attention_probabilities, bias_of_pairs
from esvit_scale.models.window_attention_implementations import AttendWindows
from esvit_scale.models.windows import (
    Grids,
    Permutation,
    WindowLayout,
    WindowPlan,
    merge_plan,
    merged,
    storage_plan,
    total_tokens,
    window_partition,
    window_plan,
    window_reverse,
)

PATCH = 4  # pixels
NORM_EPS = 1e-6

Attend = Callable[[Tensor], Tensor]  # tokens […, C] → […, C]
# (index of a block, its tokens [N, C], grids) → the block's inputs after the drop factors
BlockInputs = Callable[[int, Tensor, Grids], tuple[Tensor | None, ...]]


class Swin(Trunk):
    """A Swin V1 trunk; the subclass SwinV2 (models/swin_v2.py) has other blocks and another patch merging.

    Args:
        embed_dim: C of the first stage; it doubles at each further stage.
        depths, heads: number of blocks, and of attention heads in each of them, per stage.
        window: tokens along a window's side. A stage whose map (of a global crop) is not larger than the window has
            one window of the map's size and no shift.
        size: side of the global crops in pixels. It decides each stage's window and shift, also for other crop sizes.
        drop_path: stochastic-depth rate of the last block; rates grow linearly from 0.
    """

    norm_eps = NORM_EPS
    has_attention_maps = True
    has_ladder = True

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
        self.embed_dim, self.depths, self.heads, self.window = embed_dim, tuple(depths), tuple(heads), window
        self.dim = embed_dim * 2 ** (len(depths) - 1)
        self.drop_rates = linear_rates(drop_path, sum(depths))
        self.patch_embed = PatchEmbed(embed_dim, self.norm_eps)
        stages = []
        for s, (depth, n_heads) in enumerate(zip(depths, heads, strict=True)):
            side, shift = stage_window(size, window, s)
            width = embed_dim * 2**s
            blocks = [self.make_block(s, i, width, n_heads, side) for i in range(depth)]
            stages.append(Stage(blocks, side, shift, self.make_merging(width) if s < len(depths) - 1 else None))
        self.layers = nn.ModuleList(stages)
        self.norm = nn.LayerNorm(self.dim, eps=self.norm_eps)
        self.channels = tuple(embed_dim * 2**s for s in range(len(depths)))
        self.reductions = tuple(PATCH * 2**s for s in range(len(depths)))

    def make_block(self, stage: int, index: int, dim: int, heads: int, window: int) -> nn.Module:
        """Return the new block `index` (from 0) of a stage, of width `dim`; SwinV2 overrides this."""
        return Block(dim, heads, window)

    def make_merging(self, dim: int) -> nn.Module:
        """Return the new patch merging that follows a stage of width `dim`; SwinV2 overrides this."""
        return PatchMerging(dim)

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
        return MaskGeometry(self.embed_dim, PATCH, 2 ** (len(self.depths) - 1))

    @property
    def patch_projection(self) -> nn.Module:
        """The first layer, which `model.freeze_patch_embed` keeps at its random values."""
        return self.patch_embed.proj

    def formulas(self) -> TrunkFormulas:
        """Return the formulas for the trunk's FLOPs and activation memory."""
        return SwinFormulas(self)

    def card(self) -> TrunkCard:
        """Return what a model card says about the trunk."""
        return swin_forms.card(self, "Swin")

    def plain(self, size: int) -> nn.Module:
        """Return a module for exporters with the same weights, and constant index tables for images of one size."""
        return PlainSwin(self, size)

    def timm_form(self, size: int) -> TimmForm:
        """Return a description of the trunk as a timm network.

        Raises:
            UserError: at `size` pixels a window needs padding, which timm does differently.
        """
        return swin_forms.timm_v1(self, size)

    def huggingface_form(self, size: int) -> HuggingFaceForm:
        """Return a description of the trunk as a transformers model.

        Raises:
            UserError: at `size` pixels a window needs padding, or a map is smaller than `window`; transformers does
                both differently.
        """
        return swin_forms.huggingface_v1(self, size)

    def detector_form(self, library: str) -> DetectorForm:
        """Return how the trunk's weights are written for mmdet, detectron2 or torchvision.

        Raises:
            UserError: a map of the global crops is smaller than `window`, or torchvision lacks the number of channels.
        """
        return swin_detectors.detector_v1(self, library)

    def use_attention(self, attend: AttendWindows) -> None:
        """Let every block compute its window attention with this one of window_attention_implementations.py."""
        for block in self.blocks:
            cast(WindowAttention, block.attn).attend = attend

    def window_layouts(self, crops: Sequence[tuple[int, int]], device: torch.device) -> list[WindowLayout]:
        """Return the layout of the windows of every stage and shift, for a batch of (number, side in pixels) crops."""
        grids: Grids = tuple((n, -(-size // PATCH), -(-size // PATCH)) for n, size in crops)
        found = []
        for width, heads, stage in zip(self.channels, self.heads, self.stages, strict=True):
            for shift in dict.fromkeys(stage.shifts):
                plan = window_plan(grids, stage.window, shift, device)
                found.append(WindowLayout(plan, heads, width // heads, stage.shifts.count(shift)))
            grids = merged(grids)
        return found

    def forward(self, crops: list[Tensor], drop_keys: Tensor | None = None, mask: Mask | None = None) -> Features:
        """Compute `Trunk.forward`; crops whose sides are no multiples of 4 are padded with zeros on the right and below."""
        *_, (tokens, grids, window) = self._block_outputs(crops, drop_keys, mask)
        regions = window_reverse(self.norm(tokens), storage_plan(grids, window, tokens.device))  # [ΣB·T, C]
        return Features(crop_means(regions, grids), regions, list(grids))

    def block_maps(self, crops: list[Tensor]) -> Iterator[TokenMap]:
        """Yield the token map of every block, row-major, before the final norm."""
        for tokens, grids, window in self._block_outputs(crops, None):
            yield TokenMap(window_reverse(tokens, storage_plan(grids, window, tokens.device)), list(grids))

    @torch.no_grad()
    def attention_maps(self, image: Tensor) -> list[BlockAttention]:
        """Return every block's attention on one normalised image [channels, H, W], with the tokens of each window."""
        found: list[BlockAttention] = []
        grids: Grids = ((1, -(-image.shape[1] // PATCH), -(-image.shape[2] // PATCH)),)
        layout = []  # per block, in order: stage, index within the stage, grids, side of its windows
        for s, stage in enumerate(self.stages):
            layout += [(s, i, grids, stage.window) for i in range(len(stage.blocks))]
            grids = merged(grids)

        def record(module: "WindowAttention", inputs: tuple[Tensor, WindowPlan]) -> None:
            tokens, plan = inputs
            s, i, grids, window = layout[len(found)]
            qkv, bias = module.operands(tokens, plan)
            _, probabilities = attention_probabilities(qkv, bias, plan.masks)
            cells = storage_plan(grids, window, tokens.device).tokens[plan.slots.tokens]
            cells[plan.slots.pads] = -1
            _, h, w = grids[0]
            found.append(BlockAttention(s, i, (h, w), probabilities.cpu(), cells.view(-1, plan.window**2).cpu()))

        with before_forward([cast(nn.Module, block.attn) for block in self.blocks], record):
            self([image[None]])
        return found

    def block_inputs(self, drop_keys: Tensor | None) -> BlockInputs:
        """Return the function that gives further inputs of each block of a forward; sparse trunks override this."""
        return lambda i, tokens, grids: ()

    def _block_outputs(
        self,
        crops: list[Tensor],
        drop_keys: Tensor | None,
        mask: Mask | None = None,
        inputs: BlockInputs | None = None,
    ) -> Any:
        """Yield (tokens, grids, window) after each block; tokens [N, C] are in the stage's storage order."""
        inputs = inputs or self.block_inputs(drop_keys)
        grids: Grids = tuple((len(x), -(-x.shape[-2] // PATCH), -(-x.shape[-1] // PATCH)) for x in crops)
        windows = [stage.window for stage in self.stages]
        device = crops[0].device
        scales = keep_scales(drop_keys, torch.tensor(self.drop_rates)) if drop_keys is not None else None
        order = storage_plan(grids, windows[0], device)
        tokens = self.patch_embed(crops, grids, order)  # [N, C]
        if mask is not None:
            tokens = mask.hide(tokens, grids, self.mask_geometry.patches, order)
        i = 0
        for s, stage in enumerate(self.stages):
            plans = [window_plan(grids, stage.window, shift, device) for shift in stage.shifts]
            for block, plan in zip(stage.blocks, plans, strict=True):
                keep = token_factors(scales, self.drop_rates, i, grids, tokens.dtype)
                tokens = self.run_block(block, tokens, plan, *keep, *inputs(i, tokens, grids))
                i += 1
                yield tokens, grids, stage.window
            if stage.downsample is not None:
                tokens = stage.downsample(tokens, merge_plan(grids, stage.window, windows[s + 1], device))
                grids = merged(grids)


class PatchEmbed(nn.Module):
    """Patch embedding: a linear projection of patches of 4×4 pixels to tokens, then a layer norm."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.proj = PatchProjection(3, dim, PATCH)
        self.norm = nn.LayerNorm(dim, eps=eps)

    def forward(self, crops: list[Tensor], grids: Grids, order: Permutation) -> Tensor:
        """Map crops [N_g, channels, S_g, S_g] to tokens [N, C] in the first stage's storage order."""
        channels = self.proj.in_channels
        patches = crops[0].new_empty(total_tokens(grids), channels * PATCH * PATCH, dtype=self.proj.weight.dtype)
        for rows, crop, (n, h, w) in zip(split(patches, grids), crops, grids, strict=True):
            crop = crop.to(patches.dtype)
            if crop.shape[-2:] != (h * PATCH, w * PATCH):
                crop = F.pad(crop, (0, w * PATCH - crop.shape[-1], 0, h * PATCH - crop.shape[-2]))
            cells = crop.view(n, channels, h, PATCH, w, PATCH).permute(0, 2, 4, 1, 3, 5)
            rows.view(n, h, w, channels, PATCH, PATCH).copy_(cells)
        return self.norm(self.proj(window_partition(patches, order)))


class Stage(nn.Module):
    """A container for a stage's blocks and the patch merging after them. It has no forward: `Swin` calls its parts."""

    def __init__(self, blocks: list[nn.Module], window: int, shift: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.window = window
        self.shifts = [shift if i % 2 else 0 for i in range(len(blocks))]
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample


class Block(nn.Module):
    """A pre-norm block: window attention, then an MLP.

    It is called once per forward, for all crops: ZeRO-3 gathers it once, checkpointing recomputes it as a whole.
    """

    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = WindowAttention(dim, heads, window)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = GeluMlp(dim, ends_block=True)

    def forward(self, tokens: Tensor, plan: WindowPlan, keep_attn: Tensor | None, keep_mlp: Tensor | None) -> Tensor:
        """Map tokens [N, C] to [N, C]; keep_attn and keep_mlp [N, 1] scale the two branches (0: dropped, None: 1)."""
        return self.with_attention(tokens, lambda x: self.attn(x, plan), keep_attn, keep_mlp)

    def with_attention(
        self, tokens: Tensor, attention: Attend, keep_attn: Tensor | None, keep_mlp: Tensor | None
    ) -> Tensor:
        """Compute the block with the function `attention` in place of the block's own window attention."""
        tokens = add_branch(tokens, attention(self.norm1(tokens)), keep_attn)
        return add_branch(tokens, self.mlp(self.norm2(tokens)), keep_mlp)


class WindowAttention(nn.Module):
    """Window attention, softmax(QKᵀ/√d + relative position bias + mask) V; qkv and proj run on real tokens only."""

    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.window = window
        self.attend: AttendWindows = attend_math  # `Swin.use_attention` replaces it
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.qkv = SlotLinear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor, plan: WindowPlan) -> Tensor:  # [N, C] → [N, C]
        """Map tokens [N, C] to [N, C]."""
        mixed = self.attend(self.qkv(tokens, plan.slots), self.bias_table(tokens.device), plan)  # [slots, C]
        return self.proj(window_reverse(mixed, plan.slots))

    def initial_values(self) -> dict[str, Initializer]:
        """Return the initialiser of the position-bias table."""
        return {"relative_position_bias_table": normal(0.02)}

    def operands(self, tokens: Tensor, plan: WindowPlan) -> tuple[Tensor, Tensor]:
        """Return the inputs of `attention_probabilities`: qkv [slots, 3C] and the position bias [heads, L, L]."""
        return self.qkv(tokens, plan.slots), self.position_bias(tokens.device)

    def qkv_bias(self) -> Tensor:
        """Return the bias of queries, keys and values, [3C]."""
        return self.qkv.bias

    def scaled(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Scale queries and keys […, heads, L, d] so that q kᵀ is the attention score before bias and mask."""
        return q * q.shape[-1] ** -0.5, k

    def position_bias(self, device: torch.device) -> Tensor:
        """Return the relative position bias, [heads, L, L] with L = window²."""
        return bias_of_pairs(self.bias_table(device), self.window)

    def bias_table(self, device: torch.device) -> Tensor:
        """Return the position bias of every relative distance, [(2·window − 1)², heads]."""
        return self.relative_position_bias_table


class SlotLinear(Linear):
    """A linear layer that runs on real tokens only and puts its outputs into window slots.

    Swin pads with zero tokens, for which the layer's output is its bias: the slots of pads are filled with that.
    """

    def forward(self, tokens: Tensor, plan: Permutation) -> Tensor:  # type: ignore[override]  # [N, C] → [slots, 3C]
        """Map tokens [N, C] to window slots [slots, 3C]."""
        return window_partition(super().forward(tokens), plan, fill=self.bias)


class PatchMerging(nn.Module):
    """Patch merging: 2×2 neighbouring tokens become one of twice the width; odd maps are padded with zeros."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(4 * dim, eps=NORM_EPS)

    def forward(self, tokens: Tensor, plan: Permutation) -> Tensor:
        """Map the tokens [N, C] of all crops to merged tokens [N', 2C]."""
        return self.reduce(window_partition(tokens, plan).view(-1, 4 * tokens.shape[1]))

    def reduce(self, quads: Tensor) -> Tensor:
        """Map four neighbouring tokens, concatenated to […, 4C], to one merged token […, 2C]."""
        return self.reduction(self.norm(quads))


def stage_window(size: int, window: int, stage: int) -> tuple[int, int]:
    """Return (side, shift) in tokens of the windows of a stage (from 0), for global crops of `size` pixels.

    A map that is not larger than `window` is one window without a shift.
    """
    resolution = size // PATCH // 2**stage
    return (resolution, 0) if resolution <= window else (window, window // 2)
