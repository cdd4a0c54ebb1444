"""Logistic regression on frozen features by L-BFGS, and the search for its L2 penalty λ.

The classifier is the solution of this problem:

    minimise over W, b   (1/n) Σ loss(W x_i + b, y_i) + (λ/2) ‖W‖²

The features x are standardised with the mean and standard deviation of the training rows, so that the same range of λ
suits every trunk. The loss is the softmax cross-entropy or, for images with several labels, the binary cross-entropy
summed over classes. In terms of scikit-learn, C = 1/(nλ). The objective is convex, so that the optimum does not depend
on the seed, the batch size or the number of ranks.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor
from torch.nn import functional as F

from esvit_scale.division import share
from esvit_scale.evaluate.features import default_device
from esvit_scale.evaluate.progress import progress
from esvit_scale.parallel import collectives

PENALTIES = (1e-6, 1e-4, 1e-2, 1.0)  # coarse grid of λ, which REFINEMENTS make finer around the best λ
REFINEMENTS = 3  # each halves the step in log λ, from two decades to a quarter of one
ITERATIONS = 500
ROWS_AT_ONCE = 2**14


class LogisticModel(NamedTuple):
    """A fitted linear classifier of K classes, with the mean and deviation that standardise its input features."""

    weight: Tensor  # float32 [K, D], for standardised features
    bias: Tensor  # float32 [K]
    mean: Tensor  # float32 [D]
    scale: Tensor  # float32 [D]
    converged: bool

    def scores(self, features: Tensor) -> Tensor:
        """Return the class scores (logits) of unstandardised features [N, D]: float32 [N, K]."""
        parts = features.split(ROWS_AT_ONCE)
        return torch.cat([F.linear((x.float() - self.mean) / self.scale, self.weight, self.bias) for x in parts])


class LabelledFeatures(NamedTuple):
    """A selection of n rows of a feature matrix, with the targets of these rows."""

    features: Tensor  # [N, D], possibly memory-mapped
    rows: Tensor  # int64 [n]: the rows of `features` to use
    targets: Tensor  # int64 [n] classes, or float32 [n, K] with NaN where a label is unknown
    classes: int  # K


def fit(
    data: LabelledFeatures, penalty: float, start: LogisticModel | None = None, device: torch.device | None = None
) -> LogisticModel:
    """Fit the classifier with one L2 penalty to convergence (at most ITERATIONS iterations of L-BFGS) and return it.

    All ranks call it: each sums loss and gradient over its part of the rows, and all get the same result.

    Args:
        penalty: λ.
        start: the classifier fitted to the same rows with another λ, to start from; None starts from zero.
    """
    blocks = StandardizedBlocks(data, start, device or default_device())
    k, d = data.classes, len(blocks.mean)

    def objective(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        theta = torch.from_numpy(flat).to(blocks.device, torch.float32)
        weight, bias = theta[: k * d].view(k, d), theta[k * d :]
        total = torch.zeros(1 + len(theta), dtype=torch.float64, device=blocks.device)  # loss, gradient
        for x, targets in blocks:
            loss, grad = _loss_and_gradient(F.linear(x, weight, bias), targets)
            total[0] += loss
            total[1 : 1 + k * d] += (grad.T @ x).flatten()
            total[1 + k * d :] += grad.sum(0)
        total = (collectives.all_reduce_sum_(total) / len(data.rows)).cpu()
        found: NDArray[np.float64] = total.numpy()
        found[1 : 1 + k * d] += penalty * flat[: k * d]
        return float(found[0] + penalty / 2 * np.square(flat[: k * d]).sum()), found[1:]

    first = np.zeros(k * d + k) if start is None else torch.cat([start.weight.flatten(), start.bias]).double().numpy()
    # products are in fp32, so the loss is exact to about 1e-8
    options = {"maxiter": ITERATIONS, "ftol": 1e-8, "gtol": 1e-6}
    best = minimize(objective, first, jac=True, method="L-BFGS-B", options=options)
    theta = torch.from_numpy(best.x).float()
    converged = best.nit < ITERATIONS
    return LogisticModel(theta[: k * d].view(k, d), theta[k * d :], blocks.mean.cpu(), blocks.scale.cpu(), converged)


class Candidate(NamedTuple):
    """A penalty λ that the search tried, with its loss."""

    l2: float  # λ
    held_out: float  # mean loss on the held-out rows


def search_penalty(
    data: LabelledFeatures, held_out: LabelledFeatures, device: torch.device | None = None
) -> tuple[Candidate, list[Candidate]]:
    """Return the λ whose fit on `data` has the lowest loss on `held_out`, and all λ that were tried, ascending.

    The search goes from coarse to fine, as ELEVATER's does: first a grid with steps of two decades, then repeatedly one
    step of half that size to both sides of the best λ. It compares losses rather than accuracies, because the loss has
    a single minimum in λ, while the accuracy on a few hundred samples has many by chance. (On scikit-learn's digits,
    selecting by accuracy cost up to 1.5 points and selecting by loss at most 0.2.)
    """
    fits: dict[float, LogisticModel] = {}
    found: dict[float, float] = {}

    def best() -> float:
        return min(found, key=lambda l2: (found[l2], -l2))

    def wanted() -> Iterator[float]:
        yield from reversed(PENALTIES)  # strong ones first: they converge fastest and start the others
        factor = PENALTIES[1] / PENALTIES[0]
        for _ in range(REFINEMENTS):
            factor = factor**0.5
            middle = best()
            yield from (middle * factor, middle / factor)

    for l2 in progress(wanted(), "logistic regression", len(PENALTIES) + 2 * REFINEMENTS, "penalties"):
        near = min(fits, key=lambda known: abs(np.log(known / l2)), default=None)
        fits[l2] = fit(data, l2, fits[near] if near is not None else None, device)
        found[l2] = mean_loss(fits[l2], held_out)
    return Candidate(best(), found[best()]), [Candidate(l2, found[l2]) for l2 in sorted(found)]


def mean_loss(fitted: LogisticModel, data: LabelledFeatures) -> float:
    """Return the mean loss of a classifier on `data`, without the penalty term."""
    parts = zip(data.rows.split(ROWS_AT_ONCE), data.targets.split(ROWS_AT_ONCE), strict=True)
    losses = [_loss_and_gradient(fitted.scores(data.features[rows]), targets)[0] for rows, targets in parts]
    return float(torch.stack(losses).sum()) / len(data.rows)


class StandardizedBlocks:
    """An iterable over this rank's rows in blocks: standardised float32 features on the device, with their targets.

    If all blocks need at most CACHED_BYTES, they stay on the device; otherwise they are computed again in every pass.
    """

    CACHED_BYTES = 2 << 30  # bytes

    def __init__(self, data: LabelledFeatures, start: LogisticModel | None, device: torch.device) -> None:
        rank, world, n = collectives.rank(), collectives.world_size(), len(data.rows)
        mine = share(n, rank, world)
        self.device = device
        self._features = data.features
        self._parts = list(
            zip(data.rows[mine].split(ROWS_AT_ONCE), data.targets[mine].split(ROWS_AT_ONCE), strict=True)
        )
        if start is None:
            self.mean, self.scale = self._moments(data.features.shape[1], n)
        else:
            self.mean, self.scale = start.mean.to(device), start.scale.to(device)
        few = 4 * (mine.stop - mine.start) * len(self.mean) <= self.CACHED_BYTES
        self._cached = list(self._make_blocks()) if few else None

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self._cached) if self._cached is not None else self._make_blocks()

    def _make_blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        for rows, targets in self._parts:
            yield (self._raw(rows) - self.mean) / self.scale, targets.to(self.device)

    def _raw(self, rows: Tensor) -> Tensor:
        return self._features[rows].to(self.device).float()  # [n, D]

    def _moments(self, d: int, n: int) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation [d] over all ranks' n rows; a constant feature gets deviation 1."""
        sums = torch.zeros(d, dtype=torch.float64, device=self.device)
        for rows, _ in self._parts:
            sums += self._raw(rows).double().sum(0)
        mean = collectives.all_reduce_sum_(sums) / n
        squares = torch.zeros_like(mean)
        for rows, _ in self._parts:
            squares += (self._raw(rows).double() - mean).square().sum(0)
        scale = (collectives.all_reduce_sum_(squares) / n).sqrt()
        return mean.float(), torch.where(scale > 0, scale, 1.0).float()


def _loss_and_gradient(scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss of scores [n, K], summed over the rows, and its gradient [n, K] with respect to the scores.

    Targets of type float [n, K] that are NaN (unknown) do not count.
    """
    if targets.dim() == 1:
        log_p = scores.log_softmax(1)
        grad = log_p.exp()
        grad[torch.arange(len(targets), device=targets.device), targets] -= 1
        return -log_p.gather(1, targets[:, None]).double().sum(), grad
    judged = ~targets.isnan()
    wanted = targets.nan_to_num()
    loss = F.binary_cross_entropy_with_logits(scores, wanted, reduction="none").where(judged, 0.0)
    return loss.double().sum(), (scores.sigmoid() - wanted).where(judged, 0.0)
