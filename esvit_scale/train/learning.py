"""Whether a run learns: its k-NN accuracies beside those of the untrained trunk and of raw pixels, and advice.

Everything here is text and numbers, without torch, so that the report can use it, too.
"""

import math
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from esvit_scale.config import Config
from esvit_scale.train.row_file import read_rows

FEW_STEPS = 5_000  # no published recipe is shorter than this, and most are a hundred times longer
SMALL_IMAGE = 96  # pixels; below it the default scales of local crops leave few real pixels
LOCAL_SCALE = (0.2, 0.6)  # of the image's area, for local crops of small images
LONG_MEMORY = 0.1  # a teacher that averages over more than this fraction of the run hardly moves


@dataclass
class Measurements:
    """The accuracies that a run measured on held-out images, in the order of their steps.

    Attributes:
        measured: pairs of a step and the accuracy at it, from 0 to 1; step 0 is before training.
        counts_from: step at which the run was last made longer; `train.patience` counts later measurements alone.
    """

    measured: list[tuple[int, float]] = field(default_factory=list)
    counts_from: int = field(default=0, kw_only=True)

    @property
    def trained(self) -> list[tuple[int, float]]:
        """The measurements after step 0."""
        return [(step, accuracy) for step, accuracy in self.measured if step > 0]

    @property
    def best(self) -> tuple[int, float] | None:
        """The first step after 0 with the best accuracy, and the accuracy."""
        return max(self.trained, key=lambda found: found[1], default=None)

    def add(self, step: int, accuracy: float) -> None:
        """Append the accuracy, a fraction, that was measured at a step."""
        self.measured.append((step, accuracy))

    def cut(self, step: int) -> None:
        """Forget the measurements after `step`."""
        self.measured = [found for found in self.measured if found[0] <= step]

    def is_best(self, step: int) -> bool:
        """Return whether the best accuracy so far is that of `step`."""
        return self.best is not None and self.best[0] == step

    def since_best(self) -> int:
        """Return how many measurements came after the best one, and after the run was last made longer."""
        return 0 if self.best is None else sum(step > max(self.best[0], self.counts_from) for step, _ in self.trained)


@dataclass
class KnnHistory(Measurements):
    """The k-NN accuracies of a run on its held-out images; that of step 0 is the untrained trunk's, or that of the
    weights from which the run starts.

    Attributes:
        pixels: the accuracy of raw pixels on the same images; None if it is not known.
        images: number of held-out images; 0 if it is not known.
        held_out: where these images lie; "" if it is not known.
        largest_class: the fraction of them that is of the most frequent class; None if it is not known.
    """

    pixels: float | None = None
    images: int = 0
    held_out: str = ""
    largest_class: float | None = None

    @property
    def untrained(self) -> float | None:
        """The accuracy at step 0."""
        return next((accuracy for step, accuracy in self.measured if step == 0), None)

    def on(self, held_out: str, images: int, pixels: float | None, largest_class: float | None) -> "KnnHistory":
        """Return the history of a run that measures on the given images from now on: an empty one if they are others.

        They count as the same ones where they lie in the same place, or are as many, with the same accuracy of raw pixels.
        """
        is_same = not self.held_out or self.held_out == held_out or (self.images, self.pixels) == (images, pixels)
        measured = self.measured if is_same else []
        return replace(
            self, measured=measured, held_out=held_out, images=images, pixels=pixels, largest_class=largest_class
        )

    def fields(self, step: int) -> dict[str, Any]:
        """Return the fields of the row of `step`, which was just measured. The first row names the images."""
        found: dict[str, Any] = {"knn_top1": dict(self.measured)[step]}
        if len(self.measured) > 1:
            return found
        about = {"knn_top1_pixels": self.pixels, "knn_largest_class": self.largest_class}
        return found | about | {"knn_images": self.images, "knn_held_out": self.held_out}

    def margin(self) -> float:
        """Return two standard errors of an accuracy on these images; differences below it may be chance."""
        if not self.images or self.best is None:
            return 0.0
        return 2 * math.sqrt(self.best[1] * (1 - self.best[1]) / self.images)

    def summary(self) -> dict[str, Any]:
        """Return the part "knn" of summary.json."""
        best, last = self.best, self.trained[-1] if self.trained else None
        return {
            "images": self.images or None,
            "pixels": self.pixels,
            "largest_class": self.largest_class,
            "untrained": self.untrained,
            "last": {"step": last[0], "top1": last[1]} if last else None,
            "best": {"step": best[0], "top1": best[1]} if best else None,
        }


def read_history(run: Path, step: int) -> KnnHistory:
    """Return the k-NN accuracies in the metrics.jsonl of a run, up to `step`; none at step 0, where a run begins."""
    if step == 0:
        return KnnHistory()
    found = history_of(row for row in read_rows(run / "metrics.jsonl") if row["step"] <= step)
    found.counts_from = max((row["step"] for row in read_rows(run / "lengthened.jsonl")), default=0)
    return found


