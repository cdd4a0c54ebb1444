"""The packed list of all crops' tokens [N, C], seen resolution by resolution."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from esvit_scale.models.trunk import Grid


def split(tokens: Tensor, grids: Sequence[Grid]) -> tuple[Tensor, ...]:
    """Split tokens [N, C] into those of every resolution, [n·h·w, C]."""
    return tokens.split([n * h * w for n, h, w in grids])


def groups(tokens: Tensor, grids: Sequence[Grid]) -> Iterator[tuple[Tensor, Grid]]:
    """Pair the tokens of every resolution with their grid."""
    return zip(split(tokens, grids), grids, strict=True)


def as_maps(tokens: Tensor, grids: Sequence[Grid]) -> list[Tensor]:
    """View tokens [N, C] as maps [n, h, w, C] of every resolution."""
    return [group.view(n, h, w, -1) for group, (n, h, w) in groups(tokens, grids)]


def crop_means(tokens: Tensor, grids: Sequence[Grid]) -> Tensor:
    """Return the mean of every crop's tokens, [ΣB, C]."""
    return torch.cat([group.view(n, h * w, -1).mean(1) for group, (n, h, w) in groups(tokens, grids)])
