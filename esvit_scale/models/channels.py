"""Trunks for images of other than three channels: built as published, then given a patch projection of that width."""

from typing import cast

from torch import nn

from esvit_scale.models.trunk import Trunk


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
    return trunk


def _projection(old: nn.Conv2d, channels: int) -> nn.Module:
    """Return a projection for `channels` channels: the layer's own `for_channels`, or a convolution like it."""
    if (own := getattr(old, "for_channels", None)) is not None:
        return own(channels)  # type: ignore[no-any-return]
    padding = cast(tuple[int, int], old.padding)
    return nn.Conv2d(channels, old.out_channels, old.kernel_size[0], old.stride[0], padding, bias=old.bias is not None)
