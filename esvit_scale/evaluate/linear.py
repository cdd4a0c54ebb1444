"""`esvit-scale evaluate linear`: the accuracy of linear classifiers on frozen features, by three protocols.

official   The published protocol: one head on the last four blocks, trained by SGD for 100 epochs, without selection.
grid       Heads for 13 learning rates × {1, 4} blocks × 2 poolings, all trained at once. The head with the best
           accuracy on a held-out part of the training set is reported.
logistic   Logistic regression, fitted to convergence by L-BFGS. The L2 penalty with the lowest loss on the held-out
           part is selected; the classifier is then fitted to the whole training set with this penalty.

Each protocol uses the test set only once, after all selection is done.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from esvit_scale.data import augmented
from esvit_scale.data import manifest as manifests
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
    """The options of `esvit-scale evaluate linear` that concern the probe."""

    protocols: Sequence[str] = PROTOCOLS
    epochs: int = 100
    batch: int = 256  # global batch size of SGD: samples over all ranks
    augment: bool = False  # train by SGD on random crops of the images, instead of on stored features
    fraction: float = 1.0  # fraction of every class's training samples that is used
    seed: int = 0


class ProbeData(NamedTuple):
    """The input of a protocol: features [N, 2, D] (features.last_blocks) and labels of the training and test sets."""

    train: Tensor
    labels: Tensor  # int64 [N], class of every row of `train`
    numbers: Tensor | None  # int64 [N], index in the source of every row of `train`
    rows: Tensor  # int64: the rows of `train` to learn from
    test: Tensor
    truth: Tensor  # int64, class of every row of `test`, in the training set's numbering
    classes: int
    dim: int  # C, the width of the last block
    images: "ImageSource"


class ImageSource(NamedTuple):
    """The trunk and the training images, for training on random crops instead of stored features."""

    teacher: FrozenTrunk
    source: Path
    options: ExtractionOptions


def run_linear(
    checkpoint: Path,
    train: Path,
    test: Path,
    out: Path,
    settings: ProbeSettings,
    options: ExtractionOptions,
) -> Json:
    """Run `esvit-scale evaluate linear`: write `out`/linear.json and return its content.

    The file holds the sizes of the sets and, for each protocol, top-1 with its interval, top-5, and the selected
    settings.

    Raises:
        UserError: a set has no labels or only one class, a class of the test set has no training sample, or features
            are not finite.
    """
    if not 0 < settings.fraction <= 1:
        raise UserError(f"--fraction: expected more than 0 and at most 1 (0.01 is 1 %), got {settings.fraction:g}")
    check_train_and_test([train], test, "a linear probe")
    teacher = load_frozen_trunk(checkpoint)
    sets = [
        with_class_names(
            extract(teacher.trunk, s, teacher.size, **options._asdict(), kind="blocks", pixels=teacher.pixels), s
        )
        for s in (train, test)
    ]
    data = make_probe_data(sets[0], sets[1], settings, ImageSource(teacher, train, options))
    row: Json = teacher.origin(checkpoint) | {"train": manifests.address(train), "test": manifests.address(test)}
    row |= {"whole_images": True} if options.whole else {}
    row |= {
        "n_train": len(data.rows),
        "n_test": len(data.truth),
        "classes": data.classes,
        "fraction": settings.fraction,
    }
    result = row | {
        "seed": settings.seed,
        "results": {name: _PROTOCOLS[name](data, settings) for name in settings.protocols},
    }
    if collectives.rank() == 0:
        write_result(result, out / "linear.json")
        print(table(result))
    return result


def make_probe_data(train: LabelledSet, test: LabelledSet, settings: ProbeSettings, images: ImageSource) -> ProbeData:
    """Check the features of a training and a test set, and return them as the data of a probe.

    Raises:
        UserError: as `run_linear`.
    """
    truth = match_classes(train, test)
    check_sets(train.samples.features, train.samples.labels, test.samples.features, truth, "a linear probe")
    rows = torch.arange(len(train.samples.labels))
    if settings.fraction < 1:
        rows = sample_fraction(train.samples.labels, settings.fraction, settings.seed)
    classes = max(len(train.classes), int(train.samples.labels.max()) + 1)
    dim = int(getattr(images.teacher.trunk, "dim", train.samples.features.shape[-1]))
    found = (train.samples.features, train.samples.labels, train.samples.numbers, rows, test.samples.features, truth)
    return ProbeData(*found, classes, dim, images)


def official(data: ProbeData, settings: ProbeSettings) -> Json:
    """Run the official protocol and return its result for linear.json."""
    trained = _train_heads((linear_heads.OFFICIAL,), data, data.rows, settings)
    found = _score(linear_heads.head_scores(trained, 0, data.test), data.truth)
    rate = linear_heads.OFFICIAL.lr
    return found | {"lr": rate, "batch": settings.batch, "epochs": settings.epochs, "augmented": settings.augment}


def grid(data: ProbeData, settings: ProbeSettings) -> Json:
    """Run the grid protocol and return the result of the selected head for linear.json."""
    fit, held_out = _split(data, settings)
    trained = _train_heads(linear_heads.GRID, data, fit, settings)
    scores = linear_heads.accuracies(trained, data.train[held_out], data.labels[held_out])
    best = int(scores.argmax())
    found = _score(linear_heads.head_scores(trained, best, data.test), data.truth)
    heads = [h._asdict() | {"held_out": float(s)} for h, s in zip(linear_heads.GRID, scores, strict=True)]
    found |= {"selected": heads[best], "n_fit": len(fit), "n_held_out": len(held_out), "heads": heads}
    return found | {"batch": settings.batch, "epochs": settings.epochs, "augmented": settings.augment}


def logistic_regression(data: ProbeData, settings: ProbeSettings) -> Json:
    """Run the logistic protocol and return the result with the selected L2 penalty for linear.json."""
    fit, held_out = _split(data, settings)
    features, labels = data.train[:, 0], data.labels  # row 0: mean over the tokens or class token

    def of(rows: Tensor) -> logistic.LabelledFeatures:
        return logistic.LabelledFeatures(features, rows, labels[rows], data.classes)

    best, tried = logistic.search_penalty(of(fit), of(held_out))
    final = logistic.fit(of(data.rows), best.l2)
    found = _score(final.scores(data.test[:, 0]), data.truth)
    path = [candidate._asdict() for candidate in tried]
    found |= {"selected": best._asdict(), "n_fit": len(fit), "n_held_out": len(held_out)}
    return found | {"path": path, "converged": final.converged}


_PROTOCOLS = {"official": official, "grid": grid, "logistic": logistic_regression}


def table(result: Json) -> str:
    """Format the content of linear.json as a text table, with a line for each protocol."""
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


def _split(data: ProbeData, settings: ProbeSettings) -> tuple[Tensor, Tensor]:
    """Split `data.rows` into the rows to fit on and the held-out rows for selection."""
    fit, held_out = split_held_out(data.labels[data.rows], settings.seed)
    return data.rows[fit], data.rows[held_out]


def _score(scores: Tensor, truth: Tensor) -> Json:
    top1 = accuracy(scores, truth)
    return {"top1": top1, "interval": wilson_interval(top1, len(truth)), "top5": top5_accuracy(scores, truth)}


# --- SGD on stored features, or on images ---------------------------------------------------------------------------


def _train_heads(heads: tuple[HeadConfig, ...], data: ProbeData, rows: Tensor, settings: ProbeSettings) -> LinearHeads:
    trained = LinearHeads(heads, data.dim, data.train.shape[-1], data.classes, settings.seed).to(default_device())
    batches = _augmented_batches if settings.augment else _feature_batches
    linear_heads.train(trained, settings.epochs, settings.batch, lambda epoch: batches(data, rows, settings, epoch))
    return trained


def _feature_batches(data: ProbeData, rows: Tensor, settings: ProbeSettings, epoch: int) -> Iterator[LabelledBatch]:
    for mine, size in _shuffled_batches(rows, settings, epoch):
        yield LabelledBatch(data.train[mine], data.labels[mine], size)


def _augmented_batches(data: ProbeData, rows: Tensor, settings: ProbeSettings, epoch: int) -> Iterator[LabelledBatch]:
    """Yield batches of features of random crops of the training images; the crops differ from epoch to epoch."""
    teacher, source, options = data.images
    numbers = data.numbers
    assert numbers is not None
    device = default_device()
    trunk = teacher.trunk.to(device).eval()
    label_of = torch.full((int(numbers.max()) + 1,), -1)
    label_of[numbers] = data.labels
    order = list(_shuffled_batches(rows, settings, epoch))
    wanted = [numbers[mine] for mine, _ in order]
    crops = augmented.augmented_batches(
        source, wanted, teacher.size, settings.seed, epoch, options.workers, teacher.pixels
    )
    for (images, good), (_, size) in zip(crops, order, strict=True):
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16"):
            features = torch.cat([last_blocks(trunk, x) for x in images.to(device).split(options.batch)])
        yield LabelledBatch(features.float(), label_of[good], size)


def _shuffled_batches(rows: Tensor, settings: ProbeSettings, epoch: int) -> Iterator[tuple[Tensor, int]]:
    """Shuffle `rows` and yield, for every global batch, this rank's part of its rows and the size of the whole batch.

    The order is a function of (seed, epoch) and therefore the same on every rank.
    """
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + epoch)
    rank, world = collectives.rank(), collectives.world_size()
    for batch in rows[torch.randperm(len(rows), generator=generator)].split(settings.batch):
        yield batch[share(len(batch), rank, world)], len(batch)
