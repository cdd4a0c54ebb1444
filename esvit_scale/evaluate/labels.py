"""Labelled feature sets: matching their classes by name, checking them, and drawing subsets class by class."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from esvit_scale.errors import UserError
from esvit_scale.evaluate.feature_cache import FeatureSet, chunks
from esvit_scale.evaluate.features import source_info

HELD_OUT = 0.1
HELD_OUT_AT_MOST = 50_000


class LabelledSet(NamedTuple):
    """A feature set with the names of its classes; label i stands for `classes[i]`."""

    samples: FeatureSet
    classes: tuple[str, ...]


def with_class_names(found: FeatureSet, source: Path) -> LabelledSet:
    """Return a feature set with the class names of `source`, the data set whose features it holds."""
    return LabelledSet(found, source_info(source).classes)


def match_classes(train: LabelledSet, test: LabelledSet) -> Tensor:
    """Return the test labels, int64 [N], renumbered so that equal numbers are classes of equal name in both sets.

    The numbering is that of the training set. Labels are returned unchanged if a set has no class names.

    Raises:
        UserError: the test set has samples of a class for which the training set has none.
    """
    if not (train.classes and test.classes):
        return test.samples.labels
    number = {train.classes[i]: i for i in train.samples.labels.unique().tolist() if i >= 0}
    require_training_samples(number, [test.classes[i] for i in test.samples.labels.unique().tolist() if i >= 0])
    table = torch.tensor([number.get(name, -1) for name in test.classes] + [-1])  # last entry: index -1, no label
    return table[test.samples.labels]


def require_training_samples(trained: Iterable[str], needed: Sequence[str]) -> None:
    """Raise UserError if a class of test samples (`needed`) is not among those with training samples (`trained`)."""
    there = set(trained)
    missing = [name for name in needed if name not in there]
    if missing:
        shown = ", ".join(repr(name) for name in missing[:10]) + (", …" if len(missing) > 10 else "")
        raise UserError(f"test set: {len(missing)} of its {len(needed)} classes have no training sample: {shown}")


def require_classes(sources: Sequence[Path], what: str) -> None:
    """Raise UserError if a source has no classes; `what` names the evaluation in the message."""
    for source in sources:
        if not source_info(source).classes:
            raise UserError(f"{source}: its images have no labels; {what} needs one subfolder for each class")


def check_sets(
    train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor, what: str
) -> None:
    """Check that a training and a test set can be used for classification; `what` names the evaluation in messages.

    Raises:
        UserError: features are not finite or differ in width, a set has no samples or samples without label, or all
            training samples are of one class.
    """
    _check_set("train", train_features, train_labels, what)
    _check_set("test", test_features, test_labels, what)
    if train_features.shape[1:] != test_features.shape[1:]:
        widths = (int(x.shape[-1]) for x in (train_features, test_features))
        raise UserError("feature width differs: train {}, test {}".format(*widths))
    if len(train_labels.unique()) < 2:
        raise UserError(f"train set: all samples are of one class; {what} needs at least two")


def check_finite(name: str, features: Tensor) -> None:
    """Raise UserError if a set has no samples, or features that are NaN or infinite; `name` is for messages."""
    if len(features) == 0:
        raise UserError(f"{name} set: no samples")
    # If a feature is not finite, neither is the sum; testing sums is ten times faster than testing every feature.
    bad = sum(int((~part.flatten(1).float().sum(1).isfinite()).sum()) for part in chunks(features))
    if bad:
        raise UserError(
            f"{name} set: {bad} of {len(features)} feature vectors hold NaN or infinity; the trunk's weights are broken"
        )


def sample_per_class(labels: Tensor, count: int, seed: int, classes: Sequence[str] = ()) -> Tensor:
    """Return the row numbers of `count` random samples of each class: int64, ascending.

    Args:
        classes: names of the classes, for messages.

    Raises:
        UserError: a class has fewer than `count` samples.
    """
    rows = []
    for label, own in _rows_by_class(labels, seed):
        if len(own) < count:
            name = repr(classes[label]) if classes else str(label)
            raise UserError(f"train set: class {name} has {len(own)} samples; {count} of each class were asked for")
        rows.append(own[:count])
    return torch.cat(rows).sort().values


def sample_fraction(labels: Tensor, share: float, seed: int) -> Tensor:
    """Return the row numbers of a random fraction `share` of each class, at least one sample each: int64, ascending."""
    rows = [own[: max(1, round(share * len(own)))] for _, own in _rows_by_class(labels, seed)]
    return torch.cat(rows).sort().values


def split_held_out(labels: Tensor, seed: int, share: float = HELD_OUT) -> tuple[Tensor, Tensor]:
    """Return the row numbers to fit on and those to hold out for model selection, both ascending.

    A fraction `share` of every class is held out, less if that would be more than HELD_OUT_AT_MOST samples in all. A
    class with two or more samples has at least one held out; a class with one sample has none.

    Raises:
        UserError: every class has only one sample.
    """
    share = min(share, HELD_OUT_AT_MOST / len(labels))
    fit, held_out = [], []
    for _, own in _rows_by_class(labels, seed):
        n = min(max(1, round(share * len(own))), len(own) - 1)
        held_out.append(own[:n])
        fit.append(own[n:])
    chosen = torch.cat(held_out).sort().values
    if not len(chosen):
        raise UserError("train set: only one sample of each class; selecting on a held-out part needs two or more")
    return torch.cat(fit).sort().values, chosen


def _rows_by_class(labels: Tensor, seed: int) -> list[tuple[int, Tensor]]:
    """Return (class, its row numbers in random order) for each class in ascending order, without unlabelled rows."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = order[labels[order].argsort(stable=True)]
    values, counts = labels.unique(return_counts=True)
    parts = order.split(counts.tolist())
    return [(int(value), part) for value, part in zip(values, parts, strict=True) if value >= 0]


def _check_set(name: str, features: Tensor, labels: Tensor, what: str) -> None:
    check_finite(name, features)
    unlabelled = int((labels < 0).sum())
    if unlabelled:
        raise UserError(f"{name} set: {unlabelled} of {len(labels)} samples have no label; {what} needs class folders")
