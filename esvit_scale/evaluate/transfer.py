"""`esvit-scale evaluate transfer`: the scores of one trunk on many data sets, each with its own metric, and their mean.

The protocol is ELEVATER's for frozen features (Li et al. 2022): a linear classifier on the view feature. Its L2 penalty
is searched from coarse to fine on the data set's `val` set, or on a fifth of `train` if there is none. Then the
classifier is fitted to all of `train` and `val`, and scored once on `test`. The classifier is logistic regression,
fitted to convergence, so that no learning rate or number of epochs needs to be searched.

The same can be done with a few images of each class, and with other people's backbones beside the checkpoint
(comparison.py), whose zero-shot accuracy is measured too where they have a text tower (zero_shot.py).
"""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from esvit_scale.checkpoint import outside
from esvit_scale.checkpoint.text_tower import TextTower
from esvit_scale.data.evaluation import items_of
from esvit_scale.data.pixel_format import RGB8
from esvit_scale.errors import RestartCanHelp, UserError
from esvit_scale.evaluate import comparison, logistic, published, zero_shot
from esvit_scale.evaluate.feature_cache import FeatureSet, files_digest, source_digest, trunk_digest
from esvit_scale.evaluate.features import ExtractionOptions, FrozenTrunk, extract, load_frozen_trunk
from esvit_scale.evaluate.knn import write_result
from esvit_scale.evaluate.labels import (
    LabelledSet,
    check_finite,
    check_sets,
    match_classes,
    sample_per_class,
    split_held_out,
    with_class_names,
)
from esvit_scale.evaluate.metrics import METRICS, accuracy, bootstrap_interval, wilson_interval
from esvit_scale.evaluate.overlap import check_train_and_test
from esvit_scale.evaluate.transfer_list import Dataset, read_labels, read_list, targets_of
from esvit_scale.parallel import collectives

HELD_OUT = 0.2

Json = dict[str, Any]


class Protocol(NamedTuple):
    """What is measured on every data set besides the classifier of all training images."""

    seeds: int = 1  # seeds 0 … seeds − 1 draw the images of `shots` and the part that is held out
    shots: tuple[int, ...] = ()  # numbers of training images of each class; at least 2, of which one is held out


PLAIN = Protocol()


class Evaluated(NamedTuple):
    """A model to evaluate on all data sets: a frozen trunk, the hash of its weights, and its text tower if it has one."""

    trunk: FrozenTrunk
    digest: str
    out: Path  # folder for the results of the data sets
    text: TextTower | None = None
    text_digest: str | None = None


class TransferData(NamedTuple):
    """Features and targets of one data set: of train and val concatenated (N rows), and of test."""

    features: Tensor  # [N, C]
    targets: Tensor  # int64 [N] classes, or float32 [N, K] for several labels per image
    val: int  # number of rows of val, the last ones; 0: a part of train is held out to select the penalty on
    test: Tensor
    truth: Tensor
    names: tuple[str, ...]  # of the classes; empty if they have none
    classes: int

    def split(self, seed: int) -> tuple[Tensor, Tensor]:
        """Return the rows to fit on while the penalty is searched, and those to select it on.

        They are train and val or, without val, two parts of train: class by class for one class per image.
        """
        n = len(self.features)
        if self.val:
            return torch.arange(n - self.val), torch.arange(n - self.val, n)
        labels = self.targets if self.targets.dim() == 1 else torch.zeros(n, dtype=torch.int64)
        return split_held_out(labels, seed, HELD_OUT)


