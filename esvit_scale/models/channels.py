"""Trunks for images of other than three channels: built as published, then given a patch projection of that width."""

from typing import cast

import torch
from torch import Tensor, nn

from esvit_scale.models import resnet, swin
from esvit_scale.models.patches import PatchProjection, pixel_rows
from esvit_scale.models.swin import PATCH, Permutation, Swin
from esvit_scale.models.trunk import Trunk
from esvit_scale.models.windows import Grids, to_slots


def take_channels(trunk: Trunk, channels: int) -> Trunk:
    """Return the trunk with a patch projection that takes images of `channels` channels; all else stays as it is.

    The projection is a module made anew, so that ZeRO-3 partitions it like any other; its values are the run's to
    initialise.
    """
    if channels == trunk.in_chans:
        return trunk
    trunk.in_chans = channels
    old = cast(nn.Conv2d, trunk.patch_projection)
    new = _projection(old, channels)
    for module in list(trunk.modules()):
        for name, child in list(module.named_children()):
            if child is old:
                setattr(module, name, new)
    if isinstance(trunk, Swin):
        trunk.patch_embed.__class__ = PatchEmbed
    return trunk


def _projection(old: nn.Conv2d, channels: int) -> nn.Conv2d:
    out, kernel, stride = old.out_channels, old.kernel_size[0], old.stride[0]
    if isinstance(old, PatchProjection):
        return PatchProjection(channels, out, kernel)
    if isinstance(old, resnet.Conv):
        return resnet.Conv(channels, out, kernel, stride)
    return nn.Conv2d(channels, out, kernel, stride, cast(tuple[int, int], old.padding), bias=old.bias is not None)


class PatchEmbed(swin.PatchEmbed):
    """Swin's 4×4 patches → tokens, of images of any number of channels."""

    def forward(self, crops: list[Tensor], grids: Grids, order: Permutation) -> Tensor:
        """Crops [N_g, channels, S_g, S_g] → [N, C] in the first stage's order."""
        patches = torch.cat([pixel_rows(crop.to(self.proj.weight.dtype), PATCH) for crop in crops])
        return self.norm(self.proj(to_slots(patches, order)))
