"""The wrapper of a trunk for exporters: it takes images of one size, and its outputs have a batch dimension."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from esvit_scale.models.trunk import Trunk


class PlainTrunk(nn.Module):
    """A trunk as a module that exporters can trace, for images [B, channels, S, S] of one size S.

    It calls the trunk's own forward, whose traced graph must be valid for any batch size. Trunks for which it is not
    (Swin) override `Trunk.plain`.
    """

    @torch.no_grad()
    def __init__(self, trunk: "Trunk", size: int) -> None:
        super().__init__()
        self.trunk = trunk
        # This call makes and caches the index tables: made while an exporter traces, they would have no values.
        trunk([next(trunk.parameters()).new_zeros(2, trunk.in_chans, size, size)])

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Map images [B, channels, S, S] to the view [B, C] and, from a trunk that has them, the regions [B, T, C]."""
        view, regions, *_ = self.trunk([images])
        return (view, regions.view(images.shape[0], -1, regions.shape[1])) if self.trunk.has_regions else (view,)
