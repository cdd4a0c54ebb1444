"""`esvit-scale evaluate knn`: weighted k-nearest-neighbour classification of frozen features, without training.

The protocol is DINO's, which EsViT uses too. Features are L2-normalised. The k training samples with the highest cosine
similarity s to a test sample vote for their class with weight exp(s / 0.07), for k = 10, 20, 100 and 200. Accuracies
are in percent.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from esvit_scale import files
from esvit_scale.data import manifest as manifests
from esvit_scale.division import share
from esvit_scale.errors import UserError
from esvit_scale.evaluate.features import ExtractionOptions, default_device, extract, load_frozen_trunk
from esvit_scale.evaluate.labels import LabelledSet, check_sets, match_classes, sample_per_class, with_class_names
from esvit_scale.evaluate.metrics import mean_interval, wilson_interval
from esvit_scale.evaluate.neighbours import nearest_neighbours
from esvit_scale.evaluate.overlap import check_train_and_test
from esvit_scale.parallel import collectives

KS: tuple[int, ...] = (10, 20, 100, 200)
TEMPERATURE = 0.07
VOTES_AT_ONCE = 2**24  # largest number of elements of the vote matrix [queries, classes], 64 MB
EXAMPLES, EXAMPLE_NEIGHBOURS = 10, 5  # for the report: test samples in knn.json, and neighbours of each


class Accuracy(NamedTuple):
    """The k-NN accuracies for one number k of neighbours."""

    top1: float  # percent
    top5: float | None  # percent; None with fewer than five classes


def knn(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    ks: Sequence[int] = KS,
    temperature: float = TEMPERATURE,
    device: torch.device | str | None = None,
) -> dict[int, Accuracy]:
    """Return the k-NN accuracy on the test set for each k.

    All ranks call it: each classifies its part of the test set, and all get the whole result. A k larger than the
    training set is replaced by the size of the training set. A class counts among the top five only if it got a vote.

    Args:
        train_features, test_features: [N, C] of any floating-point type.
        train_labels, test_labels: int64 [N], with the same numbering of classes in both sets.
        temperature: T in the weight exp(cosine similarity / T) of a neighbour's vote.

    Raises:
        UserError: features are not finite or differ in width, a set has no samples or samples without label, or all
            training samples are of one class.
    """
    check_sets(train_features, train_labels, test_features, test_labels, "k-NN")
    ks = clip_ks(ks, len(train_labels))
    device = device or default_device()
    classes = int(torch.cat([train_labels, test_labels]).max()) + 1
    top = min(5, classes)
    rank, world, n = collectives.rank(), collectives.world_size(), len(test_labels)
    mine = share(n, rank, world)
    similarity, index = nearest_neighbours(train_features, test_features[mine], max(ks), device)
    right = count_true_class_ranks(
        train_labels[index], (similarity / temperature).exp(), test_labels[mine], ks, classes, top
    )
    hits = collectives.all_reduce_sum_(right.to(device)).cpu()  # [ks, top]
    return {
        k: Accuracy(100 * int(row[0]) / n, 100 * int(row.sum()) / n if top == 5 else None)
        for k, row in zip(ks, hits, strict=True)
    }


def count_true_class_ranks(
    voters: Tensor, weights: Tensor, truth: Tensor, ks: Sequence[int], classes: int, top: int
) -> Tensor:
    """Count the queries whose true class came first, second, … in the vote, for each k: int64 [len(ks), top].

    Args:
        voters: classes of each query's neighbours, nearest first, int64 [Q, k].
        weights: weights of these neighbours' votes, [Q, k].
        truth: true class of each query, int64 [Q].
        ks: numbers of nearest neighbours that vote; each gives one row of the result.
        classes: number of classes.
        top: how many places of the vote are counted; each gives one column of the result.
    """
    right = torch.zeros(len(ks), top, dtype=torch.int64)
    step = max(1, VOTES_AT_ONCE // classes)
    for start in range(0, len(truth), step):
        some = slice(start, start + step)
        for i, k in enumerate(ks):
            votes = torch.zeros(len(truth[some]), classes)
            votes.scatter_add_(1, voters[some, :k], weights[some, :k])
            ranked = votes.topk(top)  # [Q, top]
            right[i] += ((ranked.indices == truth[some, None]) & (ranked.values > 0)).sum(0)
    return right


def few_shot(
    train: LabelledSet, test: LabelledSet, shots: Sequence[int], tries: int, ks: Sequence[int] = KS, seed: int = 0
) -> dict[str, Any]:
    """Return the k-NN accuracy with only n training samples per class, for every n in `shots`.

    The accuracy is the mean top-1 over `tries` random draws of the samples, with its 95 % interval. The result is the
    part "few_shot" of knn.json.

    Raises:
        UserError: a class has fewer than n samples.
    """
    names, labels = train.classes, train.samples.labels
    truth = match_classes(train, test)
    for n in shots:
        sample_per_class(labels, n, seed, names)  # raises an error early if a class has too few samples
    found: dict[str, Any] = {}
    for n in shots:
        runs = []
        for attempt in range(tries):
            rows = sample_per_class(labels, n, seed + attempt, names)
            runs.append(knn(train.samples.features[rows], labels[rows], test.samples.features, truth, ks))
        means = {k: mean_interval([run[k].top1 for run in runs]) for k in runs[0]}
        found[str(n)] = {str(k): {"top1": mean, "interval": interval} for k, (mean, interval) in means.items()}
    return {"tries": tries, "seed": seed, "results": found}


def clip_ks(ks: Sequence[int], n: int) -> list[int]:
    """Return the sorted distinct values of `ks`, with those above `n` replaced by `n`.

    Raises:
        UserError: a value is below 1.
    """
    if min(ks) < 1:
        raise UserError(f"--k: must be at least 1, got {min(ks)}")
    return sorted({min(k, n) for k in ks})


def run_knn(
    checkpoint: Path,
    train: Path,
    test: Path,
    out: Path,
    options: ExtractionOptions,
    ks: Sequence[int] = KS,
    shots: Sequence[int] = (),
    tries: int = 5,
) -> dict[str, Any]:
    """Run `esvit-scale evaluate knn` for a checkpoint's trunk: write `out`/knn.json and return its content.

    Args:
        train, test: labelled image folders or shard sets.
        shots: numbers of training samples per class to evaluate also (`few_shot`).
        tries: random draws of these samples.
    """
    check_train_and_test([train], test, "k-NN")
    teacher = load_frozen_trunk(checkpoint)
    sets = [
        with_class_names(extract(teacher.trunk, s, teacher.size, **options._asdict(), pixels=teacher.pixels), s)
        for s in (train, test)
    ]
    row = teacher.origin(checkpoint) | {"train": manifests.address(train), "test": manifests.address(test)}
    row |= {"whole_images": True} if options.whole else {}
    row |= {"stage": options.stage} if options.stage else {}
    result = row | evaluate(sets[0], sets[1], ks)  # computed on every rank, so that an error ends all ranks
    if shots:
        result["few_shot"] = few_shot(sets[0], sets[1], shots, tries, ks)
    if collectives.rank() == 0:
        write_result(result, out / "knn.json")
        print("\n".join([table([result]), *notes(result)]))
        if shots:
            print(few_shot_table(result["few_shot"]))
    return result


def evaluate(train: LabelledSet, test: LabelledSet, ks: Sequence[int] = KS) -> dict[str, Any]:
    """Evaluate two labelled feature sets: return their sizes, the result for each k, the best k and example neighbours.

    These are the fields of knn.json that depend on features and labels alone.
    """
    labels = match_classes(train, test)
    found = knn(train.samples.features, train.samples.labels, test.samples.features, labels, ks)
    n = len(train.samples.keys)
    if max(ks) > n and collectives.rank() == 0:
        print(f"k-NN: k is clipped to {n}, the number of training samples")
    best = max(found, key=lambda k: found[k].top1)
    largest = int(train.samples.labels.bincount().argmax())
    return {
        "n_train": n,
        "n_test": len(test.samples.keys),
        "feature_dim": train.samples.features.shape[1],
        "results": {str(k): a._asdict() | {"interval": wilson_interval(a.top1, len(labels))} for k, a in found.items()},
        "best": {"k": best, **found[best]._asdict()},
        "largest_class": {
            "class": _class_name(train, largest),
            "top1": 100 * float((labels == largest).double().mean()),
        },
        "examples": _examples(train, test),
    }


def write_result(result: dict[str, Any], path: Path) -> None:
    """Write a result as a JSON file, atomically; create the file's folder if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, result)


