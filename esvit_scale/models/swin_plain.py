"""A Swin for exporters: images of one size, a separate batch dimension, and all index tables constant.

The index tables of the packed Swin depend on the batch, so an exported graph would be valid for one batch size only.
The classes here use the packed trunk's modules and weights and give the same results, but index tokens within one
image. They are for inference only.
"""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esvit_scale.models.windows import MASKED, window_cells

if TYPE_CHECKING:
    from esvit_scale.models.swin import Block, PatchMerging, Stage, Swin


class PlainSwin(nn.Module):
    """A Swin of either version whose forward maps images [B, channels, S, S] to view [B, C] and regions [B, T, C]."""

    def __init__(self, trunk: "Swin", size: int) -> None:
        super().__init__()
        self.patch = trunk.reductions[0]
        self.embed, self.norm, self.side = trunk.patch_embed, trunk.norm, -(-size // self.patch)
        self.pad = self.side * self.patch - size
        side, stages = self.side, []
        for stage in trunk.stages:
            stages.append(_PlainStage(stage, side))
            side = -(-side // 2)
        self.stages = nn.ModuleList(stages)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Map images [B, channels, S, S] to view [B, C] and regions [B, T, C]."""
        if self.pad:
            images = F.pad(images, (0, self.pad, 0, self.pad))
        proj = self.embed.proj
        tokens = F.conv2d(images, proj.weight, proj.bias, stride=self.patch).flatten(2).transpose(1, 2)  # [B, T, C]
        tokens = self.embed.norm(tokens)
        for index in range(len(self.stages)):
            tokens = self.run_stage(index, tokens)
        regions = self.norm(tokens)
        return regions.mean(1), regions

    def run_stage(self, index: int, tokens: Tensor) -> Tensor:
        """Map the tokens [B, T, C] of a stage to those of the next one; sparse trunks override this."""
        mapped: Tensor = self.stages[index](tokens)
        return mapped


class _PlainStage(nn.Module):
    def __init__(self, stage: "Stage", side: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            _PlainBlock(block, side, stage.window, shift)  # type: ignore[arg-type]
            for block, shift in zip(stage.blocks, stage.shifts, strict=True)
        )
        down = stage.downsample
        self.merging = _PlainMerging(down, side) if down is not None else nn.Identity()  # type: ignore[arg-type]

    def forward(self, tokens: Tensor) -> Tensor:
        for block in self.blocks:
            tokens = block(tokens)
        return self.merging(tokens)


class _PlainBlock(nn.Module):
    cells: Tensor  # int64 [windows · L]: the token of each slot, T for a pad
    place: Tensor  # int64 [T]: the slot of each token
    mask: Tensor  # [windows, 1, L, L], added to the scores
    bias: Tensor  # [heads, L, L]
    block: "Block"

    def __init__(self, block: "Block", side: int, window: int, shift: int) -> None:
        super().__init__()
        self.block = block
        self.length, self.tokens = window**2, side**2
        cells, apart = window_cells(side, side, window, shift)  # [windows, L], bool [windows, L, L]
        flat = cells.reshape(-1)
        place = np.empty(self.tokens, dtype=np.int64)
        place[flat[flat >= 0]] = np.flatnonzero(flat >= 0)
        self.register_buffer("cells", torch.from_numpy(np.where(flat >= 0, flat, self.tokens)), persistent=False)
        self.register_buffer("place", torch.from_numpy(place), persistent=False)
        self.register_buffer("mask", torch.from_numpy(apart)[:, None].float() * MASKED, persistent=False)
        with torch.no_grad():  # constant, because it depends on the weights alone
            self.register_buffer("bias", block.attn.position_bias(self.cells.device).clone(), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:  # [B, T, C]
        return self.block.with_attention(tokens, self.attention, None, None)

    def attention(self, tokens: Tensor) -> Tensor:
        """Map normed tokens [B, T, C] to what window attention adds to them."""
        attn = self.block.attn
        # One zero token is appended, which all pads index: [B, T + 1, 3C].
        qkv = F.linear(F.pad(tokens, (0, 0, 0, 1)), attn.qkv.weight, attn.qkv_bias())
        heads, depth = len(self.bias), tokens.shape[-1] // len(self.bias)
        slots = qkv.index_select(1, self.cells).unflatten(1, (-1, self.length)).unflatten(3, (3, heads, depth))
        q, k, v = slots.permute(3, 0, 1, 4, 2, 5).unbind(0)  # each [B, windows, heads, L, d]
        q, k = attn.scaled(q, k)
        scores = q @ k.transpose(-2, -1) + self.bias + self.mask
        mixed = (scores.softmax(-1) @ v).transpose(2, 3).flatten(3).flatten(1, 2)  # [B, slots, C]
        return attn.proj(mixed.index_select(1, self.place))


class _PlainMerging(nn.Module):
    cells: Tensor  # int64 [4 T']: the four tokens of each merged token, T for a pad
    merging: "PatchMerging"

    def __init__(self, merging: "PatchMerging", side: int) -> None:
        super().__init__()
        self.merging = merging
        half = -(-side // 2)
        padded = np.full((2 * half, 2 * half), side**2)
        padded[:side, :side] = np.arange(side**2).reshape(side, side)
        quads = padded.reshape(half, 2, half, 2).transpose(0, 2, 3, 1).reshape(-1)  # (0,0), (1,0), (0,1), (1,1)
        self.register_buffer("cells", torch.from_numpy(quads), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:  # [B, T, C] → [B, T', 2C]
        quads = F.pad(tokens, (0, 0, 0, 1)).index_select(1, self.cells).unflatten(1, (-1, 4)).flatten(2)
        return self.merging.reduce(quads)
