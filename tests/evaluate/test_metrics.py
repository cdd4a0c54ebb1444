"""Metrics against scikit-learn's, and what intervals promise."""

import numpy as np
import pytest
import torch
from scipy.stats import binom
from sklearn import metrics as sk

from esvit_scale.errors import UserError
from esvit_scale.evaluate import metrics
from esvit_scale.evaluate.metrics import (
    accuracy,
    bootstrap_interval,
    mean_ap_11_point,
    mean_interval,
    mean_per_class,
    roc_auc,
    top5_accuracy,
    wilson_interval,
)


def scores(n: int = 200, classes: int = 7, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.multinomial(torch.arange(1.0, classes + 1), n, replacement=True, generator=generator)
    return torch.randn(n, classes, generator=generator) + 1.5 * torch.eye(classes)[targets], targets


def test_accuracies_equal_scikit_learn() -> None:
    x, y = scores()
    assert accuracy(x, y) == pytest.approx(100 * sk.accuracy_score(y, x.argmax(1)))
    assert top5_accuracy(x, y) == pytest.approx(100 * sk.top_k_accuracy_score(y, x.numpy(), k=5, labels=range(7)))
    assert mean_per_class(x, y) == pytest.approx(100 * sk.balanced_accuracy_score(y, x.argmax(1)))
    assert accuracy(x, y) != pytest.approx(mean_per_class(x, y))
    assert top5_accuracy(x[:, :4], y) is None


def test_class_without_test_samples_is_ignored() -> None:
    x, y = scores()
    rows = y != 3
    expected = sk.recall_score(y[rows], x[rows].argmax(1), labels=[0, 1, 2, 4, 5, 6], average="macro")
    assert mean_per_class(x[rows], y[rows]) == pytest.approx(100 * expected)


@pytest.mark.parametrize("decimals", [6, 0])  # 0: many ties
def test_roc_auc_equals_scikit_learn(decimals: int) -> None:
    x, y = scores(classes=2)
    x = x.round(decimals=decimals)
    assert roc_auc(x, y) == pytest.approx(100 * sk.roc_auc_score(y, x[:, 1] - x[:, 0]))
    assert roc_auc(x.flip(1), 1 - y) == pytest.approx(roc_auc(x, y))  # which class is called second does not matter
    with pytest.raises(UserError, match="two classes"):
        roc_auc(x, torch.zeros_like(y))
    with pytest.raises(UserError, match="two classes"):
        roc_auc(*scores())


@pytest.mark.parametrize("decimals", [6, 0])
def test_map11_equals_scikit_learn_curve(decimals: int) -> None:
    x, _ = scores(classes=4)
    x = x.round(decimals=decimals)
    y = (x + torch.randn(x.shape, generator=torch.Generator().manual_seed(5)) > 0.5).float()
    y[torch.rand(x.shape, generator=torch.Generator().manual_seed(6)) < 0.2] = float("nan")
    expected = []
    for column in range(4):
        judged = ~y[:, column].isnan()
        precision, recall, _ = sk.precision_recall_curve(y[judged, column], x[judged, column])
        precision, recall = precision[:-1], recall[:-1]  # the point (1, 0) is scikit-learn's addition
        expected.append(np.mean([precision[recall >= t - 1e-9].max(initial=0) for t in np.linspace(0, 1, 11)]))
    assert mean_ap_11_point(x, y) == pytest.approx(100 * np.mean(expected))
    y[:, 0] = 0  # a class without a positive is left out
    assert mean_ap_11_point(x, y) == pytest.approx(100 * np.mean(expected[1:]))
    with pytest.raises(UserError, match="no image has any label"):
        mean_ap_11_point(x, torch.zeros_like(y))


def test_nan_scores_count_as_wrong() -> None:
    x, y = scores(classes=3)
    x[y == 0] = float("nan")
    assert accuracy(x, y) == pytest.approx(100 * float((x[y != 0].argmax(1) == y[y != 0]).sum()) / len(y))


@pytest.mark.parametrize(("n", "share"), [(30, 0.5), (200, 0.9), (50, 0.98)])
def test_wilson_interval_covers_the_truth(n: int, share: float) -> None:
    hits = np.arange(n + 1)
    inside = [low <= 100 * share <= high for low, high in (wilson_interval(100 * k / n, n) for k in hits)]
    assert 0.92 < binom.pmf(hits, n, share)[inside].sum() < 0.995
    low, high = wilson_interval(100, n)
    assert low < high == pytest.approx(100)


def test_bootstrap_agrees_with_wilson(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = scores(n=400)
    low, high = bootstrap_interval(accuracy, x, y)
    assert [low, high] == pytest.approx(wilson_interval(accuracy(x, y), 400), abs=1.0)
    assert bootstrap_interval(accuracy, x, y) == [low, high]  # the same every time


def test_mean_interval_uses_students_t() -> None:
    mean, interval = mean_interval([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5
    assert interval == pytest.approx([2.5 - 2.0542, 2.5 + 2.0542], abs=1e-3)  # t(3) = 3.1824, s = 1.2910
    assert mean_interval([7.0]) == (7.0, None)
    assert set(metrics.METRICS) == {"accuracy", "mean_per_class", "map11", "roc_auc"}