def table(rows: Sequence[dict[str, Any]], names: Sequence[str] | None = None) -> str:
    """Format several results (contents of knn.json) as a text table: a line per result, a column of top-1 per k.

    Args:
        names: names of the lines; None takes the name of a baseline, the training step of a result, or its checkpoint.
    """
    ks = sorted({int(k) for row in rows for k in row["results"]})
    names = (
        list(names)
        if names
        else [
            row.get("name") or (f"step {row['step']}" if row["step"] is not None else row["checkpoint"]) for row in rows
        ]
    )
    width = max(24, *map(len, names))
    lines = [f"{'k-NN top-1, %':<{width}}" + "".join(f"{f'k={k}':>8}" for k in ks) + f"{'dim':>8}"]
    for name, row in zip(names, rows, strict=True):
        cells = [f"{row['results'][str(k)]['top1']:8.1f}" if str(k) in row["results"] else f"{'–':>8}" for k in ks]
        lines.append(f"{name:<{width}}" + "".join(cells) + f"{row['feature_dim']:8d}")
    first = rows[0]
    lines.append(f"{first['n_test']} test samples against {first['n_train']} training samples")
    return "\n".join(lines)


def notes(result: dict[str, Any]) -> list[str]:
    """Return lines below the table of one result: the intervals, and how often guessing the largest class is right."""
    intervals = ", ".join(f"k={k} {a['interval'][0]:.1f}–{a['interval'][1]:.1f}" for k, a in result["results"].items())
    largest = result["largest_class"]
    return [
        f"95 % intervals, %: {intervals}",
        f"always guessing the largest class of the training set, {largest['class']}: {largest['top1']:.1f} %",
    ]


