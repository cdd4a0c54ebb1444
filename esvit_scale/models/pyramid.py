"""The feature pyramid of a trunk: one map per stage, as detection and segmentation models take it from a backbone."""

from torch import Tensor, nn

from esvit_scale.errors import UserError
from esvit_scale.models.trunk import Trunk


class Pyramid(nn.Module):
    """A module that returns a trunk's feature maps, one per stage, finest first; it shares the trunk's parameters.

    A map is the output of a stage's last block, without the trunk's final norm (as with timm's `features_only`),
    because detectors have their own norms. Any input size works: a side that is not a multiple of a stage's reduction
    is padded, so that the map has ⌈side / reduction⌉ cells along it. CvT and ViL ignore the remaining pixels instead,
    as published.

    Attributes:
        channels: C_s of every stage.
        reductions: pixels along a side of a cell, of every stage.

    Raises:
        UserError: the trunk has no stages.
    """

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        if not isinstance(trunk, Trunk) or not trunk.reductions:
            raise UserError(f"a feature pyramid needs a trunk with stages; {type(trunk).__name__} has none")
        self.trunk = trunk
        self.channels, self.reductions = list(trunk.channels), list(trunk.reductions)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map normalised images [B, channels, H, W] to one map [B, C_s, H_s, W_s] for every stage s."""
        maps = []
        for tokens, [(n, h, w)], _ in self.trunk.stage_maps([images]):
            maps.append(tokens.view(n, h, w, -1).permute(0, 3, 1, 2).contiguous())
        return maps
