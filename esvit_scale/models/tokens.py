"""The packed list of all crops' tokens [N, C], seen resolution by resolution."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from esvit_scale.models.trunk import Grid


def split(tokens: Tensor, grids: Sequence[Grid]) -> tuple[Tensor, ...]:
    """[N, C] → [n·h·w, C] of every resolution."""
    return tokens.split([n * h * w for n, h, w in grids])


def groups(tokens: Tensor, grids: Sequence[Grid]) -> Iterator[tuple[Tensor, Grid]]:
    """The same with their grids."""
    return zip(split(tokens, grids), grids, strict=True)


def as_maps(tokens: Tensor, grids: Sequence[Grid]) -> list[Tensor]:
    """[N, C] → [n, h, w, C] of every resolution, views."""
    return [group.view(n, h, w, -1) for group, (n, h, w) in groups(tokens, grids)]


def crop_means(tokens: Tensor, grids: Sequence[Grid]) -> Tensor:
    """[N, C] → [ΣB, C], the mean of every crop's tokens."""
    return torch.cat([group.view(n, h * w, -1).mean(1) for group, (n, h, w) in groups(tokens, grids)])
