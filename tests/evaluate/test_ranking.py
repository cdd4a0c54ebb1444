"""Rankings against scikit-learn and the published toolkit's formulas, written slowly."""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from esvit_scale.evaluate.ranking import mean_with_interval, rank_relevant, trapezoid_average_precision


@pytest.mark.parametrize("levels", [3, 10**6])
def test_average_precision_equals_scikit_learn(levels: int) -> None:
    """Few levels make many ties."""
    rng = np.random.default_rng(levels)
    similarity = torch.from_numpy(rng.integers(0, levels, (40, 60)) / levels)
    relevant = torch.from_numpy(rng.random((40, 60)) < 0.2)
    relevant[3] = False
    found = rank_relevant(similarity, relevant)
    for i, (s, r) in enumerate(zip(similarity.numpy(), relevant.numpy(), strict=True)):
        if i == 3:
            assert found.precision[i].isnan()
            assert found.first[i] == 61
            continue
        assert float(found.precision[i]) == pytest.approx(average_precision_score(r, s), abs=1e-12)
        best = s[r].max()
        assert int(found.first[i]) == 1 + (s[~r] >= best).sum()


def test_collapsed_features_find_nothing() -> None:
    relevant = torch.tensor([[True, False, False, True]])
    found = rank_relevant(torch.ones(1, 4), relevant)
    assert found.precision.tolist() == [0.5]
    assert found.first.tolist() == [3]


def test_trapezoids_are_the_area_under_the_curve() -> None:
    """The published sum is the integral of precision over recall, along straight lines between the points."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        found = rng.random(30) < 0.3
        found[7] = True
        hits = np.concatenate([[0], np.cumsum(found)])
        precision = np.concatenate([[1.0], hits[1:] / np.arange(1, 31)])
        steps = [(precision[i] + precision[i + 1]) / 2 for i in range(30) if found[i]]
        assert trapezoid_average_precision(np.flatnonzero(found).tolist(), found.sum()) == pytest.approx(
            sum(steps) / found.sum()
        )
    assert trapezoid_average_precision([0, 1, 2], 3) == pytest.approx(1)


def test_interval_of_a_mean_is_about_two_standard_errors() -> None:
    values = np.random.default_rng(1).random(400)
    mean, (low, high) = mean_with_interval(values)
    reach = 196 * values.std() / 20
    assert mean == pytest.approx(100 * values.mean())
    assert (low, high) == pytest.approx((mean - reach, mean + reach), abs=0.3)  # 1000 resamples: ± 5 % of the reach
