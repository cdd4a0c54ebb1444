"""`esvit-scale evaluate depth`: predicting the depth of every pixel by a linear head on frozen stage maps.

Images are covered by windows and stage maps are interpolated as in segmentation.py, at the centres of the depth map's
own pixels, so that maps are never resized; the head is that of depth_head.py.

Measures, of each image over its pixels with depth and then averaged over images, as published: the root mean squared
error in metres (RMSE), the mean of |predicted − true| / true (absolute relative error), and the fraction of pixels
within a factor of 1.25, 1.25² and 1.25³ of the truth (δ1, δ2, δ3). The interval resamples images: each counts Poisson(1)
times in each resample, a bootstrap that keeps no image's result.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from esvit_scale.data import depth_maps
from esvit_scale.data.depth_maps import Depth, DepthImage, DepthSet
from esvit_scale.errors import UserError
from esvit_scale.evaluate import depth_head, feature_cache, pixel_heads
from esvit_scale.evaluate.attention import require_pictures
from esvit_scale.evaluate.depth_head import PER_METRE, DepthHead
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
from esvit_scale.evaluate.pixel_heads import PixelSamples
from esvit_scale.evaluate.segmentation import EXAMPLE_SIDE, EXAMPLES
from esvit_scale.evaluate.stage_features import Window, at_pixels, features_at, window_sizes, windows_of_set
from esvit_scale.parallel import collectives

MEASURES = ("rmse", "abs_rel", "delta1", "delta2", "delta3")

Json = dict[str, Any]


class DepthSettings(NamedTuple):
    """The options of `esvit-scale evaluate depth` that make its protocol."""

    size: int | None = None  # pixels of the short side; None: the size of the run's global crops
    crop: int | None = None  # side of a window; None: `size`
    stride: int | None = None  # None: two thirds of `crop`
    scale: float = depth_maps.MILLIMETRES  # values of a PNG that make a metre
    least: float = 1e-3  # metres: smallest and largest depth that counts, and that is predicted
    most: float = 10.0
    bins: int = 256
    pixels: int = 64  # sampled pixels of every training image
    iterations: int = 2000  # of AdamW
    batch: int = 16  # images in a batch, over all ranks
    seed: int = 0


class Example(NamedTuple):
    """A test image with its depth and the predicted one, reduced for a figure."""

    key: str
    picture: NDArray[np.uint8]  # [h, w, 3]
    truth: Depth  # [h, w], 0 without depth
    predicted: Depth


class DepthResult(NamedTuple):
    """The content of depth.json, and examples to draw."""

    summary: Json
    examples: list[Example]


class Tally:
    """Sums of the measures over images, and their bootstrap resamples.

    The weight of an image in a resample is a function of (seed, image), so that the result does not depend on the number
    of ranks or the order of images. Memory does not grow with the number of images.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.sums: NDArray[np.float64] = np.zeros((RESAMPLES + 1, len(MEASURES) + 1))  # row 0: all images once

    def add(self, number: int, truth: NDArray[np.float32], predicted: NDArray[np.float32]) -> None:
        """Count one image: the true and predicted depths [n] of its pixels; an image without any does not count."""
        if not len(truth):
            return
        weights = np.random.default_rng([self.seed, number]).poisson(1, RESAMPLES)
        self.sums += np.concatenate([[1.0], weights])[:, None] * np.array([*measures(truth, predicted), 1.0])

    def reduce(self) -> None:
        """Sum over all ranks."""
        self.sums[...] = collectives.all_reduce_sum_(torch.from_numpy(self.sums).to(default_device())).cpu().numpy()

    def result(self) -> Json:
        """Return the mean of every measure over images, and the intervals of RMSE and δ1; δ in percent."""
        means = self.sums[self.sums[:, -1] > 0]
        means = means[:, :-1] / means[:, -1:]
        means[:, 2:] *= 100
        row: Json = {name: float(value) for name, value in zip(MEASURES, means[0], strict=True)}
        return row | {"interval": _interval(means[1:, 0]), "delta1_interval": _interval(means[1:, 2])}


def measures(truth: NDArray[np.float32], predicted: NDArray[np.float32]) -> list[float]:
    """Return RMSE, absolute relative error and δ1 to δ3 (as fractions) of depths [n]."""
    t, p = truth.astype(np.float64), predicted.astype(np.float64)
    ratio = np.maximum(t / p, p / t)
    errors = [float(np.sqrt(np.mean((t - p) ** 2))), float(np.mean(np.abs(t - p) / t))]
    return errors + [float((ratio < 1.25**n).mean()) for n in (1, 2, 3)]


