"""EsViT's step written plainly with timm's Swin modules, for timing beside ours where there is no clone of the official code.

Every resolution is a forward pass of its own, all logits are stored, and weights are fp32 (in bf16, under autocast), as in
the official code.
"""

from pathlib import Path
from typing import Any

import torch
from official import OfficialStep, swin_arguments
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn
from torch.nn import functional as F

from esvit_scale.config import Config

Outputs = tuple[Tensor, Tensor, Tensor, list[int]]  # view logits, region logits, regions, tokens of a crop of each view


class TimmStep(OfficialStep):
    """The official step with timm's Swin V1 or V2, plain heads and a plain view and region loss."""

    @staticmethod
    def modules(clone: Path, config: Config, device: torch.device) -> tuple[Any, Any, Any]:
        """Return student, teacher and loss for `config` on `device`; `clone` is not used."""
        network = lambda: TimmNetwork(config).to(device)  # noqa: E731
        return network(), network(), PlainLoss(config.objective.prototypes).to(device)


class TimmNetwork(nn.Module):
    """A Swin trunk of timm with a head for views and one for regions."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        kind: Any = SwinTransformerV2 if config.model.trunk.startswith("swinv2") else SwinTransformer
        self.trunk = kind(**swin_arguments(config), strict_img_size=False)
        self.heads = nn.ModuleList(Head(self.trunk.num_features, config.objective.prototypes) for _ in range(2))

    def forward(self, crops: list[Tensor]) -> Outputs:
        """Return the `Outputs` of crops, each [B, 3, S, S]; crops of one size share a forward pass."""
        maps: list[Tensor] = []
        for size in dict.fromkeys(crop.shape[-1] for crop in crops):
            same = [crop for crop in crops if crop.shape[-1] == size]
            maps += self.trunk.forward_features(torch.cat(same)).flatten(1, 2).chunk(len(same))  # each [B, T, C]
        regions = torch.cat([tokens.flatten(0, 1) for tokens in maps])
        views = torch.cat([tokens.mean(1) for tokens in maps])
        return self.heads[0](views), self.heads[1](regions), regions, [tokens.shape[1] for tokens in maps]


class Head(nn.Module):
    """DINO's head: an MLP, a unit vector, and prototypes with weight normalisation."""

    def __init__(self, dim: int, prototypes: int, hidden: int = 2048, bottleneck: int = 256) -> None:
        super().__init__()
        wide = nn.Linear(hidden, hidden)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), wide, nn.GELU(), nn.Linear(hidden, bottleneck))
        self.last = nn.utils.parametrizations.weight_norm(nn.Linear(bottleneck, prototypes, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """Map features [n, C] to logits [n, K]."""
        return self.last(F.normalize(self.mlp(x), dim=-1))


class PlainLoss(nn.Module):
    """The view and region losses, pair of views by pair of views, with centred teachers."""

    centers: Tensor  # [2, K]

    def __init__(self, prototypes: int) -> None:
        super().__init__()
        self.register_buffer("centers", torch.zeros(2, prototypes))

    def forward(self, student: Outputs, teacher: Outputs, *_: Any) -> Tensor:
        """Return the mean over pairs (teacher's view, student's other view) of half the view and half the region loss."""
        views_s, regions_s = (F.log_softmax(x / 0.1, -1) for x in student[:2])
        views_t, regions_t = (F.softmax((x - c) / 0.04, -1) for x, c in zip(teacher[:2], self.centers, strict=True))
        n = len(views_t) // 2
        split = lambda x, tokens: [part.view(n, -1, x.shape[1]) for part in x.split([n * t for t in tokens])]  # noqa: E731
        losses = []
        targets = zip(views_t.split(n), split(regions_t, teacher[3]), split(teacher[2], teacher[3]), strict=True)
        for i, (view_t, probabilities, keys) in enumerate(targets):
            found = zip(views_s.split(n), split(regions_s, student[3]), split(student[2], student[3]), strict=True)
            for j, (view_s, log_q, queries) in enumerate(found):
                if i == j:
                    continue
                similarity = F.normalize(queries, dim=-1) @ F.normalize(keys, dim=-1).transpose(1, 2)
                match = similarity.argmax(-1)[..., None].expand(-1, -1, log_q.shape[2])  # [B, T, K]
                region = -(probabilities.gather(1, match) * log_q).sum(-1).mean()
                losses.append(0.5 * region - 0.5 * (view_t * view_s).sum(-1).mean())
        self.centers.lerp_(torch.stack([x.float().mean(0) for x in teacher[:2]]), 0.1)
        return torch.stack(losses).mean()
