"""`esvit-scale evaluate segmentation`: classifying every pixel by frozen stage maps, with a linear head and with k-NN.

Protocol. An image's short side is resized to `size` pixels and covered by windows of `crop` pixels, `stride` apart. The
maps of all stages (the last one after the final norm) are interpolated bilinearly at the centres of the mask's own
pixels, in training and in evaluation, so that masks are never resized: figures at reduced masks are several points
higher or lower. Heads learn from pixels that are sampled once from every training image (pixel_heads.py).

Measures, over all pixels that are not ignored: IoU of every class and their mean (mIoU) over the classes that occur in
the masks or the predictions, pixel accuracy, and the mean over classes of their accuracy. The interval resamples images:
each counts Poisson(1) times in each resample, a bootstrap that keeps no image's result.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from esvit_scale.data import masked_images
from esvit_scale.data.masked_images import MaskedImage, MaskedSet
from esvit_scale.errors import UserError
from esvit_scale.evaluate import feature_cache, pixel_heads
from esvit_scale.evaluate.attention import require_pictures
from esvit_scale.evaluate.feature_cache import FeatureBatch, FeatureSet
from esvit_scale.evaluate.features import (
    ExtractionOptions,
    FrozenTrunk,
    cached_or_temporary,
    default_device,
    load_frozen_trunk,
)
from esvit_scale.evaluate.knn import write_result
from esvit_scale.evaluate.labels import check_finite
from esvit_scale.evaluate.metrics import RESAMPLES, Interval
from esvit_scale.evaluate.pixel_heads import LinearPixelHead, NearestPixelHead, PixelSamples
from esvit_scale.evaluate.stage_features import Window, features_at, predicted_classes, window_sizes, windows_of_set
from esvit_scale.parallel import collectives

HEADS = ("linear", "knn")
EXAMPLES, EXAMPLE_SIDE = 4, 240  # images of the figure, and pixels of their longer side

Json = dict[str, Any]
Counts = NDArray[np.int64]  # [3, K]: pixels of every class that are right, predicted, and true
Head = LinearPixelHead | NearestPixelHead


class SegmentationSettings(NamedTuple):
    """The options of `esvit-scale evaluate segmentation` that make its protocol."""

    heads: Sequence[str] = HEADS
    size: int | None = None  # pixels of the short side; None: the size of the run's global crops
    crop: int | None = None  # side of a window; None: `size`
    stride: int | None = None  # None: two thirds of `crop`
    ignore: int = 255  # number in masks that does not count
    pixels: int = 64  # sampled pixels of every training image
    iterations: int = 2000  # of SGD
    batch: int = 16  # images in a batch of SGD, over all ranks
    k: int = 30
    bank: int = 2**15  # most pixels that neighbours are searched in
    seed: int = 0


class Example(NamedTuple):
    """A test image with its mask and predictions, reduced for a figure."""

    key: str
    picture: NDArray[np.uint8]  # [h, w, 3]
    truth: NDArray[np.int32]  # [h, w], negative where ignored
    predictions: dict[str, NDArray[np.int32]]  # head → [h, w]


class SegmentationResult(NamedTuple):
    """The content of segmentation.json, and examples to draw (on rank 0; the other ranks have them, too)."""

    summary: Json
    examples: list[Example]


class Tally:
    """Counts of right, predicted and true pixels of every class, and their bootstrap resamples.

    The weight of an image in a resample is a function of (seed, image), so that the result does not depend on the number
    of ranks or the order of images. Memory does not grow with the number of images.
    """

    def __init__(self, classes: int, seed: int) -> None:
        self.seed = seed
        self.counts: Counts = np.zeros((3, classes), np.int64)
        self.resampled: NDArray[np.int64] = np.zeros((RESAMPLES, 3, classes), np.int64)

    def add(self, number: int, truth: NDArray[np.int32], predicted: NDArray[np.int64]) -> None:
        """Count one image: class numbers [H, W], negative in `truth` where a pixel is ignored."""
        n = self.counts.shape[1]
        counted = truth >= 0
        t, p = truth[counted], predicted[counted]
        found = np.stack([np.bincount(x, minlength=n) for x in (t[t == p], p, t)])
        weights = np.random.default_rng([self.seed, number]).poisson(1, RESAMPLES)
        self.counts += found
        self.resampled += weights[:, None, None] * found

    def reduce(self) -> None:
        """Sum the counts over all ranks."""
        for array in (self.counts, self.resampled):
            array[...] = collectives.all_reduce_sum_(torch.from_numpy(array).to(default_device())).cpu().numpy()

    def result(self, names: Sequence[str]) -> Json:
        """Return all measures in percent, with the intervals of mIoU and pixel accuracy."""
        iou, accuracy = class_iou(self.counts), class_accuracy(self.counts)
        right, _, true = self.counts
        rows = [
            {"class": name, "iou": _percent(i), "accuracy": _percent(a), "pixels": int(t)}
            for name, i, a, t in zip(names, iou, accuracy, true, strict=True)
        ]
        some = self.resampled[self.resampled[:, 2].sum(1) > 0]
        return {
            "miou": 100 * float(np.nanmean(iou)),
            "interval": _interval(np.nanmean(class_iou(some), axis=1)),
            "pixel_accuracy": 100 * float(right.sum() / true.sum()),
            "pixel_accuracy_interval": _interval(some[:, 0].sum(1) / some[:, 2].sum(1)),
            "mean_accuracy": 100 * float(np.nanmean(accuracy)),
            "per_class": rows,
        }


def class_iou(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return intersection over union of every class [..., K] of counts [..., 3, K]; NaN for a class without pixels."""
    right, predicted, true = np.moveaxis(counts, -2, 0)
    union = predicted + true - right
    return np.divide(right, union, out=np.full(right.shape, np.nan), where=union > 0)


