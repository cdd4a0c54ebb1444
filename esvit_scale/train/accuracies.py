"""The accuracies of a run that learns labels (`objective.classes`), on its held-out images, and what is said about them.

Everything here is text and numbers, without torch. Accuracies are fractions, as in metrics.jsonl.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from esvit_scale.config import Config
from esvit_scale.train.learning import Measurements
from esvit_scale.train.row_file import read_rows


class Accuracy(NamedTuple):
    """The accuracy of a classifier on labelled images."""

    top1: float
    top5: float | None  # None below six classes
    images: int
    interval: tuple[float, float]  # 95 % interval of top1


@dataclass
class AccuracyHistory(Measurements):
    """The top-1 accuracies of a run, in the order of their steps, and all figures of the last measurement."""

    last: dict[str, Any] = field(default_factory=dict)  # fields of the row

    def measure(self, step: int, averaged: Accuracy, student: Accuracy | None) -> dict[str, Any]:
        """Add the accuracies that were measured at a step, and return them as fields of the step's row.

        Args:
            averaged: that of the weights that evaluation and exports read: the EMA, or the student without one.
            student: that of the student's own weights, if there is an EMA.
        """
        self.add(step, averaged.top1)
        low, high = averaged.interval
        fields: dict[str, Any] = {"top1": averaged.top1, "top1_low": low, "top1_high": high, "top5": averaged.top5}
        if student:
            fields |= {"top1_student": student.top1, "top5_student": student.top5}
        self.last = {name: value for name, value in fields.items() if value is not None}
        self.last["held_out_images"] = averaged.images
        return self.last

    def summary(self) -> dict[str, Any]:
        """Return the part "classifier" of summary.json."""
        best = self.best
        return {**self.last, "best": {"step": best[0], "top1": best[1]} if best else None}


def read_history(run: Path, step: int) -> AccuracyHistory:
    """Return the accuracies in the metrics.jsonl of a run, up to `step`; none at step 0, where a run begins."""
    found = AccuracyHistory()
    if step == 0:
        return found
    for row in read_rows(run / "metrics.jsonl"):
        if row["step"] <= step and isinstance(top1 := row.get("top1"), float):
            found.add(row["step"], top1)
            found.last = {name: row[name] for name in FIELDS if name in row}
    found.counts_from = max((row["step"] for row in read_rows(run / "lengthened.jsonl")), default=0)
    return found


FIELDS = ("top1", "top1_low", "top1_high", "top5", "top1_student", "top5_student", "held_out_images")


def verdict(history: AccuracyHistory) -> list[str]:
    """Return lines that say how well the classifier does on held-out images, or how to measure it."""
    if history.best is None:
        return ["the accuracy was not measured; data.held_out=LABELLED measures it every epoch"]
    found, (best_step, best) = history.last, history.best
    step, _ = history.trained[-1]
    line = f"classifier on {found['held_out_images']:,} held-out images: {in_words(found)}"
    if "top1_student" in found:
        line += f", with the averaged weights; {100 * found['top1_student']:.1f} % with the student's own"
    if best_step != step:
        line += f"; {100 * best:.1f} % at best (step {best_step})"
    return [line]


def in_words(row: Mapping[str, Any]) -> str:
    """Return the accuracies of a row as text: "top-1 91.2 % (90.6 to 91.8), top-5 99.7 %"."""
    text = f"top-1 {100 * row['top1']:.1f} % ({100 * row['top1_low']:.1f} to {100 * row['top1_high']:.1f})"
    return text + (f", top-5 {100 * row['top5']:.1f} %" if "top5" in row else "")


def last_lines(config: Config, history: AccuracyHistory, step: int, total_steps: int) -> list[str]:
    """Return the lines with which a finished run ends: its verdict, how long it was, and where it is."""
    early = f", {config.train.patience} accuracies without a new best" if step < total_steps else ""
    return [*verdict(history), f"finished: {step} steps{early}, {config.run_path}"]
