"""Feature maps of every stage, as detectors and segmenters take them from a backbone."""

from torch import Tensor, nn

from esvit_scale.errors import UserError
from esvit_scale.models.trunk import Trunk


class Pyramid(nn.Module):
    """A trunk that returns one map per stage, finest first; trainable like the trunk, whose parameters it shares.

    The maps are those after each stage's last block, without the trunk's final norm (as timm's `features_only`): a
    detector has norms of its own. Any input size works; a side that is not a multiple of the reduction is padded, so a
    map has ⌈side / reduction⌉ cells along it (CvT and ViL leave the remaining pixels out, as published).

    Raises:
        UserError: a trunk without stages.
    """

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        if not isinstance(trunk, Trunk) or not trunk.reductions:
            raise UserError(f"a feature pyramid needs a trunk with stages; {type(trunk).__name__} has none")
        self.trunk = trunk
        self.channels, self.reductions = list(trunk.channels), list(trunk.reductions)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map normalised images [B, 3, H, W] to [B, C_s, H_s, W_s] for every stage s."""
        maps = []
        for tokens, [(n, h, w)], _ in self.trunk.stage_maps([images]):
            maps.append(tokens.view(n, h, w, -1).permute(0, 3, 1, 2).contiguous())
        return maps
