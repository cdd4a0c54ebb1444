"""Measures of rankings by similarity: average precision, rank of the first relevant image, and their means.

A ranking has the most similar image first. Images of equal similarity have no order: average precision counts them
together, as scikit-learn does, and for recall those that are not relevant come first. A collapsed trunk, whose features
are all equal, therefore does not profit from the order of the files.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from esvit_scale.evaluate.metrics import RESAMPLES, Interval


class Ranked(NamedTuple):
    """How well each of Q queries ranks the images that are relevant to it."""

    precision: Tensor  # float64 [Q], average precision from 0 to 1; NaN for a query without relevant images
    first: Tensor  # int64 [Q], rank of the first relevant image, from 1; N + 1 without relevant images


def rank_relevant(similarity: Tensor, relevant: Tensor) -> Ranked:
    """Rank the images by similarity, and measure for every query where its relevant images come.

    The average precision is the mean, over the relevant images, of the fraction of relevant images among those that are
    at least as similar.

    Args:
        similarity: [Q, N]; −inf for an image that does not take part.
        relevant: bool [Q, N].
    """
    n = similarity.shape[1]
    values, order = similarity.sort(dim=1, descending=True)
    found = relevant.gather(1, order)  # bool [Q, N], most similar first
    hits = found.cumsum(1)
    place = torch.arange(n, device=similarity.device)
    ends_tie = torch.ones_like(found)
    ends_tie[:, :-1] = values[:, :-1] != values[:, 1:]
    end = torch.where(ends_tie, place, n - 1).flip(1).cummin(1).values.flip(1)  # last place of the same similarity
    hits_until = hits.gather(1, end)
    count = hits[:, -1]
    precision = (hits_until / (end + 1.0).double()).where(found, 0.0).sum(1) / count
    at = found.int().argmax(1, keepdim=True)  # place of the first relevant image
    first = (end - hits_until).gather(1, at)[:, 0] + 2  # irrelevant images that are at least as similar, and one
    return Ranked(precision.cpu(), first.where(count > 0, n + 1).cpu())


def trapezoid_average_precision(ranks: Sequence[int], relevant: int) -> float:
    """Return the average precision of the revisited Oxford and Paris sets: the area under the precision-recall curve.

    Args:
        ranks: ranks of the relevant images, from 0 and ascending, counted without the images to ignore.
        relevant: number of relevant images.
    """
    area = 0.0
    for found, rank in enumerate(ranks):
        before = found / rank if rank else 1.0
        area += (before + (found + 1) / (rank + 1)) / 2 / relevant
    return area


def mean_with_interval(values: NDArray[np.float64], seed: int = 0) -> tuple[float, Interval]:
    """Return the mean of values [Q] in percent, and its 95 % bootstrap percentile interval over RESAMPLES resamples.

    Args:
        values: one value from 0 to 1 for each query.
    """
    generator = np.random.default_rng(seed)
    means = [values[generator.integers(len(values), size=len(values))].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return 100 * float(values.mean()), [100 * float(low), 100 * float(high)]
