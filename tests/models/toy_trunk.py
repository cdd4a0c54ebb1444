"""A trunk that is no Swin: convolutional stem with batch norm, a vision transformer's blocks, torch's attention."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esvit_scale.config import Config
from esvit_scale.models.batch_norm import BatchNorm
from esvit_scale.models.drop_path import keep_scales
from esvit_scale.models.trunk import Features, Trunk

PATCH, DEPTH, HEADS = 8, 2, 2


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, tokens: Tensor, grids, keep: Tensor | None = None) -> Tensor:
        mixed = []
        for part, (n, h, w) in zip(self.qkv(self.norm1(tokens)).split(lengths(grids)), grids, strict=True):
            q, k, v = part.view(n, h * w, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
            mixed.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n * h * w, -1))
        branch = self.proj(torch.cat(mixed))
        tokens = tokens + (branch if keep is None else branch * keep)
        return tokens + self.fc2(F.gelu(self.fc1(self.norm2(tokens))))


class ToyTrunk(Trunk):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim, self.depths = dim, (DEPTH,)
        self.stem, self.norm = nn.Conv2d(3, dim, PATCH, stride=PATCH), BatchNorm(dim)
        self.layers = nn.ModuleList(Block(dim) for _ in range(DEPTH))

    @property
    def blocks(self):
        return list(self.layers)

    @property
    def patch_projection(self):
        return self.stem

    def forward(self, crops: list[Tensor], drop_keys: Tensor | None = None) -> Features:
        maps = [self.norm(self.stem(x.to(self.stem.weight.dtype))) for x in crops]
        grids = [(len(m), *m.shape[-2:]) for m in maps]
        tokens = torch.cat([m.flatten(2).transpose(1, 2).flatten(0, 1) for m in maps])
        keep = None
        if drop_keys is not None:
            scales = keep_scales(drop_keys, torch.tensor([0.5]))[0, 0].to(tokens.dtype)
            parts = zip(scales.split([n for n, _, _ in grids]), grids, strict=True)
            keep = torch.cat([s.repeat_interleave(h * w) for s, (_, h, w) in parts]).unsqueeze(-1)
        for block in self.layers:
            tokens = self.run_block(block, tokens, tuple(grids), keep)
        parts = zip(tokens.split(lengths(grids)), grids, strict=True)
        return Features(torch.cat([t.view(n, h * w, -1).mean(1) for t, (n, h, w) in parts]), tokens, grids)


def lengths(grids) -> list[int]:
    return [n * h * w for n, h, w in grids]


def build(config: Config) -> Trunk:
    return ToyTrunk(config.model.embed_dim or 16)