def run_transfer(
    source: Path,
    checkpoint: Path,
    out: Path,
    options: ExtractionOptions,
    root: Path | None = None,
    baseline: Path | None = None,
    backbones: Sequence[str] = (),
    published_scores: Path | None = None,
    protocol: Protocol = PLAIN,
) -> Json:
    """Run `esvit-scale evaluate transfer`: write `out`/transfer.json and return its content.

    After each data set, its result is written to `out`/datasets/NAME.json (for another backbone, below `out`/backbones).
    A data set is not evaluated again if this file exists and is of the same trunk, data and settings.

    Args:
        source: a YAML file with the list of data sets, or the name of a shipped list.
        root: folder to which relative paths in the list refer.
        baseline: transfer.json of another checkpoint to compare with.
        backbones: weights of other trunks to evaluate and compare with: `timm:NAME`, `timm:NAME@FILE`, `hf:FOLDER`, or
            whatever `load_backbone` takes.
        published_scores: CSV file of published scores to compare with.

    Raises:
        UserError: the list, the baseline, the published scores or a backbone cannot be read (raised before any work),
            or a data set failed (raised after all other data sets are evaluated and the results are written).
    """
    datasets = read_list(source, root)
    other = read_baseline(baseline) if baseline else None
    scores = published.read(published_scores, [d.name for d in datasets]) if published_scores else []
    models = [_load(str(checkpoint), out), *(_load(b, out / "backbones" / _folder_name(b)) for b in backbones)]
    (done, failed), *theirs = [_evaluate_all(datasets, model, options, protocol) for model in models]
    result: Json = models[0].trunk.origin(checkpoint) | {"list": str(source)}
    result |= {"mean": _mean(done), "datasets": done, "failed": failed}
    if protocol != PLAIN:
        result["protocol"] = protocol._asdict()
    if other is not None:
        result["baseline"] = compare(done, other) | {"file": str(baseline), "checkpoint": other["checkpoint"]}
    if backbones:
        result["backbones"] = [
            {"name": name, "mean": _mean(their_done), "datasets": their_done, "failed": their_failed}
            | {"comparison": comparison.compare_backbone(done, their_done)}
            for name, (their_done, their_failed) in zip(backbones, theirs, strict=True)
        ]
    if scores:
        names = dict.fromkeys(score.model for score in scores)
        of_model = {name: [score for score in scores if score.model == name] for name in names}
        result["published"] = [
            {"name": name, "file": str(published_scores), "scores": [score._asdict() for score in found]}
            | {"comparison": comparison.compare_published(done, found)}
            for name, found in of_model.items()
        ]
    if collectives.rank() == 0:
        write_result(result, out / "transfer.json")
        print(table(result))
        if protocol != PLAIN or backbones or scores:
            print(comparison.win_table(result))
    problems = [f"{name}: {message}" for name, message in failed.items()]
    for backbone, (_, their_failed) in zip(backbones, theirs, strict=True):
        problems += [f"{name} with {backbone}: {message}" for name, message in their_failed.items()]
    if problems:
        raise UserError(
            f"{len(problems)} of {len(datasets) * len(models)} data sets failed; the results of the others are in "
            f"{out / 'transfer.json'}, and running the command again repeats only these: {'; '.join(problems)}"
        )
    return result


def _load(source: str, out: Path) -> Evaluated:
    trunk = load_frozen_trunk(Path(source))
    text = zero_shot.text_tower(source)
    files = sorted(path for path in outside.folder_of(source).iterdir() if path.is_file()) if text else []
    return Evaluated(trunk, trunk_digest(trunk.trunk), out, text, files_digest(files) if text else None)


def _folder_name(backbone: str) -> str:
    """Return a name for a backbone's folder of results, which differs for different sources."""
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", backbone)[-60:].strip("-.")
    return f"{readable}-{hashlib.sha256(backbone.encode()).hexdigest()[:8]}"


def _evaluate_all(
    datasets: Sequence[Dataset], model: Evaluated, options: ExtractionOptions, protocol: Protocol
) -> tuple[dict[str, Json], dict[str, str]]:
    """Evaluate a model on all data sets; return the results and the reasons of failures, each by the data set's name."""
    done: dict[str, Json] = {}
    failed: dict[str, str] = {}
    for number, dataset in enumerate(datasets, 1):
        try:
            done[dataset.name] = _cached_or_evaluated(dataset, model, options, protocol)
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
    return done, failed


def evaluate(
    dataset: Dataset,
    teacher: FrozenTrunk,
    options: ExtractionOptions,
    protocol: Protocol = PLAIN,
    text: TextTower | None = None,
) -> Json:
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
    every = torch.arange(len(sets.features))
    fit, held_out = sets.split(0)
    final, best, tried = _classifier(sets, fit, held_out, every)
    scores = final.scores(sets.test)
    runs = [metric(scores, sets.truth)]
    if metric is accuracy:
        interval = wilson_interval(runs[0], len(scores))
    else:
        interval = bootstrap_interval(metric, scores, sets.truth)
    for seed in range(1, protocol.seeds):
        # With a val set no seed has any influence.
        again = scores if sets.val else _classifier(sets, *sets.split(seed), every)[0].scores(sets.test)
        runs.append(metric(again, sets.truth))
    result: Json = {
        "metric": dataset.metric,
        "score": sum(runs) / len(runs),
        "interval": interval,
        "selected": best._asdict(),
        "path": [candidate._asdict() for candidate in tried],
        "n_train": len(sets.features),
        "n_held_out": len(held_out),
        "n_test": len(scores),
        "classes": sets.classes,
        "left_out": sum(f.left_out for f in found),
        "converged": final.converged,
    }
    if protocol.seeds > 1:
        result["runs"] = runs
    if protocol.shots:
        result["few_shot"] = {str(n): _few_shot(sets, n, protocol.seeds, dataset.metric) for n in protocol.shots}
    if text is not None and sets.names:
        classes = zero_shot.class_embeddings(text, sets.names, dataset.prompts or zero_shot.PROMPTS)
        result["zero_shot"] = metric(zero_shot.scores(text, sets.test, classes), sets.truth)
    return result


