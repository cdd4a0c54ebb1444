"""`esvit-scale evaluate linear`: how far a linear classifier gets on frozen features, by three protocols.

official   the published one: a head on the last four blocks by SGD, 100 epochs. Nothing is selected.
grid       13 learning rates × {1, 4} blocks × 2 poolings, trained at once; the best on a held-out part of train.
logistic   L-BFGS to the optimum; the L2 penalty of least loss on the held-out part, then fitted to all of train.

The test set is read once per protocol, after everything is chosen.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from esvit_scale.data import augmented
from esvit_scale.division import share
from esvit_scale.errors import UserError
from esvit_scale.evaluate import linear_heads, logistic
from esvit_scale.evaluate.features import (
    ExtractionOptions,
    FrozenTrunk,
    default_device,
    extract,
    last_blocks,
    load_frozen_trunk,
)
from esvit_scale.evaluate.knn import write_result
from esvit_scale.evaluate.labels import (
    LabelledSet,
    check_sets,
    match_classes,
    sample_fraction,
    split_held_out,
    with_class_names,
)
from esvit_scale.evaluate.linear_heads import HeadConfig, LabelledBatch, LinearHeads
from esvit_scale.evaluate.metrics import accuracy, top5_accuracy, wilson_interval
from esvit_scale.evaluate.overlap import check_train_and_test
from esvit_scale.parallel import collectives

PROTOCOLS = ("official", "grid", "logistic")

Json = dict[str, Any]


class ProbeSettings(NamedTuple):
    """What the command line decides of a probe."""

    protocols: Sequence[str] = PROTOCOLS
    epochs: int = 100
    batch: int = 256  # of SGD, over all ranks
    augment: bool = False  # SGD over random crops of the images, a frozen forward a step, instead of over kept features
    fraction: float = 1.0  # of every training class
    seed: int = 0


class ProbeData(NamedTuple):
    """Features [N, 2, D] (features.last_blocks), which training rows count, and where they come from."""

    train: Tensor
    labels: Tensor  # int64 [N], of all training rows
    numbers: Tensor | None  # int64 [N], their places in the source
    rows: Tensor  # int64: those that the recipe's fraction leaves
    test: Tensor
    truth: Tensor  # int64, in the training set's numbering
    classes: int
    dim: int  # C of the last block
    images: "ImageSource"


class ImageSource(NamedTuple):
    """For training over images."""

    teacher: FrozenTrunk
    source: Path
    loading: ExtractionOptions


def run_linear(
    checkpoint: Path,
    train: Path,
    test: Path,
    out: Path,
    recipe: ProbeSettings,
    loading: ExtractionOptions,
) -> Json:
    """Writes `out`/linear.json: sizes, and for each protocol top-1, top-5, their interval, and what was selected.

    Raises:
        UserError: sets without labels, with one class, with other classes than each other's; broken features.
    """
    if not 0 < recipe.fraction <= 1:
        raise UserError(f"--fraction: expected more than 0 and at most 1 (0.01 is 1 %), got {recipe.fraction:g}")
    check_train_and_test([train], test, "a linear probe")
    teacher = load_frozen_trunk(checkpoint)
    sets = [
        with_class_names(
            extract(teacher.trunk, s, teacher.size, **loading._asdict(), kind="blocks", pixels=teacher.pixels), s
        )
        for s in (train, test)
    ]
    task = make_probe_data(sets[0], sets[1], recipe, ImageSource(teacher, train, loading))
    row: Json = {"checkpoint": str(checkpoint), "step": teacher.step, "train": str(train), "test": str(test)}
    row |= {"n_train": len(task.rows), "n_test": len(task.truth), "classes": task.classes, "fraction": recipe.fraction}
    result = row | {"seed": recipe.seed, "results": {name: _PROTOCOLS[name](task, recipe) for name in recipe.protocols}}
    if collectives.rank() == 0:
        write_result(result, out / "linear.json")
        print(table(result))
    return result


def make_probe_data(train: LabelledSet, test: LabelledSet, recipe: ProbeSettings, images: ImageSource) -> ProbeData:
    truth = match_classes(train, test)
    check_sets(train.samples.features, train.samples.labels, test.samples.features, truth, "a linear probe")
    rows = torch.arange(len(train.samples.labels))
    if recipe.fraction < 1:
        rows = sample_fraction(train.samples.labels, recipe.fraction, recipe.seed)
    classes = max(len(train.classes), int(train.samples.labels.max()) + 1)
    dim = int(getattr(images.teacher.trunk, "dim", train.samples.features.shape[-1]))
    found = (train.samples.features, train.samples.labels, train.samples.numbers, rows, test.samples.features, truth)
    return ProbeData(*found, classes, dim, images)


def official(task: ProbeData, recipe: ProbeSettings) -> Json:
    trained = _train_heads((linear_heads.OFFICIAL,), task, task.rows, recipe)
    found = _score(linear_heads.head_scores(trained, 0, task.test), task.truth)
    rate = linear_heads.OFFICIAL.lr
    return found | {"lr": rate, "batch": recipe.batch, "epochs": recipe.epochs, "augmented": recipe.augment}


def grid(task: ProbeData, recipe: ProbeSettings) -> Json:
    fit, held_out = _split(task, recipe)
    trained = _train_heads(linear_heads.GRID, task, fit, recipe)
    scores = linear_heads.accuracies(trained, task.train[held_out], task.labels[held_out])
    best = int(scores.argmax())
    found = _score(linear_heads.head_scores(trained, best, task.test), task.truth)
    heads = [h._asdict() | {"held_out": float(s)} for h, s in zip(linear_heads.GRID, scores, strict=True)]
    found |= {"selected": heads[best], "n_fit": len(fit), "n_held_out": len(held_out), "heads": heads}
    return found | {"batch": recipe.batch, "epochs": recipe.epochs, "augmented": recipe.augment}


def logistic_regression(task: ProbeData, recipe: ProbeSettings) -> Json:
    fit, held_out = _split(task, recipe)
    features, labels = task.train[:, 0], task.labels  # mean over tokens

    def of(rows: Tensor) -> logistic.LabelledFeatures:
        return logistic.LabelledFeatures(features, rows, labels[rows], task.classes)

    best, tried = logistic.search_penalty(of(fit), of(held_out))
    final = logistic.fit(of(task.rows), best.l2)
    found = _score(final.scores(task.test[:, 0]), task.truth)
    path = [candidate._asdict() for candidate in tried]
    found |= {"selected": best._asdict(), "n_fit": len(fit), "n_held_out": len(held_out)}
    return found | {"path": path, "converged": final.converged}


_PROTOCOLS = {"official": official, "grid": grid, "logistic": logistic_regression}


def table(result: Json) -> str:
    lines = [f"{'linear probe, %':<16}{'top-1':>8}{'95 %':>16}{'top-5':>8}  selected on a held-out part of train"]
    for name, row in result["results"].items():
        low, high = row["interval"]
        last = f"{row['top5']:8.1f}" if row["top5"] is not None else f"{'–':>8}"
        chosen = row.get("selected", {})
        selected = ", ".join(
            f"{k} {v:.2g}" if isinstance(v, float) else f"{k} {v}" for k, v in chosen.items() if k != "held_out"
        )
        lines.append(f"{name:<16}{row['top1']:8.1f}{f'{low:.1f} – {high:.1f}':>16}{last}  {selected or 'nothing'}")
    share = "" if result["fraction"] == 1 else f" ({100 * result['fraction']:g} % of each class)"
    return "\n".join([*lines, f"{result['n_test']} test samples, {result['n_train']} training samples{share}"])


def _split(task: ProbeData, recipe: ProbeSettings) -> tuple[Tensor, Tensor]:
    """Rows to fit on and rows to select on."""
    fit, held_out = split_held_out(task.labels[task.rows], recipe.seed)
    return task.rows[fit], task.rows[held_out]


def _score(scores: Tensor, truth: Tensor) -> Json:
    top1 = accuracy(scores, truth)
    return {"top1": top1, "interval": wilson_interval(top1, len(truth)), "top5": top5_accuracy(scores, truth)}


# --- SGD over kept features, or over images --------------------------------------------------------------------------


def _train_heads(heads: tuple[HeadConfig, ...], task: ProbeData, rows: Tensor, recipe: ProbeSettings) -> LinearHeads:
    trained = LinearHeads(heads, task.dim, task.train.shape[-1], task.classes, recipe.seed).to(default_device())
    batches = _augmented_batches if recipe.augment else _feature_batches
    linear_heads.train(trained, recipe.epochs, recipe.batch, lambda epoch: batches(task, rows, recipe, epoch))
    return trained


def _feature_batches(task: ProbeData, rows: Tensor, recipe: ProbeSettings, epoch: int) -> Iterator[LabelledBatch]:
    for mine, size in _shuffled_batches(rows, recipe, epoch):
        yield LabelledBatch(task.train[mine], task.labels[mine], size)


def _augmented_batches(task: ProbeData, rows: Tensor, recipe: ProbeSettings, epoch: int) -> Iterator[LabelledBatch]:
    """The official training transform: every epoch sees other crops."""
    teacher, source, loading = task.images
    numbers = task.numbers
    assert numbers is not None
    place = default_device()
    trunk = teacher.trunk.to(place).eval()
    label_of = torch.full((int(numbers.max()) + 1,), -1)
    label_of[numbers] = task.labels
    order = list(_shuffled_batches(rows, recipe, epoch))
    wanted = [numbers[mine] for mine, _ in order]
    crops = augmented.augmented_batches(
        source, wanted, teacher.size, recipe.seed, epoch, loading.workers, teacher.pixels
    )
    for (images, good), (_, size) in zip(crops, order, strict=True):
        with torch.no_grad(), torch.autocast(place.type, torch.bfloat16, enabled=loading.precision == "bf16"):
            features = torch.cat([last_blocks(trunk, x) for x in images.to(place).split(loading.batch)])
        yield LabelledBatch(features.float(), label_of[good], size)


def _shuffled_batches(rows: Tensor, recipe: ProbeSettings, epoch: int) -> Iterator[tuple[Tensor, int]]:
    """(this rank's rows of a global batch, the batch's size), shuffled by (seed, epoch) alike on every rank."""
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + epoch)
    rank, world = collectives.rank(), collectives.world_size()
    for batch in rows[torch.randperm(len(rows), generator=generator)].split(recipe.batch):
        yield batch[share(len(batch), rank, world)], len(batch)