def run_depth(
    checkpoint: Path, train: Path, test: Path, out: Path, settings: DepthSettings, options: ExtractionOptions
) -> DepthResult:
    """Run `esvit-scale evaluate depth`: write `out`/depth.json and return the result.

    All ranks call it. Besides the head and a band of scores, `options.batch` windows and the images that the loaders
    prepare are in memory; nothing grows with the number of images but the mapped cache.

    Args:
        train, test: sets in the layouts of data/depth_maps.py.

    Raises:
        UserError: a set is in no known layout, a map does not fit its image or cannot be read, no depth lies in the range,
            a window is larger than the image, or the trunk gives no tokens on a grid.
    """
    if not 0 < settings.least < settings.most:
        raise UserError(f"--min-depth {settings.least:g}: must be above 0 and below --max-depth {settings.most:g}")
    teacher = load_frozen_trunk(checkpoint)
    require_pictures(teacher)
    size = settings.size or teacher.size
    crop, stride = window_sizes(size, settings.crop, settings.stride)
    settings = settings._replace(size=size, crop=crop, stride=stride)
    sets = collectives.run_on_rank0_and_broadcast(lambda: _open(train, test, settings, options.workers))
    found = sampled_pixels(teacher, sets[0], settings, options)
    check_finite("train", found.features)
    samples = PixelSamples(found.features, found.labels, settings.bins)
    standardize = pixel_heads.standardization(samples)
    device = torch.device(options.device) if options.device else default_device()
    bins = depth_head.uniform_bins(settings.least, settings.most, settings.bins)
    head = depth_head.train_depth(
        samples, standardize, bins, settings.iterations, settings.batch, settings.seed, device
    )
    constant = float(found.labels[found.labels >= 0].double().mean()) / PER_METRE
    tallies: dict[str, Tally] = {"linear": Tally(settings.seed), "constant": Tally(settings.seed)}
    examples: list[Example] = []
    feature_cache.run_on_all_ranks(
        lambda: examples.extend(_evaluate(teacher, sets[1], head, constant, tallies, settings, options, device)),
        str(test),
    )
    for tally in tallies.values():
        tally.reduce()
    examples = sorted((e for part in collectives.gather_objects(examples) for e in part), key=lambda e: e.key)
    summary = teacher.origin(checkpoint) | {
        "train": str(train),
        "test": str(test),
        "n_train": len(sets[0].keys),
        "n_test": int(tallies["linear"].sums[0, -1]),
        "mean_depth": constant,
        "protocol": _protocol(settings, sets, head, found.features.shape[2], options),
        "results": {name: tally.result() for name, tally in tallies.items()},
    }
    if collectives.rank() == 0:
        write_result(summary, out / "depth.json")
        print(table(summary))
    return DepthResult(summary, examples)


def table(summary: Json) -> str:
    """Format the content of depth.json as text."""
    head = f"{'RMSE, m':>9}{'95 %':>15}{'rel. error':>12}{'δ1, %':>8}{'95 %':>14}{'δ2, %':>8}{'δ3, %':>8}"
    lines = [f"{'depth':<24}{head}"]
    for name, row in summary["results"].items():
        title = name if name != "constant" else f"always {summary['mean_depth']:.2f} m"
        rmse = "{:.3f}–{:.3f}".format(*row["interval"])
        near = "{:.1f}–{:.1f}".format(*row["delta1_interval"])
        cells = f"{row['rmse']:9.3f}{rmse:>15}{row['abs_rel']:12.3f}{row['delta1']:8.1f}{near:>14}"
        lines.append(f"{title:<24}{cells}{row['delta2']:8.1f}{row['delta3']:8.1f}")
    return "\n".join([*lines, "", protocol_in_words(summary)])


def protocol_in_words(summary: Json) -> str:
    """Return the protocol of a depth.json as a sentence, without which its figures cannot be compared."""
    p = summary["protocol"]
    crop = "Eigen's crop, " if p["counted"] != "all" else ""
    return (
        f"{summary['n_test']:,} test and {summary['n_train']:,} training images ({p['layout']}), short side {p['size']} "
        f"pixels, windows of {p['crop']} every {p['stride']}, depth maps at their own resolution, {crop}"
        f"{p['range'][0]:g} to {p['range'][1]:g} m; {p['bins']} uniform bins, {p['pixels_per_image']} training pixels of each "
        f"image, {p['iterations']:,} iterations of {p['batch']} images, learning rate {p['lr']:g}, selected of "
        f"{len(p['rates'])} on {p['held_out_images']} held-out training images."
    )


