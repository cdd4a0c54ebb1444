"""Views of the packed tokens [N, C] of all crops, by resolution."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from esvit_scale.models.trunk import Grid


def split(tokens: Tensor, grids: Sequence[Grid]) -> tuple[Tensor, ...]:
    """Split packed tokens [N, C] into one tensor [n·h·w, C] per resolution."""
    return tokens.split([n * h * w for n, h, w in grids])


def groups(tokens: Tensor, grids: Sequence[Grid]) -> Iterator[tuple[Tensor, Grid]]:
    """Return pairs (tokens [n·h·w, C], grid), one per resolution, from packed tokens [N, C]."""
    return zip(split(tokens, grids), grids, strict=True)


def as_maps(tokens: Tensor, grids: Sequence[Grid]) -> list[Tensor]:
    """View packed tokens [N, C] as one tensor of maps [n, h, w, C] per resolution."""
    return [group.view(n, h, w, -1) for group, (n, h, w) in groups(tokens, grids)]


def crop_means(tokens: Tensor, grids: Sequence[Grid]) -> Tensor:
    """Return the mean of each crop's tokens, [ΣB, C], from the packed tokens [N, C] of all crops."""
    return torch.cat([group.view(n, h * w, -1).mean(1) for group, (n, h, w) in groups(tokens, grids)])
