"""Weighted k-nearest-neighbour classification of frozen features: the evaluation that trains nothing.

The protocol (DINO's, used by EsViT): features are L2-normalised; a test sample's k most similar training samples by
cosine vote for their class with weight exp(s / 0.07); k = 10, 20, 100, 200. Accuracies are percentages.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from esvit_scale import files
from esvit_scale.errors import UserError
from esvit_scale.evaluate.features import FeatureSet, contents, extract, load_teacher
from esvit_scale.parallel import collectives

KS = (10, 20, 100, 200)
TEMPERATURE = 0.07
SIMILARITIES_AT_ONCE = 2**26  # of a chunk of queries: 256 MB in fp32, whatever the training set's size
EXAMPLES, EXAMPLE_NEIGHBOURS = 10, 5  # test samples whose neighbours knn.json records for the report


class Accuracy(NamedTuple):
    top1: float  # percent
    top5: float | None  # percent; None: fewer than five classes


class Labelled(NamedTuple):
    """A feature set whose labels index `classes`."""

    found: FeatureSet
    classes: tuple[str, ...]


def knn(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    ks: Sequence[int] = KS,
    temperature: float = TEMPERATURE,
    chunk: int | None = None,
) -> dict[int, Accuracy]:
    """Accuracy for each k.

    Features [N, C] of any floating type, labels int64 [N], one numbering of the classes for both sets. A k larger than
    the training set is clipped to it, and is reported once, under the clipped k. `chunk` queries are compared at a
    time; None chooses by memory. A class counts among the top five only when it got a vote.

    Raises:
        UserError: features that are not finite or of different width, no samples, no labels, or a single class.
    """
    _check("train", train_features, train_labels)
    _check("test", test_features, test_labels)
    if train_features.shape[1] != test_features.shape[1]:
        raise UserError(f"feature width differs: train {train_features.shape[1]}, test {test_features.shape[1]}")
    if len(train_labels.unique()) < 2:
        raise UserError("train set: all samples are of one class; k-NN needs at least two")
    ks = clip_ks(ks, len(train_labels))
    classes = int(torch.cat([train_labels, test_labels]).max()) + 1
    top = min(5, classes)
    right = {k: torch.zeros(top, dtype=torch.int64) for k in ks}
    for queries, similarity, index in nearest_neighbours(train_features, test_features, max(ks), chunk):
        voters = train_labels.to(index.device)[index]  # [Q, k]
        weights = (similarity / temperature).exp()
        truth = test_labels[queries].to(index.device)[:, None]
        for k in ks:
            votes = weights.new_zeros(len(voters), classes).scatter_add_(1, voters[:, :k], weights[:, :k])
            ranked = votes.topk(top)  # [Q, top]
            right[k] += ((ranked.indices == truth) & (ranked.values > 0)).sum(0).cpu()
    share = 100 / len(test_labels)
    return {
        k: Accuracy(share * int(hits[0]), share * int(hits.sum()) if top == 5 else None) for k, hits in right.items()
    }


def nearest_neighbours(
    train_features: Tensor, test_features: Tensor, k: int, chunk: int | None = None
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(queries, cosine similarity [Q, k], index into train [Q, k]) for chunk after chunk of the test set, best first."""
    bank = F.normalize(train_features.float(), dim=1)  # [N, C]
    chunk = chunk or max(1, SIMILARITIES_AT_ONCE // len(bank))
    for start in range(0, len(test_features), chunk):
        queries = slice(start, min(start + chunk, len(test_features)))
        similarity, index = (F.normalize(test_features[queries].float(), dim=1) @ bank.T).topk(k)
        yield queries, similarity, index


def clip_ks(ks: Sequence[int], n: int) -> list[int]:
    """`ks` in order, those beyond `n` replaced by one `n`."""
    if min(ks) < 1:
        raise UserError(f"k must be at least 1, got {min(ks)}")
    return sorted({min(k, n) for k in ks})


def same_classes(train: Labelled, test: Labelled) -> Tensor:
    """The test labels in the training set's numbering, classes matched by name; int64 [N].

    Raises:
        UserError: the test set has classes that no training sample has.
    """
    if train.classes == test.classes or not (train.classes and test.classes):
        return test.found.labels
    number = {train.classes[i]: i for i in train.found.labels.unique().tolist() if i >= 0}
    needed = [test.classes[i] for i in test.found.labels.unique().tolist() if i >= 0]
    missing = [name for name in needed if name not in number]
    if missing:
        shown = ", ".join(repr(name) for name in missing[:10]) + (", …" if len(missing) > 10 else "")
        raise UserError(f"test set: {len(missing)} of its {len(needed)} classes have no training sample: {shown}")
    table = torch.tensor([number.get(name, -1) for name in test.classes] + [-1])  # the last: unlabelled (-1)
    return table[test.found.labels]


def run_knn(
    checkpoint: Path,
    train: Path,
    test: Path,
    out: Path,
    ks: Sequence[int] = KS,
    batch: int = 64,
    workers: int = 4,
    device: str | torch.device | None = None,
    precision: str = "fp32",
) -> dict[str, Any]:
    """`esvit-scale evaluate knn`: the teacher of `checkpoint` on two labelled sets; writes `out`/knn.json."""
    for source in (train, test):  # before the hours that features may take
        if not contents(source).classes:
            raise UserError(f"{source}: its images have no labels; k-NN needs one subfolder for each class")
    teacher = load_teacher(checkpoint)
    settings = (teacher.size, batch, workers, device, precision)
    sets = [labelled(extract(teacher.trunk, source, *settings), source) for source in (train, test)]
    row = {"checkpoint": str(checkpoint), "step": teacher.step, "train": str(train), "test": str(test)}
    result = row | evaluate(sets[0], sets[1], ks)  # on every rank: an error ends them all, nobody is left waiting
    if collectives.rank() == 0:
        write_result(result, out / "knn.json")
        print(table([result]))
    return result


def labelled(found: FeatureSet, source: Path) -> Labelled:
    """`found` with the class names of the set it came from."""
    return Labelled(found, contents(source).classes)


def evaluate(train: Labelled, test: Labelled, ks: Sequence[int] = KS) -> dict[str, Any]:
    """The part of knn.json that two feature sets determine: sizes, results for each k, best, and examples."""
    labels = same_classes(train, test)
    found = knn(train.found.features, train.found.labels, test.found.features, labels, ks)
    n = len(train.found.keys)
    if max(ks) > n and collectives.rank() == 0:
        print(f"k-NN: k is clipped to {n}, the number of training samples")
    best = max(found, key=lambda k: found[k].top1)
    return {
        "n_train": n,
        "n_test": len(test.found.keys),
        "feature_dim": train.found.features.shape[1],
        "results": {str(k): a._asdict() for k, a in found.items()},
        "best": {"k": best, **found[best]._asdict()},
        "examples": _examples(train, test),
    }


def write_result(result: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, result)


def table(rows: Sequence[dict[str, Any]], names: Sequence[str] | None = None) -> str:
    """Results side by side as text, one line each; percent."""
    ks = sorted({int(k) for row in rows for k in row["results"]})
    names = (
        list(names)
        if names
        else [f"step {row['step']}" if row["step"] is not None else row["checkpoint"] for row in rows]
    )
    width = max(24, *map(len, names))
    lines = [f"{'k-NN top-1, %':<{width}}" + "".join(f"{f'k={k}':>8}" for k in ks) + f"{'dim':>8}"]
    for name, row in zip(names, rows, strict=True):
        cells = [f"{row['results'][str(k)]['top1']:8.1f}" if str(k) in row["results"] else f"{'–':>8}" for k in ks]
        lines.append(f"{name:<{width}}" + "".join(cells) + f"{row['feature_dim']:8d}")
    first = rows[0]
    lines.append(f"{first['n_test']} test samples against {first['n_train']} training samples")
    return "\n".join(lines)


def _examples(train: Labelled, test: Labelled) -> list[dict[str, Any]]:
    """Ten test samples, evenly spaced over the set, with their nearest training samples: for pictures."""
    n = len(test.found.keys)
    picked = torch.linspace(0, n - 1, min(EXAMPLES, n)).round().long()
    k = min(EXAMPLE_NEIGHBOURS, len(train.found.keys))
    rows = []
    for queries, similarity, index in nearest_neighbours(train.found.features, test.found.features[picked], k):
        for i, s, j in zip(picked[queries].tolist(), similarity.tolist(), index.tolist(), strict=True):
            neighbours = [_named(train, at) | {"similarity": value} for at, value in zip(j, s, strict=True)]
            rows.append(_named(test, i) | {"neighbours": neighbours})
    return rows


def _named(of: Labelled, i: int) -> dict[str, Any]:
    label = int(of.found.labels[i])
    return {"key": of.found.keys[i], "class": of.classes[label] if of.classes else str(label)}


def _check(name: str, features: Tensor, labels: Tensor) -> None:
    if len(features) == 0:
        raise UserError(f"{name} set: no samples")
    bad = int((~features.isfinite().all(1)).sum())
    if bad:
        raise UserError(
            f"{name} set: {bad} of {len(features)} feature vectors hold NaN or infinity; the trunk is broken"
        )
    unlabelled = int((labels < 0).sum())
    if unlabelled:
        raise UserError(f"{name} set: {unlabelled} of {len(labels)} samples have no label; k-NN needs class folders")