def few_shot_table(result: dict[str, Any]) -> str:
    """Format the result of `few_shot` as a text table: a line per number of samples, a column per k."""
    ks = sorted({int(k) for row in result["results"].values() for k in row})
    lines = [f"{'k-NN top-1, % (mean ± 95 %)':<28}" + "".join(f"{f'k={k}':>14}" for k in ks)]
    for n, row in result["results"].items():
        cells = [_with_margin(row[str(k)]) if str(k) in row else "–" for k in ks]
        lines.append(f"{n + ' of each class':<28}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join([*lines, f"over {result['tries']} draws of the training samples"])


def _with_margin(cell: dict[str, Any]) -> str:
    interval = cell["interval"]
    return f"{cell['top1']:.1f}" + (f" ± {interval[1] - cell['top1']:.1f}" if interval else "")


def _examples(train: LabelledSet, test: LabelledSet) -> list[dict[str, Any]]:
    """Return up to EXAMPLES evenly spaced test samples with their nearest training samples, to show in the report."""
    n = len(test.samples.keys)
    picked = torch.linspace(0, n - 1, min(EXAMPLES, n)).round().long()
    k = min(EXAMPLE_NEIGHBOURS, len(train.samples.keys))
    rows = []
    similarity, index = nearest_neighbours(train.samples.features, test.samples.features[picked], k)
    for i, s, j in zip(picked.tolist(), similarity.tolist(), index.tolist(), strict=True):
        neighbours = [_sample_row(train, at) | {"similarity": value} for at, value in zip(j, s, strict=True)]
        rows.append(_sample_row(test, i) | {"neighbours": neighbours})
    return rows


def _sample_row(of: LabelledSet, i: int) -> dict[str, Any]:
    return {"key": of.samples.keys[i], "class": _class_name(of, int(of.samples.labels[i]))}


def _class_name(of: LabelledSet, label: int) -> str:
    return of.classes[label] if of.classes else str(label)
