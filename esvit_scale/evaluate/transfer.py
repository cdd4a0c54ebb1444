"""`esvit-scale evaluate transfer`: the scores of one trunk on many data sets, each with its own metric, and their mean.

The protocol is ELEVATER's for frozen features (Li et al. 2022): a linear classifier on the view feature. Its L2 penalty
is searched from coarse to fine on the data set's `val` set, or on a fifth of `train` if there is none. Then the
classifier is fitted to all of `train` and `val`, and scored once on `test`. The classifier is logistic regression,
fitted to convergence, so that no learning rate or number of epochs needs to be searched.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from esvit_scale.data.evaluation import items_of
from esvit_scale.errors import RestartCanHelp, UserError
from esvit_scale.evaluate import logistic
from esvit_scale.evaluate.feature_cache import FeatureSet, source_digest, trunk_digest
from esvit_scale.evaluate.features import ExtractionOptions, FrozenTrunk, extract, load_frozen_trunk
from esvit_scale.evaluate.knn import write_result
from esvit_scale.evaluate.labels import (
    LabelledSet,
    check_finite,
    check_sets,
    match_classes,
    split_held_out,
    with_class_names,
)
from esvit_scale.evaluate.metrics import METRICS, accuracy, bootstrap_interval, wilson_interval
from esvit_scale.evaluate.overlap import check_train_and_test
from esvit_scale.evaluate.transfer_list import Dataset, read_labels, read_list, targets_of
from esvit_scale.parallel import collectives

HELD_OUT = 0.2
SEED = 0

Json = dict[str, Any]


class TransferData(NamedTuple):
    """Features and targets of one data set: of train and val concatenated (N rows), and of test."""

    features: Tensor  # [N, C]
    targets: Tensor  # int64 [N] classes, or float32 [N, K] for several labels per image
    fit: Tensor  # int64: rows to fit on while the penalty is searched
    held_out: Tensor  # int64: rows on which the penalty is selected
    test: Tensor
    truth: Tensor
    classes: int


def run_transfer(
    source: Path,
    checkpoint: Path,
    out: Path,
    options: ExtractionOptions,
    root: Path | None = None,
    baseline: Path | None = None,
) -> Json:
    """Run `esvit-scale evaluate transfer`: write `out`/transfer.json and return its content.

    After each data set, its result is written to `out`/datasets/NAME.json. A data set is not evaluated again if this
    file exists and is of the same trunk, data and settings.

    Args:
        source: a YAML file with the list of data sets, or the name of a shipped list.
        root: folder to which relative paths in the list refer.
        baseline: transfer.json of another checkpoint to compare with.

    Raises:
        UserError: the list or the baseline cannot be read (raised before any work), or a data set failed (raised after
            all other data sets are evaluated and the results are written).
    """
    datasets = read_list(source, root)
    other = read_baseline(baseline) if baseline else None
    teacher = load_frozen_trunk(checkpoint)
    digest = trunk_digest(teacher.trunk)
    done: dict[str, Json] = {}
    failed: dict[str, str] = {}
    for number, dataset in enumerate(datasets, 1):
        try:
            done[dataset.name] = _cached_or_evaluated(dataset, teacher, digest, out, options)
        except RestartCanHelp:
            raise
        except UserError as error:
            failed[dataset.name] = str(error)
        except Exception as error:  # the failure of one data set must not stop the evaluation of the others
            failed[dataset.name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if collectives.rank() == 0:
            row = done.get(dataset.name)
            outcome = f"{row['metric']} {row['score']:.1f}" if row else f"failed: {failed[dataset.name]}"
            print(f"[{number}/{len(datasets)}] {dataset.name}: {outcome}", flush=True)
    result: Json = teacher.origin(checkpoint) | {"list": str(source)}
    result |= {"mean": _mean(done), "datasets": done, "failed": failed}
    if other is not None:
        result["baseline"] = compare(done, other) | {"file": str(baseline), "checkpoint": other["checkpoint"]}
    if collectives.rank() == 0:
        write_result(result, out / "transfer.json")
        print(table(result))
    if failed:
        why = "; ".join(f"{name}: {message}" for name, message in failed.items())
        raise UserError(
            f"{len(failed)} of {len(datasets)} data sets failed; the results of the others are in {out / 'transfer.json'}, "
            f"and running the command again repeats only these: {why}"
        )
    return result


def evaluate(dataset: Dataset, teacher: FrozenTrunk, options: ExtractionOptions) -> Json:
    """Evaluate the trunk on one data set and return the result for transfer.json.

    Raises:
        UserError: the data set's train, val or test set cannot be read, or they do not fit each other.
    """
    sources = [s for s in (dataset.train, dataset.val, dataset.test) if s is not None]
    check_train_and_test(sources[:-1], dataset.test, f"the metric {dataset.metric}", classes=not dataset.labels)
    if dataset.labels:
        _check_labels(dataset.labels, sources)
    found = [extract(teacher.trunk, s, teacher.size, **options._asdict(), pixels=teacher.pixels) for s in sources]
    sets = _multi_label_data(dataset, found) if dataset.labels else _single_label_data(sources, found)
    metric = METRICS[dataset.metric].score

    def rows(some: Tensor) -> logistic.LabelledFeatures:
        return logistic.LabelledFeatures(sets.features, some, sets.targets[some], sets.classes)

    best, tried = logistic.search_penalty(rows(sets.fit), rows(sets.held_out))
    final = logistic.fit(rows(torch.arange(len(sets.features))), best.l2)
    scores = final.scores(sets.test)
    found_score = metric(scores, sets.truth)
    if metric is accuracy:
        interval = wilson_interval(found_score, len(scores))
    else:
        interval = bootstrap_interval(metric, scores, sets.truth)
    return {
        "metric": dataset.metric,
        "score": found_score,
        "interval": interval,
        "selected": best._asdict(),
        "path": [candidate._asdict() for candidate in tried],
        "n_train": len(sets.features),
        "n_held_out": len(sets.held_out),
        "n_test": len(scores),
        "classes": sets.classes,
        "left_out": sum(f.left_out for f in found),
        "converged": final.converged,
    }


def read_baseline(path: Path) -> Json:
    """Read a transfer.json and return {"checkpoint": …, "scores": {data set: (metric, score)}}.

    Raises:
        UserError: the file cannot be read or is no transfer.json.
    """
    try:
        content = json.loads(path.read_text())
        scores = {name: (row["metric"], float(row["score"])) for name, row in content["datasets"].items()}
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: not a transfer.json of `esvit-scale evaluate transfer`") from None
    return {"checkpoint": content.get("checkpoint"), "scores": scores}


def compare(done: dict[str, Json], other: Json) -> Json:
    """Compare results with a baseline on the data sets that both have with the same metric.

    Return the baseline's scores and their mean, the mean gain over them in points, and the numbers of wins and losses.

    Args:
        done: result of each data set, by its name.
        other: the baseline, from `read_baseline`.
    """
    theirs = {n: s for n, (metric, s) in other["scores"].items() if n in done and done[n]["metric"] == metric}
    gains = {name: done[name]["score"] - score for name, score in theirs.items()}
    return {
        "scores": theirs,
        "common": len(theirs),
        "mean": sum(theirs.values()) / len(theirs) if theirs else None,
        "gain": sum(gains.values()) / len(gains) if gains else None,
        "wins": sum(g > 0 for g in gains.values()),
        "losses": sum(g < 0 for g in gains.values()),
    }


def table(result: Json) -> str:
    """Format the content of transfer.json as a text table, with a line for each data set."""
    done, against = result["datasets"], result.get("baseline")
    theirs = against["scores"] if against else {}
    width = max(18, *(len(name) + 2 for name in [*done, *result["failed"], ""]))
    lines = [f"{'data set':<{width}}{'metric':<16}{'score':>7}{'95 %':>16}" + ("  baseline" if against else "")]
    for name, row in done.items():
        low, high = row["interval"]
        line = f"{name:<{width}}{row['metric']:<16}{row['score']:7.1f}{f'{low:.1f} – {high:.1f}':>16}"
        lines.append(line + (f"{theirs[name]:10.1f}{row['score'] - theirs[name]:+7.1f}" if name in theirs else ""))
    lines += [f"{name:<{width}}failed" for name in result["failed"]]
    if done:
        lines.append(f"{f'mean of {len(done)}':<{width + 16}}{result['mean']:7.1f}")
    if against and against["common"]:
        lines.append(
            f"against the baseline: {against['wins']} wins and {against['losses']} losses of {against['common']}, "
            f"{against['gain']:+.1f} points on average"
        )
    return "\n".join(lines)


def _cached_or_evaluated(
    dataset: Dataset, teacher: FrozenTrunk, digest: str, out: Path, options: ExtractionOptions
) -> Json:
    """Return the data set's result from `out`/datasets, or evaluate the data set and write its result there.

    A result that is there is used only if it is of the same trunk, data and settings.

    Args:
        digest: hash of the trunk.
    """
    path = out / "datasets" / f"{dataset.name}.json"

    def look_up() -> tuple[Json, Json | None]:
        sources = {str(s): source_digest(s) for s in (dataset.train, dataset.val, dataset.test) if s is not None}
        labels = dataset.labels.read_bytes() if dataset.labels and dataset.labels.is_file() else b""
        identity: Json = {"trunk": digest, "size": teacher.size, "precision": options.precision, "data": sources}
        identity |= {"metric": dataset.metric, "labels": hashlib.sha256(labels).hexdigest()}
        try:
            cached = json.loads(path.read_text())
        except (OSError, ValueError):
            return identity, None
        return identity, cached["result"] if cached.get("of") == identity else None

    identity, cached = collectives.run_on_rank0_and_broadcast(look_up)
    if cached is not None:
        return cached
    result = evaluate(dataset, teacher, options)
    if collectives.rank() == 0:
        write_result({"of": identity, "result": result}, path)
    return result


def _single_label_data(sources: list[Path], found: list[FeatureSet]) -> TransferData:
    """Return features and targets of a data set with one class per image, given the features of train, [val,] test.

    The classes of val and test are matched to those of train by name.
    """
    train, *others = (with_class_names(f, s) for f, s in zip(found, sources, strict=True))
    targets = [train.samples.labels, *(match_classes(train, other) for other in others)]
    for name, other, labels in zip(("val", "test")[-len(others) :], others, targets[1:], strict=True):
        check_sets(
            train.samples.features, train.samples.labels, other.samples.features, labels, f"transfer ({name} set)"
        )
    fit, held_out = _split(train.samples.labels, [len(t) for t in targets[:-1]])
    classes = max(len(train.classes), int(train.samples.labels.max()) + 1)
    features, labels = _concatenated([train, *others[:-1]]), torch.cat(targets[:-1])
    return TransferData(features, labels, fit, held_out, others[-1].samples.features, targets[-1], classes)


def _multi_label_data(dataset: Dataset, found: list[FeatureSet]) -> TransferData:
    """Return features and targets of a data set with several labels per image, which its label file gives.

    Args:
        found: features of train, val (if the data set has one) and test.
    """
    assert dataset.labels is not None
    classes, rows = read_labels(dataset.labels)
    sources = [s for s in (dataset.train, dataset.val, dataset.test) if s is not None]
    targets = [targets_of(f.keys, rows, dataset.labels, s) for f, s in zip(found, sources, strict=True)]
    for source, f in zip(sources, found, strict=True):
        check_finite(str(source), f.features)
    fit, held_out = _split(torch.zeros(len(targets[0]), dtype=torch.int64), [len(t) for t in targets[:-1]])
    features = _concatenated([LabelledSet(f, classes) for f in found[:-1]])
    return TransferData(features, torch.cat(targets[:-1]), fit, held_out, found[-1].features, targets[-1], len(classes))


def _check_labels(labels: Path, sources: list[Path]) -> None:
    """Raise UserError if an image of the sources has no line in the label file. All ranks call it."""

    def check() -> None:
        _, rows = read_labels(labels)
        for source in sources:
            items = items_of(source, notes=False)
            targets_of([items.key(number) for number in range(len(items))], rows, labels, source)

    collectives.run_on_rank0_and_broadcast(check)


def _split(labels: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor]:
    """Return the rows to fit on and the rows to select the penalty on, as row numbers of train and val concatenated.

    They are all rows of train and all rows of val or, if there is no val set, two parts of train.

    Args:
        labels: classes of the training samples, int64; the split of train is class by class.
        sizes: number of samples of train and, if there is a val set, of val.
    """
    if len(sizes) == 2:
        return torch.arange(sizes[0]), torch.arange(sizes[0], sum(sizes))
    return split_held_out(labels, SEED, HELD_OUT)


def _concatenated(sets: list[LabelledSet]) -> Tensor:
    return sets[0].samples.features if len(sets) == 1 else torch.cat([s.samples.features for s in sets])


def _mean(done: dict[str, Json]) -> float | None:
    return sum(row["score"] for row in done.values()) / len(done) if done else None