def class_accuracy(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the fraction of every class's pixels that is right [..., K]; NaN for a class without true pixels."""
    right, _, true = np.moveaxis(counts, -2, 0)
    return np.divide(right, true, out=np.full(right.shape, np.nan), where=true > 0)


def run_segmentation(
    checkpoint: Path, train: Path, test: Path, out: Path, settings: SegmentationSettings, options: ExtractionOptions
) -> SegmentationResult:
    """Run `esvit-scale evaluate segmentation`: write `out`/segmentation.json and return the result.

    All ranks call it. Besides the heads and a band of scores, `options.batch` windows, the images that the loaders
    prepare and the resampled counts are in memory; nothing grows with the number of images but the mapped cache.

    Args:
        train, test: sets in the layouts of data/masked_images.py.

    Raises:
        UserError: a set is in no known layout, a mask does not fit its image or holds a number that is no class, only one
            class has pixels, a k is larger than the bank, a window is larger than the image, or the trunk gives no
            tokens on a grid.
    """
    teacher = load_frozen_trunk(checkpoint)
    require_pictures(teacher)
    size = settings.size or teacher.size
    crop, stride = window_sizes(size, settings.crop, settings.stride)
    settings = settings._replace(size=size, crop=crop, stride=stride)
    sets, counts = collectives.run_on_rank0_and_broadcast(
        lambda: _open(train, test, settings.ignore, max(1, options.workers))
    )
    names = sets[0].classes
    found = sampled_pixels(teacher, sets[0], settings, options)
    check_finite("train", found.features)
    samples = PixelSamples(found.features, found.labels, len(names))
    standardize = pixel_heads.standardization(samples)
    device = torch.device(options.device) if options.device else default_device()
    heads: dict[str, Head] = {}
    if "knn" in settings.heads:  # first, because it may raise an error
        heads["knn"] = pixel_heads.nearest_head(samples, standardize, settings.bank, settings.k)
    if "linear" in settings.heads:
        heads["linear"] = pixel_heads.train_linear(
            samples, standardize, settings.iterations, settings.batch, settings.seed, device
        )
    tallies, examples = {name: Tally(len(names), settings.seed) for name in heads}, []
    feature_cache.run_on_all_ranks(
        lambda: examples.extend(_evaluate(teacher, sets[1], heads, tallies, settings, options, device)), str(test)
    )
    for tally in tallies.values():
        tally.reduce()
    examples = sorted((e for part in collectives.gather_objects(examples) for e in part), key=lambda e: e.key)
    largest = int(counts[0].argmax())
    union = counts[1] > 0
    union[largest] = True
    summary = teacher.origin(checkpoint) | {
        "train": str(train),
        "test": str(test),
        "n_train": len(sets[0].keys),
        "n_test": len(sets[1].keys),
        "classes": len(names),
        "protocol": _protocol(settings, sets, heads, found.features.shape[2], options),
        "results": {name: tallies[name].result(names) for name in settings.heads},
        "largest_class": {
            "class": names[largest],
            "miou": 100 * float(counts[1][largest] / counts[1].sum() / union.sum()),
            "pixel_accuracy": 100 * float(counts[1][largest] / counts[1].sum()),
        },
    }
    if collectives.rank() == 0:
        write_result(summary, out / "segmentation.json")
        print(table(summary))
    return SegmentationResult(summary, examples)


def table(summary: Json) -> str:
    """Format the content of segmentation.json as text: a line for each head, then a line for each class."""
    head = f"{'mIoU':>8}{'95 %':>16}{'pixels':>8}{'95 %':>16}{'classes':>9}"
    lines = [f"{'segmentation, %':<24}{head}"]
    for name, row in summary["results"].items():
        spans = [f"{low:.1f}–{high:.1f}" for low, high in (row["interval"], row["pixel_accuracy_interval"])]
        cells = f"{row['miou']:8.1f}{spans[0]:>16}{row['pixel_accuracy']:8.1f}{spans[1]:>16}{row['mean_accuracy']:9.1f}"
        lines.append(f"{name:<24}{cells}")
    largest = summary["largest_class"]
    lines.append(
        f"{'always ' + largest['class'][:16]:<24}{largest['miou']:8.1f}{'':>16}{largest['pixel_accuracy']:8.1f}"
    )
    names = list(summary["results"])
    lines += ["", f"{'IoU of classes, %':<24}" + "".join(f"{name:>8}" for name in names) + f"{'share':>8}"]
    rows = [summary["results"][name]["per_class"] for name in names]
    total = sum(row["pixels"] for row in rows[0])
    for of_class in zip(*rows, strict=True):
        cells = "".join(f"{'–':>8}" if row["iou"] is None else f"{row['iou']:8.1f}" for row in of_class)
        lines.append(f"{of_class[0]['class'][:24]:<24}{cells}{100 * of_class[0]['pixels'] / total:8.1f}")
    return "\n".join([*lines, "", protocol_in_words(summary)])


def protocol_in_words(summary: Json) -> str:
    """Return the protocol of a segmentation.json as a sentence, without which its figures cannot be compared."""
    p = summary["protocol"]
    text = (
        f"{summary['n_test']:,} test and {summary['n_train']:,} training images ({p['layout']}), short side {p['size']} "
        f"pixels, windows of {p['crop']} every {p['stride']}, masks at their own resolution, {p['ignored']} ignored, "
        f"{p['pixels_per_image']} training pixels of each image"
    )
    if "linear" in p:
        row = p["linear"]
        text += (
            f"; linear: {row['iterations']:,} iterations of {row['batch']} images, learning rate {row['lr']:g}, selected of "
            f"{len(row['rates'])} on {row['held_out_images']} held-out training images"
        )
    if "knn" in p:
        text += f"; k-NN: {p['knn']['k']} neighbours among {p['knn']['bank']:,} pixels"
    return text + "."


def sampled_pixels(
    teacher: FrozenTrunk, found: MaskedSet, settings: SegmentationSettings, options: ExtractionOptions
) -> FeatureSet:
    """Return features [N, P, D] and classes [N, P] of P pixels of every training image, drawn by (seed, image).

    An image without labelled pixels gets the class −1 P times.
    """
    device = torch.device(options.device) if options.device else default_device()
    crop = settings.crop or 0

    def compute() -> Iterator[FeatureBatch]:
        for image, windows in _windows(teacher, found, settings, options, device):
            places = np.flatnonzero(image.mask >= 0)
            rng = np.random.default_rng([settings.seed, image.number])
            chosen = rng.choice(places, settings.pixels) if len(places) else np.zeros(settings.pixels, np.int64)
            row, column = (torch.from_numpy(x) for x in np.unravel_index(chosen, image.mask.shape))
            (height, width), resized = image.mask.shape, image.pixels.shape
            features = features_at(
                windows, crop, (row + 0.5) * resized[0] / height, (column + 0.5) * resized[1] / width
            )
            stored = features.half() if options.stored == "fp16" else features
            labels = torch.from_numpy(image.mask.reshape(-1)[chosen]).long()
            yield FeatureBatch(stored[None], [found.keys[image.number]], labels[None], torch.tensor([image.number]))

    key: Json = {"kind": "segmentation", "trunk": feature_cache.trunk_digest(teacher.trunk)}
    key |= {"data": feature_cache.files_digest([*found.images, *found.masks]), "layout": found.layout}
    key |= {name: getattr(settings, name) for name in ("size", "crop", "stride", "ignore", "pixels", "seed")}
    key |= {"precision": options.precision, "stored": options.stored}
    return cached_or_temporary(options.cache, key, found.source, len(found.keys), compute)


def _open(
    train: Path, test: Path, ignore: int, workers: int
) -> tuple[tuple[MaskedSet, MaskedSet], tuple[Counts, Counts]]:
    """Open and check both sets, read all masks once, and return the sets and how many pixels every class has in each."""
    sets = [masked_images.open_set(source, ignore) for source in (train, test)]
    if sets[0].classes and sets[1].classes and sets[0].classes != sets[1].classes:
        raise UserError(f"{test}: its classes are not those of {train}; both sets need the same classes.txt")
    counts = masked_images.count_classes(sets[0], workers)
    classes = sets[0].classes or sets[1].classes or tuple(str(i) for i in range(len(counts)))
    sets = [found._replace(classes=classes) for found in sets]
    if (counts > 0).sum() < 2:
        raise UserError(f"{train}: its masks hold only one class; segmentation needs at least two")
    of_test = masked_images.count_classes(sets[1], workers)
    if not of_test.any():
        raise UserError(f"{test}: no mask has a pixel that counts")
    return (sets[0], sets[1]), (np.pad(counts, (0, len(classes) - len(counts))), of_test)


def _windows(
    teacher: FrozenTrunk,
    found: MaskedSet,
    settings: SegmentationSettings,
    options: ExtractionOptions,
    device: torch.device,
) -> Iterator[tuple[MaskedImage, list[Window]]]:
    """Return an iterator over this rank's images of a set, each with its windows and their stage maps."""
    size, crop, stride = settings.size or 0, settings.crop or 0, settings.stride or 0
    read = lambda numbers: masked_images.masked_images(found, numbers, size, options.workers)  # noqa: E731
    return windows_of_set(teacher, read, len(found.keys), found.source.name, crop, stride, options, device)


def _evaluate(
    teacher: FrozenTrunk,
    found: MaskedSet,
    heads: dict[str, Head],
    tallies: dict[str, Tally],
    settings: SegmentationSettings,
    options: ExtractionOptions,
    device: torch.device,
) -> list[Example]:
    """Predict this rank's test images and count them in `tallies`; return those of its images that the figure shows."""
    shown = set(np.linspace(0, len(found.keys) - 1, min(EXAMPLES, len(found.keys))).round().astype(int).tolist())
    crop, examples = settings.crop or 0, []
    for image, windows in _windows(teacher, found, settings, options, device):
        predictions = {}
        for name, head in heads.items():
            scored = [head.scores(w) if isinstance(head, LinearPixelHead) else head.scores(w, crop) for w in windows]
            resized = (image.pixels.shape[0], image.pixels.shape[1])
            shape = (image.mask.shape[0], image.mask.shape[1])
            predictions[name] = predicted_classes(scored, crop, resized, shape).numpy()
            tallies[name].add(image.number, image.mask, predictions[name])
        if image.number in shown:
            examples.append(_example(found.keys[image.number], image, {n: predictions[n] for n in settings.heads}))
    return examples


def _example(key: str, image: MaskedImage, predictions: dict[str, NDArray[np.int64]]) -> Example:
    height, width = image.mask.shape
    scale = min(1.0, EXAMPLE_SIDE / max(height, width))
    h, w = max(1, round(height * scale)), max(1, round(width * scale))
    rows, columns = np.arange(h) * height // h, np.arange(w) * width // w
    picture = np.asarray(Image.fromarray(image.pixels).resize((w, h), Image.Resampling.BICUBIC))
    reduced = {name: p[rows][:, columns].astype(np.int32) for name, p in predictions.items()}
    return Example(key, picture, image.mask[rows][:, columns], reduced)


def _protocol(
    settings: SegmentationSettings,
    sets: tuple[MaskedSet, MaskedSet],
    heads: dict[str, Head],
    width: int,
    options: ExtractionOptions,
) -> Json:
    """Return everything that the figures depend on besides weights and data."""
    protocol: Json = {
        "layout": sets[1].layout,
        "size": settings.size,
        "crop": settings.crop,
        "stride": settings.stride,
        "mask_resolution": "original",
        "interpolation": "bilinear, of stage maps at the centres of the mask's pixels",
        "ignored": _ignored_in_words(sets[1], settings.ignore),
        "stages": "all, the last after the final norm",
        "feature_dim": width,
        "pixels_per_image": settings.pixels,
        "precision": options.precision,
        "seed": settings.seed,
    }
    if isinstance(linear := heads.get("linear"), LinearPixelHead):
        protocol["linear"] = {
            "iterations": settings.iterations,
            "batch": settings.batch,
            "rates": list(pixel_heads.LEARNING_RATES),
            "lr": linear.lr,
            "held_out_images": len(pixel_heads.split_images(len(sets[0].keys), settings.seed)[1]),
            "held_out_loss": linear.held_out,
            "augmentation": "none",
        }
    if isinstance(nearest := heads.get("knn"), NearestPixelHead):
        protocol["knn"] = {
            "k": settings.k,
            "bank": len(nearest.labels),
            "temperature": pixel_heads.TEMPERATURE,
            "stride": pixel_heads.KNN_STRIDE,
        }
    return protocol


def _ignored_in_words(found: MaskedSet, ignore: int) -> str:
    return {"ADE20K": "0", "Cityscapes": "all but the 19 classes"}.get(found.layout, str(ignore))


def _percent(value: float) -> float | None:
    return None if np.isnan(value) else 100 * float(value)


def _interval(values: NDArray[np.float64]) -> Interval:
    low, high = np.percentile(values, [2.5, 97.5])
    return [100 * float(low), 100 * float(high)]
