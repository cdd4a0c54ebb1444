"""Classification metrics in percent, and their confidence intervals.

A metric is a function of scores [N, K] and targets. Targets are int64 [N] for one class per image, or float [N, K] with
1, 0 and NaN (unknown) for several labels per image. A higher value is better.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import rankdata, t
from torch import Tensor

from esvit_scale.errors import UserError

Z95 = 1.959963984540054
RESAMPLES = 1000

Interval = list[float]  # [lower end, upper end] in percent


class Metric(NamedTuple):
    """A metric: the function of (scores, targets), and whether it is for images with several labels each."""

    score: Callable[[Tensor, Tensor], float]
    multi_label: bool = False


def accuracy(scores: Tensor, targets: Tensor) -> float:
    """Return the percentage of samples whose true class has the highest score."""
    return 100 * float((predicted_class(scores) == targets).double().mean())


def top5_accuracy(scores: Tensor, targets: Tensor) -> float | None:
    """Return the percentage of samples whose true class is among the five highest scores; None below five classes."""
    if scores.shape[1] < 5:
        return None
    return 100 * float((scores.topk(5).indices == targets[:, None]).any(1).double().mean())


def mean_per_class(scores: Tensor, targets: Tensor) -> float:
    """Return the mean of the per-class accuracies in percent, over the classes that have samples."""
    right = (predicted_class(scores) == targets).double()
    counts = torch.bincount(targets, minlength=scores.shape[1])
    hits = torch.bincount(targets, right, minlength=scores.shape[1])
    return 100 * float((hits / counts)[counts > 0].mean())


def mean_ap_11_point(scores: Tensor, targets: Tensor) -> float:
    """Return the mean average precision of PASCAL VOC 2007 (11 points), in percent, over classes with a positive image.

    The average precision of a class is the mean over r = 0, 0.1, …, 1 of the highest precision at any recall ≥ r.

    Raises:
        UserError: no class has a positive image.
    """
    found = []
    for own, target in zip(scores.double().T.numpy(), targets.double().T.numpy(), strict=True):
        judged = ~np.isnan(target)
        if (target[judged] == 1).any():
            found.append(_average_precision_11(own[judged], target[judged] == 1))
    if not found:
        raise UserError("test set: no image has any label, so that mAP is undefined")
    return 100 * float(np.mean(found))


def roc_auc(scores: Tensor, targets: Tensor) -> float:
    """Return the area under the ROC curve, in percent, for two classes; tied pairs count half.

    Samples are ranked by the second class's score minus the first's.

    Raises:
        UserError: there are not exactly two classes, or one of them has no sample.
    """
    if scores.shape[1] != 2 or len(targets.unique()) != 2:
        raise UserError(f"test set: ROC-AUC needs two classes, both with samples; there are {scores.shape[1]} classes")
    positive = (targets == 1).numpy()
    ranks = rankdata((scores[:, 1] - scores[:, 0]).double().numpy())
    p, n = int(positive.sum()), int((~positive).sum())
    return 100 * float((ranks[positive].sum() - p * (p + 1) / 2) / (p * n))


METRICS = {
    "accuracy": Metric(accuracy),
    "mean_per_class": Metric(mean_per_class),
    "map11": Metric(mean_ap_11_point, multi_label=True),
    "roc_auc": Metric(roc_auc),
}


def predicted_class(scores: Tensor) -> Tensor:
    """Return the class with the highest score for each row of scores [N, K]: int64 [N].

    It is −1 for a row with a score that is not finite, so that the predictions of a diverged probe count as wrong.
    """
    return scores.argmax(1).masked_fill(~scores.isfinite().all(1), -1)


def wilson_interval(share: float, n: int) -> Interval:
    """Return the 95 % Wilson interval, in percent, of a proportion `share` (percent) of n independent samples."""
    p, z2 = share / 100, Z95**2
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    reach = Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return [100 * max(0.0, middle - reach), 100 * min(1.0, middle + reach)]


def bootstrap_interval(
    metric: Callable[[Tensor, Tensor], float], scores: Tensor, targets: Tensor, seed: int = 0
) -> Interval:
    """Return a metric's 95 % bootstrap percentile interval, in percent, from RESAMPLES resamples of the test set.

    It is meant for metrics that are not proportions.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(RESAMPLES):
        rows = torch.randint(len(targets), (len(targets),), generator=generator)
        try:
            found.append(metric(scores[rows], targets[rows]))
        except UserError:  # the metric is undefined on a resample without samples of a class
            continue
    low, high = np.percentile(found, [2.5, 97.5])
    return [float(low), float(high)]


def mean_interval(values: Sequence[float]) -> tuple[float, Interval | None]:
    """Return the mean of the values and its 95 % interval (Student's t), which is None for a single value."""
    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return mean, None
    reach = float(t.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n))
    return mean, [mean - reach, mean + reach]


def _average_precision_11(scores: "np.ndarray", positive: "np.ndarray") -> float:
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(positive[order])
    last = np.append(
        np.diff(scores[order]) != 0, True
    )  # samples with equal scores are counted together, as they have no order
    precision, recall = (hits / np.arange(1, len(hits) + 1))[last], (hits / hits[-1])[last]
    at = [precision[recall >= level - 1e-9] for level in np.linspace(0, 1, 11)]
    return float(np.mean([p.max() if len(p) else 0.0 for p in at]))