def sampled_pixels(
    teacher: FrozenTrunk, found: DepthSet, settings: DepthSettings, options: ExtractionOptions
) -> FeatureSet:
    """Return features [N, P, D] and depths [N, P] in micrometres of P pixels of every training image.

    They are drawn by (seed, image) among the pixels with depth; an image without any gets the depth −1 P times.
    """
    device = torch.device(options.device) if options.device else default_device()
    crop = settings.crop or 0

    def compute() -> Iterator[FeatureBatch]:
        for image, windows in _windows(teacher, found, settings, options, device):
            places = np.flatnonzero(image.depth)
            rng = np.random.default_rng([settings.seed, image.number])
            chosen = rng.choice(places, settings.pixels) if len(places) else np.zeros(settings.pixels, np.int64)
            row, column = (torch.from_numpy(x) for x in np.unravel_index(chosen, image.depth.shape))
            (height, width), resized = image.depth.shape, image.pixels.shape
            features = features_at(
                windows, crop, (row + 0.5) * resized[0] / height, (column + 0.5) * resized[1] / width
            )
            stored = features.half() if options.stored == "fp16" else features
            depth = torch.from_numpy(image.depth.reshape(-1)[chosen]).double()
            labels = torch.where(depth > 0, (depth * PER_METRE).round(), -1).long()
            yield FeatureBatch(stored[None], [found.keys[image.number]], labels[None], torch.tensor([image.number]))

    key: Json = {"kind": "depth", "trunk": feature_cache.trunk_digest(teacher.trunk), "layout": found.layout}
    key |= {"data": feature_cache.files_digest([*found.images, *found.depths]), "scale": found.scale}
    key |= {name: getattr(settings, name) for name in ("size", "crop", "stride", "least", "most", "pixels", "seed")}
    key |= {"precision": options.precision, "stored": options.stored}
    return cached_or_temporary(options.cache, key, found.source, len(found.keys), compute)


def _open(train: Path, test: Path, settings: DepthSettings, workers: int) -> list[DepthSet]:
    """Open and check both sets; all depth maps are read once."""
    sets = [depth_maps.open_set(source, settings.scale, settings.least, settings.most) for source in (train, test)]
    for found in sets:
        depth_maps.check(found, max(1, workers))
    return sets


def _windows(
    teacher: FrozenTrunk, found: DepthSet, settings: DepthSettings, options: ExtractionOptions, device: torch.device
) -> Iterator[tuple[DepthImage, list[Window]]]:
    """Return an iterator over this rank's images of a set, each with its windows and their stage maps."""
    size, crop, stride = settings.size or 0, settings.crop or 0, settings.stride or 0
    read = lambda numbers: depth_maps.depth_images(found, numbers, size, options.workers)  # noqa: E731
    return windows_of_set(teacher, read, len(found.keys), found.source.name, crop, stride, options, device)


def _evaluate(
    teacher: FrozenTrunk,
    found: DepthSet,
    head: DepthHead,
    constant: float,
    tallies: dict[str, Tally],
    settings: DepthSettings,
    options: ExtractionOptions,
    device: torch.device,
) -> list[Example]:
    """Predict this rank's test images and count them in `tallies`; return those of its images that the figure shows."""
    shown = set(np.linspace(0, len(found.keys) - 1, min(EXAMPLES, len(found.keys))).round().astype(int).tolist())
    crop, examples = settings.crop or 0, []
    for image, windows in _windows(teacher, found, settings, options, device):
        (height, width), resized = image.depth.shape, image.pixels.shape
        scored = [head.scores(window) for window in windows]
        predicted = at_pixels(scored, crop, (resized[0], resized[1]), (height, width), head.depth).numpy()
        counts = depth_maps.counted(found, image.depth)
        tallies["linear"].add(image.number, image.depth[counts], predicted[counts])
        tallies["constant"].add(image.number, image.depth[counts], np.full(int(counts.sum()), constant, np.float32))
        if image.number in shown:
            examples.append(_example(found.keys[image.number], image, predicted))
    return examples


def _example(key: str, image: DepthImage, predicted: Depth) -> Example:
    height, width = image.depth.shape
    scale = min(1.0, EXAMPLE_SIDE / max(height, width))
    h, w = max(1, round(height * scale)), max(1, round(width * scale))
    rows, columns = np.arange(h) * height // h, np.arange(w) * width // w
    picture = np.asarray(Image.fromarray(image.pixels).resize((w, h), Image.Resampling.BICUBIC))
    return Example(key, picture, image.depth[rows][:, columns], predicted[rows][:, columns])


def _protocol(
    settings: DepthSettings, sets: Sequence[DepthSet], head: DepthHead, width: int, options: ExtractionOptions
) -> Json:
    """Return everything that the figures depend on besides weights and data."""
    return {
        "layout": sets[1].layout,
        "size": settings.size,
        "crop": settings.crop,
        "stride": settings.stride,
        "map_resolution": "original",
        "interpolation": "bilinear, of stage maps at the centres of the depth map's pixels",
        "range": [settings.least, settings.most],
        "counted": "Eigen's crop" if sets[1].layout.startswith("NYU") else "all",
        "averaged": "over images",
        "stages": "all, the last after the final norm",
        "feature_dim": width,
        "bins": settings.bins,
        "pixels_per_image": settings.pixels,
        "iterations": settings.iterations,
        "batch": settings.batch,
        "rates": list(depth_head.LEARNING_RATES),
        "lr": head.lr,
        "held_out_images": len(pixel_heads.split_images(len(sets[0].keys), settings.seed)[1]),
        "held_out_rmse": head.held_out,
        "augmentation": "none",
        "precision": options.precision,
        "seed": settings.seed,
    }


def _interval(values: NDArray[np.float64]) -> Interval:
    low, high = np.percentile(values, [2.5, 97.5])
    return [float(low), float(high)]
