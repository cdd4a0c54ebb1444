"""The part of the report that answers whether a run learns: its k-NN during training beside the baselines."""

import math
from collections.abc import Sequence
from typing import Any

from esvit_scale.report.run_files import RunFiles
from esvit_scale.report.tables import Cell, NamedRun, Remark, Row, Table, join, not_comparable, quoted
from esvit_scale.train.learning import KnnHistory, history_of, points_in_words

NOTE = (
    "Top-1 of a leave-one-out k-NN vote on held-out images, measured during training (train.knn_every), beside the same "
    "trunk before training and the pixels themselves. Features below raw pixels are of no use yet."
)


def learning(runs: Sequence[NamedRun]) -> Table | None:
    """Return the table of k-NN accuracies measured during training; None if no run measured any."""
    rows, remarks = [], []
    for name, run in runs:
        found = history(run)
        if found.best is None:
            continue
        values = [("raw pixels", found.pixels), ("untrained", found.untrained)]
        values += [(f"trained, step {step}", accuracy) for step, accuracy in _shown(found)]
        rows += [
            Row(join(name, label), [Cell(f"{100 * value:.1f} %", value == found.best[1])], 100 * value)
            for label, value in values
            if value is not None
        ]
        if found_remark := remark(name, (run.summary or {}).get("verdict")):
            remarks.append(found_remark)
    if not rows:
        return None
    return Table("learning", "Is it learning?", NOTE, ["features", "k-NN"], rows, different_images(runs), remarks)


def verdict(of: RunFiles) -> list[str]:
    """Return sentences that say what training gained: by its k-NN during training, and by `evaluate knn` afterwards."""
    measured = (of.summary or {}).get("verdict")
    found = []
    if history(of).best is not None and isinstance(measured, list):
        found = [str(line) for line in measured if not str(line).startswith(("- ", "the likeliest reasons"))]
    gained = gain(of.results["knn"])
    return [
        f"{line[:1].upper() if line[:4] != 'k-NN' else 'k'}{line[1:]}.".replace(" %", "\u00a0%")
        for line in [*found, *([gained] if gained else [])]
    ]


def gain(results: Sequence[dict[str, Any]]) -> str:
    """Return a sentence that compares the last trained result of `evaluate knn` with its baselines at the same k.

    It is empty without a trained result and a baseline on the same test images.
    """
    trained = [r for r in results if r.get("step") and isinstance(r.get("results"), dict)]
    if not trained:
        return ""
    last = trained[-1]
    (k, top1), images = quoted(last), last["n_test"]
    margin = 200 * math.sqrt(top1 / 100 * (1 - top1 / 100) / images)
    gains = {
        str(r["name"]): top1 - r["results"][str(k)]["top1"]
        for r in results
        if r.get("name") and not r.get("step") and r.get("test") == last.get("test") and str(k) in r["results"]
    }
    if not gains:
        return ""
    over = "; ".join(
        points_in_words(points, name) + (", which may be chance" if 0.05 <= abs(points) <= margin else "")
        for name, points in gains.items()
    )
    said = f"k-NN with k = {k} on {images:,} test images: {top1:.1f} % trained (step {last['step']:,}); {over}"
    if any(abs(points) <= margin for points in gains.values()):
        said += f" ({images:,} images tell differences above {margin:.1f} points)"
    return said


def remark(name: str, verdict: object) -> Remark | None:
    """Return what a run's verdict (`train.learning.verdict`) says below its first line, whose figures the table has.

    It is None when the run gained something.
    """
    if not isinstance(verdict, list) or len(verdict) < 2:
        return None
    lines = [str(line) for line in verdict[1:]]
    said = [f"{line[:1].upper()}{line[1:]}" for line in lines if not line.startswith("- ")]
    sentences = [line if line.endswith(":") else f"{line}." for line in said]
    return Remark(name, sentences, [line[2:] for line in lines if line.startswith("- ")])


def different_images(runs: Sequence[NamedRun]) -> str:
    """Return a sentence if k-NN during training was measured on different held-out images, by one run or by several."""
    sets: list[tuple[KnnHistory, str]] = []
    for name, run in runs:
        for row in run.rows:
            images = history_of([row])
            if images.held_out and not any(_is_same(images, known) for known, _ in sets):
                words = f"on {images.images:,} of {images.held_out} from step {row['step']:,}"
                sets.append((images, f"{name} {words}".strip()))
    return not_comparable([words for _, words in sets])


def _is_same(a: KnnHistory, b: KnnHistory) -> bool:
    """Return whether two measurements are on the same images: as many in the same place, or of the same raw pixels."""
    return a.images == b.images and (a.held_out == b.held_out or a.pixels == b.pixels)


def history(run: RunFiles) -> KnnHistory:
    """Return the k-NN accuracies in a run's rows, with those of raw pixels on the same images."""
    return history_of(run.rows)


def marks(runs: Sequence[RunFiles]) -> tuple[tuple[str, float], ...]:
    """Return the lines that the figure of a single run's k-NN shows: name and accuracy of every baseline."""
    if len(runs) > 1:
        return ()
    found = history(runs[0])
    named = (("untrained", found.untrained), ("raw pixels", found.pixels))
    return tuple((name, value) for name, value in named if value is not None)


def _shown(found: KnnHistory) -> list[tuple[int, float]]:
    """Return the best and the last measurement, or one if they are the same."""
    assert found.best is not None
    return [found.best] if found.best[0] == found.trained[-1][0] else [found.best, found.trained[-1]]
