"""Adaptation of trunks to images with other than three channels: only the first layer is replaced."""

from typing import cast

from torch import nn

from esvit_scale.models.trunk import Trunk


def take_channels(trunk: Trunk, channels: int) -> Trunk:
    """Replace the trunk's patch projection, in place, by one for images of `channels` channels, and return the trunk.

    The projection is a newly constructed module, so that ZeRO-3 partitions it like any other. Its values are not those
    of the old one: the caller initialises them with the rest of the network.
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
    """Return a new layer like `old` for `channels` input channels.

    It is made by `old.for_channels` if the layer has that method, else it is a plain convolution with `old`'s settings.
    """
    if (own := getattr(old, "for_channels", None)) is not None:
        return own(channels)  # type: ignore[no-any-return]
    padding = cast(tuple[int, int], old.padding)
    return nn.Conv2d(channels, old.out_channels, old.kernel_size[0], old.stride[0], padding, bias=old.bias is not None)
