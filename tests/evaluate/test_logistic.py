"""The solver against scikit-learn's on digits, and the search for the penalty."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from sklearn.metrics import log_loss
from sklearn.preprocessing import StandardScaler

from esvit_scale.evaluate import logistic
from esvit_scale.evaluate.labels import split_held_out
from esvit_scale.evaluate.logistic import LabelledFeatures, fit, search_penalty
from esvit_scale.evaluate.metrics import accuracy

TRAIN = 1200


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    features, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    return torch.tensor(features[order], dtype=torch.float32), torch.tensor(labels[order])


def standardised(features: torch.Tensor) -> np.ndarray:
    return StandardScaler().fit(features[:TRAIN].double()).transform(features.double())


@pytest.mark.parametrize("penalty", [1e-4, 1e-2, 1.0])
def test_fit_equals_scikit_learn(digits: tuple[torch.Tensor, torch.Tensor], penalty: float) -> None:
    features, labels = digits
    rows = torch.arange(TRAIN)
    found = fit(LabelledFeatures(features, rows, labels[rows], 10), penalty)
    x = standardised(features)
    oracle = LogisticRegression(C=1 / (TRAIN * penalty), max_iter=5000, tol=1e-8).fit(x[:TRAIN], labels[:TRAIN])
    assert found.converged
    # the loss has one direction without curvature: the same bias for every class
    assert np.abs(found.weight.numpy() - oracle.coef_).max() < 5e-3 * np.abs(oracle.coef_).max()
    ours, theirs = found.scores(features[TRAIN:]).softmax(1), oracle.predict_proba(x[TRAIN:])
    assert np.abs(ours.numpy() - theirs).max() < 0.01


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("seed", [0, 1])
def test_search_is_within_half_a_point_of_the_optimum(digits: tuple[torch.Tensor, torch.Tensor], seed: int) -> None:
    order = torch.randperm(len(digits[1]), generator=torch.Generator().manual_seed(seed))
    features, labels = (x[order] for x in digits)
    fitted, held_out = split_held_out(labels[:TRAIN], seed)
    best, tried = search_penalty(*(LabelledFeatures(features, rows, labels[rows], 10) for rows in (fitted, held_out)))
    rows = torch.arange(TRAIN)
    ours = accuracy(
        fit(LabelledFeatures(features, rows, labels[rows], 10), best.l2).scores(features[TRAIN:]), labels[TRAIN:]
    )
    x, y = standardised(features), labels.numpy()
    oracle = LogisticRegressionCV(Cs=1 / (TRAIN * 10.0 ** np.arange(-6, 1)), cv=5, max_iter=3000, scoring="accuracy")
    theirs = 100 * oracle.fit(x[:TRAIN], y[:TRAIN]).score(x[TRAIN:], y[TRAIN:])
    assert ours >= theirs - 0.5
    assert len(tried) == 4 + 2 * logistic.REFINEMENTS
    assert best.held_out == min(c.held_out for c in tried)
    assert np.diff(np.log10([c.l2 for c in tried])).min() == pytest.approx(0.25)


def test_held_out_loss_equals_scikit_learn(digits: tuple[torch.Tensor, torch.Tensor]) -> None:
    features, labels = digits
    rows, rest = torch.arange(TRAIN), torch.arange(TRAIN, len(labels))
    found = fit(LabelledFeatures(features, rows, labels[rows], 10), 1e-2)
    expected = log_loss(labels[TRAIN:], found.scores(features[TRAIN:]).double().softmax(1))
    assert logistic.mean_loss(found, LabelledFeatures(features, rest, labels[rest], 10)) == pytest.approx(
        expected, rel=1e-5
    )


def test_multi_label_fit_ignores_unjudged_labels(
    digits: tuple[torch.Tensor, torch.Tensor],
) -> None:
    features, labels = digits
    targets = torch.stack([(labels % 2 == 0), labels > 4, labels == 3], 1).float()[:TRAIN]
    targets[100:200, 1] = float("nan")
    found = fit(LabelledFeatures(features, torch.arange(TRAIN), targets, 3), 1e-2)
    x = standardised(features)
    for column in range(3):
        judged = ~targets[:, column].isnan().numpy()
        # the mean is over all rows, judged or not
        oracle = LogisticRegression(C=1 / (TRAIN * 1e-2), max_iter=5000, tol=1e-8)
        oracle.fit(x[:TRAIN][judged], targets[judged, column])
        ours = found.scores(features[TRAIN:])[:, column].sigmoid()
        assert np.abs(ours.numpy() - oracle.predict_proba(x[TRAIN:])[:, 1]).max() < 0.01


def test_fit_is_independent_of_blocks_and_feature_precision(
    digits: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    features, labels = digits
    rows = torch.arange(0, TRAIN, 2)
    whole = fit(LabelledFeatures(features, rows, labels[rows], 10), 1e-2)
    monkeypatch.setattr(logistic, "ROWS_AT_ONCE", 77)
    monkeypatch.setattr(logistic.StandardizedBlocks, "CACHED_BYTES", 0)
    parts = fit(
        LabelledFeatures(features.half(), rows, labels[rows], 10), 1e-2
    )  # digits are whole numbers: exact in fp16
    # Sums in another order end the optimizer at another point within its tolerance, of scores that reach ±10.
    assert torch.allclose(parts.scores(features), whole.scores(features), atol=2e-2)


def test_constant_feature_is_harmless(digits: tuple[torch.Tensor, torch.Tensor]) -> None:
    features, labels = digits
    rows = torch.arange(TRAIN)
    assert (features[rows].std(0) == 0).any()
    found = fit(LabelledFeatures(features, rows, labels[rows], 10), 1e-2)
    assert all(x.isfinite().all() for x in found[:4])