def history_of(rows: Iterable[Mapping[str, Any]]) -> KnnHistory:
    """Return the k-NN accuracies in rows of metrics.jsonl: those on the images that were measured last."""
    found = KnnHistory()
    for row in rows:
        if "knn_held_out" in row:
            found = KnnHistory(images=row.get("knn_images", 0), held_out=row["knn_held_out"])
        if isinstance(pixels := row.get("knn_top1_pixels"), float):
            found.pixels = pixels
        if isinstance(largest_class := row.get("knn_largest_class"), float):
            found.largest_class = largest_class
        if isinstance(accuracy := row.get("knn_top1"), float):
            found.add(row["step"], accuracy)
    return found


def how_to_measure(config: Config) -> list[str]:
    """Return lines with the commands that measure the k-NN accuracy of a run, of its untrained trunk and of pixels.

    Of a run with several modalities, they measure how well these find each other.
    """
    run_path = shlex.quote(str(config.run_path))
    if config.signal_views:
        command, sets = "esvit-scale evaluate modalities --checkpoint", "--data SHARDS --train LABELLED --out"
        return [
            f"is it good? {command} {run_path} {sets} {run_path}/modalities",
            f"untrained: {command} untrained:{run_path} {sets} {run_path}/modalities-untrained",
        ]
    sets = "--train LABELLED --test LABELLED --out"
    return [
        f"is it good? esvit-scale evaluate knn --checkpoint {run_path} {sets} {run_path}/knn",
        f"untrained: esvit-scale evaluate knn --checkpoint untrained:{run_path} {sets} {run_path}/knn-untrained",
        f"raw pixels: esvit-scale evaluate knn --checkpoint pixels {sets} {run_path}/knn-pixels",
        "train.knn_every=500 with data.held_out=LABELLED measures all three during training",
    ]


def verdict(config: Config, history: KnnHistory, run: "RunFacts") -> list[str]:
    """Return lines that compare the trained trunk with the untrained one and with raw pixels.

    When nothing was gained, they give the likeliest reasons. Without measurements, they say how to get some.
    """
    if not history.trained or history.best is None:
        return how_to_measure(config)
    step, accuracy = history.trained[-1]
    best_step, best = history.best
    parts = [f"{100 * accuracy:.1f} % trained (step {step})"]
    parts += [f"{100 * best:.1f} % at best (step {best_step})"] if best_step != step else []
    parts += [f"{100 * value:.1f} % {name}" for name, value in _baselines(history, config)]
    start = "start" if config.model.init_from else "untrained"
    parts += [f"{start} not measured on these images"] if history.untrained is None else []
    images = f"{history.images:,} held-out images" if history.images else "held-out images"
    found = [f"k-NN on {images}: {', '.join(parts)}"]
    trunk = "the weights at the start" if config.model.init_from else "the untrained trunk"
    problems = list(_nothing_gained(history, best, trunk))
    if not problems:
        return found
    return [*found, *problems, "the likeliest reasons:", *(f"- {reason}" for reason in reasons(config, run))]


def _nothing_gained(history: KnnHistory, best: float, trunk: str) -> Iterator[str]:
    """Yield a line for every baseline that the best accuracy of a run does not exceed; `trunk` names that of step 0."""
    margin = history.margin()
    if history.untrained is not None and (gain := best - history.untrained) <= margin:
        compared = points_in_words(100 * gain, trunk)
        told = f": {history.images:,} images tell differences above {100 * margin:.1f} points" if margin else ""
        chance, nothing = f"{compared} at best, which may be chance{told}", f"nothing was gained: {compared} at best"
        yield chance if 100 * gain >= 0.05 else nothing
    if history.pixels is not None and best <= history.pixels:
        yield f"raw pixels do as well or better ({100 * history.pixels:.1f} %): these features are not worth using yet"
    if history.largest_class is not None and best <= history.largest_class:
        yield f"always guessing the largest class does as well or better ({100 * history.largest_class:.1f} %)"


def points_in_words(points: float, name: str) -> str:
    """Return how far an accuracy is from that of `name`, such as "1.1 points below raw pixels"."""
    if round(abs(points), 1) == 0:
        return f"as good as {name}"
    return f"{abs(points):.1f} points {'above' if points > 0 else 'below'} {name}"


def last_lines(config: Config, history: KnnHistory, run: "RunFacts", total_steps: int) -> list[str]:
    """Return the lines with which a finished run ends: its verdict, how long it was, and where it is."""
    early = f", {config.train.patience} k-NN accuracies without a new best" if run.steps < total_steps else ""
    end = f"finished: {run.steps} steps{early}, {config.run_path}"
    return [*verdict(config, history, run), end]


@dataclass(frozen=True)
class RunFacts:
    """What advice about a run needs beside its config."""

    steps: int  # done
    steps_per_epoch: int
    images: int  # in the data set
    tokens: dict[int, int]  # size of a crop in pixels → its region tokens; empty for a trunk without regions
    prototypes: int = 0  # of a head; 0 for an objective without prototypes


