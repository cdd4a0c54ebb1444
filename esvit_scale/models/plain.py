"""The form of a trunk that exporters take: images of one size in, the batch a dimension of its own."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from esvit_scale.models.trunk import Trunk


class PlainTrunk(nn.Module):
    """A trunk whose own forward already treats images of one size as a batch dimension."""

    @torch.no_grad()
    def __init__(self, trunk: "Trunk", size: int) -> None:
        super().__init__()
        self.trunk = trunk
        # Index tables are made at first use and cached: while an exporter traces, they would be its placeholders.
        trunk([next(trunk.parameters()).new_zeros(2, trunk.in_chans, size, size)])

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Map images [B, channels, S, S] to view [B, C] and regions [B, T, C]; without regions to the view alone."""
        view, regions, _ = self.trunk([images])
        return (view, regions.view(images.shape[0], -1, regions.shape[1])) if self.trunk.has_regions else (view,)
