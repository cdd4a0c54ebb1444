"""Parts of a training set that keep its classes."""

import pytest
import torch

from esvit_scale.errors import UserError
from esvit_scale.evaluate import labels as labels_module
from esvit_scale.evaluate.labels import sample_fraction, sample_per_class, split_held_out

LABELS = torch.tensor([2] * 40 + [0] * 10 + [5] * 3)[torch.randperm(53, generator=torch.Generator().manual_seed(0))]


def counts(rows: torch.Tensor, labels: torch.Tensor = LABELS) -> list[int]:
    assert rows.tolist() == sorted(set(rows.tolist()))
    return [int((labels[rows] == c).sum()) for c in (0, 2, 5)]


def test_few_shot_split_has_equal_class_counts() -> None:
    assert counts(sample_per_class(LABELS, 3, seed=0)) == [3, 3, 3]
    assert not torch.equal(sample_per_class(LABELS, 2, seed=0), sample_per_class(LABELS, 2, seed=1))
    assert torch.equal(sample_per_class(LABELS, 2, seed=1), sample_per_class(LABELS, 2, seed=1))
    with pytest.raises(UserError, match="class 'f' has 3 samples; 4"):
        sample_per_class(LABELS, 4, 0, ["a", "b", "c", "d", "e", "f"])


def test_fraction_keeps_at_least_one_sample_of_every_class() -> None:
    assert counts(sample_fraction(LABELS, 0.1, seed=0)) == [1, 4, 1]
    assert counts(sample_fraction(LABELS, 0.5, seed=0)) == [5, 20, 2]


def test_held_out_samples_are_not_fitted() -> None:
    fit, held_out = split_held_out(LABELS, seed=0)
    assert counts(held_out) == [1, 4, 1]
    assert counts(fit) == [9, 36, 2]
    assert not set(fit.tolist()) & set(held_out.tolist())


def test_class_with_one_sample_is_fitted() -> None:
    labels = torch.tensor([0, 2, 2, 5])
    fit, held_out = split_held_out(labels, seed=0)
    assert counts(fit, labels) == [1, 1, 1]
    assert counts(held_out, labels) == [0, 1, 0]
    with pytest.raises(UserError, match="one sample of each class"):
        split_held_out(torch.tensor([0, 1, 2]), seed=0)


def test_held_out_part_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labels_module, "HELD_OUT_AT_MOST", 4)
    assert counts(split_held_out(LABELS.repeat(10), seed=0)[1], LABELS.repeat(10)) == [1, 3, 1]