def reasons(config: Config, run: RunFacts) -> list[str]:
    """Return the likeliest reasons for a run that gained nothing, each with what to try, the likeliest first."""
    found = list(_settings_that_cannot_work(config, run))
    seen = run.steps * config.train.global_batch
    if run.steps < FEW_STEPS:
        epochs = run.steps / max(run.steps_per_epoch, 1)
        found.append(
            f"too few steps: {run.steps:,} ({seen:,} images, {epochs:.3g} epochs), where published recipes take hundreds of "
            f"thousands; raise train.{'steps' if config.train.steps else 'epochs'}, which continues this run"
        )
    found += _momentum_too_high(config, run.steps)
    found.append(
        f"the learning rate (peak {config.peak_lr:.2g}): try optim.lr={3 * config.optim.lr:.2g} and {config.optim.lr / 3:.2g}"
    )
    scales = [group.scale for group in config.data.local_crops]
    low, high = min(scales, default=(1.0, 1.0))
    if low < LOCAL_SCALE[0] and config.data.global_crops.size <= SMALL_IMAGE:
        found.append(
            f"crop scales: local crops begin at {low:.0%} of the image's area, which is little of a small picture; try "
            f"data.local_crops.{scales.index((low, high))}.scale=[{LOCAL_SCALE[0]:g},{max(high, LOCAL_SCALE[1]):g}]"
        )
    return found


def _momentum_too_high(config: Config, steps: int) -> Iterator[str]:
    """Yield a note if the teacher averages over much of a run of this many steps."""
    momentum = config.objective.ema_momentum
    horizon, shorter = 1 / max(1 - momentum, 1e-9), _momentum_for(steps)
    if horizon > LONG_MEMORY * steps and shorter < momentum:
        yield (
            f"the teacher averages over about {horizon:,.0f} of {steps:,} steps (objective.ema_momentum "
            f"{momentum:g}); try {shorter:g}"
        )


def _momentum_for(steps: int) -> float:
    """Return an EMA momentum whose teacher averages over a tenth of this many steps, but 0.9 at least."""
    return 1 - min(0.1, float(f"{10 / max(steps, 1):.2g}"))


def notes_at_start(config: Config, run: RunFacts) -> list[str]:
    """Return what is to be said before the first step about settings that hardly work."""
    total = config.train.steps or config.train.epochs * run.steps_per_epoch
    return [*_settings_that_cannot_work(config, run), *_momentum_too_high(config, total)]


def _settings_that_cannot_work(config: Config, run: RunFacts) -> Iterator[str]:
    sizes = _sizes_with_one_token(config, run)
    if sizes and config.objective.regions:
        whole = config.data.global_crops.size in sizes
        cost = (
            "so the region loss has nothing to match; use larger crops, or objective.regions=false"
            if whole
            else "which the region loss can match in one way only; larger local crops give it more to learn from"
        )
        yield f"crops of {' and '.join(map(str, sizes))} pixels have one region token each, {cost}"
    if run.prototypes > 2 * run.images:
        fewer = max(64, 2 ** ((run.images // 2).bit_length() - 1))
        cure = f"try objective.prototypes={fewer}" if fewer < run.prototypes else "more images would help"
        yield f"{run.prototypes:,} prototypes for {run.images:,} images: most will never be a target; {cure}"
    total = config.train.steps or config.train.epochs * run.steps_per_epoch
    if total <= (still := config.optim.freeze_trunk_steps):
        yield f"the trunk stands still for {still:,} of {total:,} steps, so never learns; set a smaller optim.freeze_trunk_steps"
    gram, start = config.objective.gram_weight, config.objective.gram_start
    if gram and start is not None and start >= total:
        yield f"Gram anchoring begins after {start:,} of {total:,} steps, so never; set a smaller objective.gram_start"
    global_size = config.data.global_crops.size
    if gram and run.tokens.get(global_size) == 1:
        yield f"global crops of {global_size} pixels have one region each, so Gram anchoring has no pairs; use larger crops"
    warmup = int(config.optim.warmup_epochs * run.steps_per_epoch)
    if 2 * warmup > total:
        yield (
            f"the warm-up takes {min(warmup, total):,} of {total:,} steps; try "
            f"optim.warmup_epochs={0.1 * total / max(run.steps_per_epoch, 1):.2g}"
        )


def _sizes_with_one_token(config: Config, run: RunFacts) -> list[int]:
    return [size for size in sorted(set(config.crop_sizes), reverse=True) if run.tokens.get(size) == 1]


def _baselines(history: KnnHistory, config: Config) -> Sequence[tuple[str, float]]:
    named = (
        ("at the start" if config.model.init_from else "untrained", history.untrained),
        ("raw pixels", history.pixels),
        ("always guessing the largest class", history.largest_class),
    )
    return [(name, value) for name, value in named if value is not None]
