"""Propagating labels through a video by the similarity of frozen features, frame by frame.

The protocol is DINO's (Caron et al. 2021), after Jabri et al. (2020). Each cell of a frame gets the weighted mean of the
labels of the most similar cells in the first frame and in the last few ones, among the cells within a radius of its own
place; weights are exp(cosine similarity / 0.1). Labels are soft: fractions of every object and of the background.

Only the first frame and the last few are kept, so that memory does not grow with the length of the video.
"""

from collections import deque

import torch
from torch import Tensor
from torch.nn import functional as F

TEMPERATURE = 0.1
ELEMENTS_AT_ONCE = 2**25  # similarities that are in memory at a time


class Propagator:
    """The state of one video: normalised features and soft labels of its first frame and of the last few.

    Args:
        features: of the first frame [h, w, C].
        labels: its labels [h, w, L], which sum to 1.
        last: number of frames before the current one that labels are taken from, besides the first.
        k: most similar cells that count.
        radius: cells along each axis within which they are searched.
    """

    def __init__(self, features: Tensor, labels: Tensor, last: int, k: int, radius: int) -> None:
        self.first = F.normalize(features.flatten(0, 1), dim=1), labels.flatten(0, 1)
        self.recent: deque[tuple[Tensor, Tensor]] = deque(maxlen=last)
        self.grid, self.k, self.radius = features.shape[:2], k, radius

    def step(self, features: Tensor) -> Tensor:
        """Return the soft labels [h, w, L] of the next frame, by its features [h, w, C], and remember both."""
        asked = F.normalize(features.flatten(0, 1), dim=1)  # [h·w, C]
        sources = torch.cat([self.first[0], *(f for f, _ in self.recent)])  # [frames·h·w, C]
        labels = torch.cat([self.first[1], *(x for _, x in self.recent)])
        found, band = [], max(1, ELEMENTS_AT_ONCE // len(sources))
        for start in range(0, len(asked), band):
            rows = asked[start : start + band]
            near = self._near(torch.arange(start, start + len(rows), device=rows.device))  # [n, h·w]
            similarity = (rows @ sources.T).unflatten(1, (-1, near.shape[1]))  # [n, frames, h·w]
            similarity = similarity.masked_fill(~near[:, None], -torch.inf).flatten(1)
            values, index = similarity.topk(self.k, dim=1)
            weights = (values / TEMPERATURE).softmax(1)
            found.append(torch.einsum("nk,nkl->nl", weights, labels[index]))
        result = torch.cat(found)
        self.recent.append((asked, result))
        return result.unflatten(0, self.grid)

    def _near(self, cells: Tensor) -> Tensor:
        """Return which cells of a frame are within the radius of each of some cells: bool [n, h·w]."""
        height, width = self.grid
        y, x = torch.arange(height, device=cells.device), torch.arange(width, device=cells.device)
        rows = ((cells // width)[:, None] - y).abs() <= self.radius  # [n, h]
        columns = ((cells % width)[:, None] - x).abs() <= self.radius  # [n, w]
        return (rows[:, :, None] & columns[:, None]).flatten(1)


def objects_of(labels: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return the object of every pixel, int64 [H, W], by soft labels [h, w, L] that are interpolated bilinearly.

    As published, every label's map is first stretched to 0 … 1, so that small objects, whose fractions fade, remain.
    """
    maps = F.interpolate(labels.permute(2, 0, 1)[None], shape, mode="bilinear", align_corners=False)[0]  # [L, H, W]
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    # A map without any part of its object stays 0, and one that is the same everywhere stays as it is.
    stretched = torch.where(high > low, (maps - low) / (high - low).clamp(min=1e-12), maps)
    return torch.where(high > 0, stretched, 0.0).argmax(0)
