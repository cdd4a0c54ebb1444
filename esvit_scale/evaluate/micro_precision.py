"""Measures of copy detection: micro average precision over all pairs of a copy and a searched image.

µAP (Douze et al. 2021, DISC) ranks all pairs of all queries together by their similarity, so that one threshold must
serve for all queries; it is the average precision of that one ranking. Pairs of equal similarity count together, as in
scikit-learn; similarities are compared to six decimals, because the products of equal features differ in the last bits.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from esvit_scale.division import share
from esvit_scale.evaluate.metrics import RESAMPLES
from esvit_scale.evaluate.neighbours import BANK_ROWS_PER_BLOCK
from esvit_scale.evaluate.ranking import mean_with_interval
from esvit_scale.parallel import collectives

PAIRS_AT_ONCE = 2**22  # similarities that are in memory at a time
DECIMALS = 6  # to which similarities are compared
PRECISION = 0.9  # at which the recall is reported

Json = dict[str, Any]


class PairCounts(NamedTuple):
    """How many pairs are at least as similar as right ones. T are the distinct similarities of right pairs, ascending.

    Row 0 of the weights is the set of queries itself, the other rows are its bootstrap resamples.
    """

    weights: Tensor  # float64 [1 + RESAMPLES, Q]: how often each query counts
    place: Tensor  # int64 [Q]: which of the T each query's right pair has
    wrong: Tensor  # float64 [1 + RESAMPLES, T]: wrong pairs that are at least as similar
    rank: Tensor  # int64 [Q]: rank of each query's original among all searched images, from 1; ties come before it


def copy_measures(
    banks: Sequence[Tensor], queries: Tensor, originals: Tensor, device: torch.device, seed: int = 0
) -> Json:
    """Return µAP, recall at 90 % precision, and mAP (the mean over queries), in percent, with bootstrap intervals.

    All ranks call it: each takes its part of the queries. Besides a block of at most PAIRS_AT_ONCE similarities,
    RESAMPLES numbers for each query are in memory; nothing grows with the number of searched images.

    Args:
        banks: features [N_i, C] of the images to search, possibly memory-mapped; the originals are in the first.
        queries: features [Q, C].
        originals: int64 [Q], each query's row in the first bank.
    """
    counts = count_pairs(banks, queries, originals, device, seed)
    precision, right = _precisions(counts)
    total = counts.weights.sum(1, keepdim=True)
    at = torch.zeros_like(precision).index_add_(1, counts.place, counts.weights)  # right pairs of every similarity
    micro = (100 * (at * precision).sum(1, keepdim=True) / total)[:, 0].numpy()
    low, high = np.percentile(micro[1:], [2.5, 97.5])
    recall = (right / total)[0][precision[0] >= PRECISION]
    mean, interval = mean_with_interval(1 / counts.rank.double().numpy(), seed)
    return {
        "uap": float(micro[0]),
        "interval": [float(low), float(high)],
        "recall_at_p90": 100 * float(recall.max()) if len(recall) else 0.0,
        "map": mean,
        "map_interval": interval,
        "first": 100 * float((counts.rank == 1).double().mean()),
        "queries": len(queries),
    }


def count_pairs(
    banks: Sequence[Tensor], queries: Tensor, originals: Tensor, device: torch.device, seed: int
) -> PairCounts:
    """Compare all queries with all searched images, and count the wrong pairs that are as similar as right ones."""
    n = len(queries)
    asked = F.normalize(queries.float(), dim=1)
    own = _levels((asked * F.normalize(banks[0][originals].float(), dim=1)).sum(1))
    distinct, place = own.unique(return_inverse=True)
    weights = torch.from_numpy(_weights(n, seed))
    wrong = torch.zeros(len(weights), len(distinct) + 1, dtype=torch.float64)
    rank = torch.zeros(n, dtype=torch.int64)
    mine = share(n, collectives.rank(), collectives.world_size())
    columns = min(BANK_ROWS_PER_BLOCK, max(len(bank) for bank in banks))
    step = max(1, PAIRS_AT_ONCE // columns)
    for start in range(mine.start, mine.stop, step):
        rows = slice(start, min(start + step, mine.stop))
        counts = torch.zeros(rows.stop - rows.start, len(distinct) + 1, dtype=torch.int64)
        for levels, offset, first in _blocks(banks, asked[rows].to(device)):
            below = torch.searchsorted(distinct.to(levels.device), levels, right=True)  # right pairs not more similar
            if first:
                inside = (originals[rows] >= offset) & (originals[rows] < offset + below.shape[1])
                which = inside.nonzero()[:, 0]
                below[which.to(below.device), (originals[rows][which] - offset).to(below.device)] = 0
            flat = below + torch.arange(len(below), device=below.device)[:, None] * (len(distinct) + 1)
            counts += torch.bincount(flat.flatten(), minlength=counts.numel()).view_as(counts).cpu()
        counts[:, 0] = 0  # less similar than every right pair, and the right pairs themselves
        at_least = counts.flip(1).cumsum(1).flip(1)[:, 1:]
        rank[rows] = at_least.gather(1, place[rows][:, None])[:, 0] + 1
        wrong += weights[:, rows] @ counts.double()
    for tensor in (wrong, rank):
        tensor.copy_(collectives.all_reduce_sum_(tensor.to(device)).cpu())
    return PairCounts(weights, place, wrong.flip(1).cumsum(1).flip(1)[:, 1:], rank)


def _blocks(banks: Sequence[Tensor], queries: Tensor) -> Iterator[tuple[Tensor, int, bool]]:
    """Yield the similarity levels [q, n] of blocks of searched images, each block's first row, and if it is of bank 0."""
    for i, bank in enumerate(banks):
        for offset in range(0, len(bank), BANK_ROWS_PER_BLOCK):
            some = bank[offset : offset + BANK_ROWS_PER_BLOCK].to(queries.device).float()
            yield _levels(queries @ F.normalize(some, dim=1).T), offset, i == 0


def _levels(similarity: Tensor) -> Tensor:
    return (similarity.double() * 10**DECIMALS).round().long()


def _weights(queries: int, seed: int) -> "np.ndarray":
    """Return how often each query counts [1 + RESAMPLES, Q]: once, and then in each bootstrap resample."""
    generator = np.random.default_rng(seed)
    found = np.ones((1 + RESAMPLES, queries))
    for row in found[1:]:
        row[:] = np.bincount(generator.integers(queries, size=queries), minlength=queries)
    return found


def _precisions(counts: PairCounts) -> tuple[Tensor, Tensor]:
    """Return the precision at every right similarity, and the right pairs at least as similar: float64 [1 + R, T]."""
    right = torch.zeros_like(counts.wrong).index_add_(1, counts.place, counts.weights).flip(1).cumsum(1).flip(1)
    return right / (right + counts.wrong).clamp(min=1), right