def _classifier(
    sets: TransferData, fit: Tensor, held_out: Tensor, every: Tensor
) -> tuple[logistic.LogisticModel, logistic.Candidate, list[logistic.Candidate]]:
    """Search the penalty with a fit on some rows, tested on the held-out ones; then fit to `every` row.

    Return the classifier, the selected penalty and all that were tried.
    """

    def rows(some: Tensor) -> logistic.LabelledFeatures:
        return logistic.LabelledFeatures(sets.features, some, sets.targets[some], sets.classes)

    best, tried = logistic.search_penalty(rows(fit), rows(held_out))
    return logistic.fit(rows(every), best.l2), best, tried


def _few_shot(sets: TransferData, n: int, seeds: int, metric: str) -> Json:
    """Return the scores with only n training images of each class, one for each seed, or the reason why there are none.

    The images are drawn from train and val together, and a fifth of them (at least one of each class) selects the
    penalty.
    """
    if METRICS[metric].multi_label:
        return {"why_not": "the images have several labels, of which no number per class can be drawn"}
    runs = []
    for seed in range(seeds):
        try:
            drawn = sample_per_class(sets.targets, n, seed, sets.names)
        except UserError as error:
            return {"why_not": str(error)}
        fit, held_out = split_held_out(sets.targets[drawn], seed, HELD_OUT)
        model, _, _ = _classifier(sets, drawn[fit], drawn[held_out], drawn)
        runs.append(METRICS[metric].score(model.scores(sets.test), sets.truth))
    return {"score": sum(runs) / len(runs), "runs": runs}


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


def _cached_or_evaluated(dataset: Dataset, model: Evaluated, options: ExtractionOptions, protocol: Protocol) -> Json:
    """Return the data set's result from the model's folder, or evaluate the data set and write its result there.

    A result that is there is used only if it is of the same trunk, data and settings.
    """
    teacher, path = model.trunk, model.out / "datasets" / f"{dataset.name}.json"

    def look_up() -> tuple[Json, Json | None]:
        sources = {str(s): source_digest(s) for s in (dataset.train, dataset.val, dataset.test) if s is not None}
        labels = dataset.labels.read_bytes() if dataset.labels and dataset.labels.is_file() else b""
        identity: Json = {"trunk": model.digest, "size": teacher.size, "precision": options.precision, "data": sources}
        identity |= {"metric": dataset.metric, "labels": hashlib.sha256(labels).hexdigest()}
        # What is as it always was is left out, so that results of earlier versions are found.
        if teacher.pixels != RGB8:
            identity["pixels"] = json.loads(json.dumps(teacher.pixels))
        if protocol != PLAIN:
            identity["protocol"] = {"seeds": protocol.seeds, "shots": list(protocol.shots)}
        if model.text is not None:
            identity["text"] = [model.text_digest, *(dataset.prompts or zero_shot.PROMPTS)]
        try:
            cached = json.loads(path.read_text())
        except (OSError, ValueError):
            return identity, None
        return identity, cached["result"] if cached.get("of") == identity else None

    identity, cached = collectives.run_on_rank0_and_broadcast(look_up)
    if cached is not None:
        return cached
    result = evaluate(dataset, teacher, options, protocol, model.text)
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
    classes = max(len(train.classes), int(train.samples.labels.max()) + 1)
    features, labels, val = _concatenated([train, *others[:-1]]), torch.cat(targets[:-1]), sum(map(len, targets[1:-1]))
    return TransferData(features, labels, val, others[-1].samples.features, targets[-1], train.classes, classes)


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
    features, val = _concatenated([LabelledSet(f, classes) for f in found[:-1]]), sum(map(len, targets[1:-1]))
    labels = torch.cat(targets[:-1])
    return TransferData(features, labels, val, found[-1].features, targets[-1], classes, len(classes))


def _check_labels(labels: Path, sources: list[Path]) -> None:
    """Raise UserError if an image of the sources has no line in the label file. All ranks call it."""

    def check() -> None:
        _, rows = read_labels(labels)
        for source in sources:
            items = items_of(source, notes=False)
            targets_of([items.key(number) for number in range(len(items))], rows, labels, source)

    collectives.run_on_rank0_and_broadcast(check)


def _concatenated(sets: list[LabelledSet]) -> Tensor:
    return sets[0].samples.features if len(sets) == 1 else torch.cat([s.samples.features for s in sets])


def _mean(done: dict[str, Json]) -> float | None:
    return sum(row["score"] for row in done.values()) / len(done) if done else None
