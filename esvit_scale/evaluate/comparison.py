"""Comparing one trunk's transfer with others' on the same data sets: wins, losses, and what the seeds leave undecided.

Others are backbones that ran here by the same protocol (draws and held-out parts of the same seeds, so that differences
are paired), and published scores, of which nothing but the number is known.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from esvit_scale.evaluate.metrics import mean_interval
from esvit_scale.evaluate.published import FULL, ZERO_SHOT, PublishedScore

Json = dict[str, Any]
WIN, LOSS, UNDECIDED = "win", "loss", "undecided"


def runs_of(row: Json) -> dict[str, list[float]]:
    """Return the scores of a data set's result: for each setting ("full", "5-shot", …, "zero-shot") one for each seed."""
    found = {FULL: list(row.get("runs", [row["score"]]))}
    found |= {f"{n}-shot": cell["runs"] for n, cell in row.get("few_shot", {}).items() if cell.get("runs")}
    return found | ({ZERO_SHOT: [row["zero_shot"]]} if row.get("zero_shot") is not None else {})


def compare_runs(ours: Sequence[float], theirs: Sequence[float]) -> Json:
    """Compare the scores of two trunks with the same seeds.

    Return the mean difference in points, its 95 % interval (Student's t over the seeds; None for one seed), and the
    outcome: a win or loss if 0 lies outside the interval, else undecided. With one seed, the sign decides.
    """
    gains = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean, interval = mean_interval(gains)
    low, high = interval or (mean, mean)
    outcome = WIN if low > 0 else LOSS if high < 0 else UNDECIDED
    return {"difference": mean, "interval": interval, "outcome": outcome}


def compare_backbone(ours: dict[str, Json], theirs: dict[str, Json]) -> Json:
    """Compare two trunks on the data sets that both have, setting by setting.

    Args:
        ours, theirs: result of each data set, by its name.
    """
    cells: dict[str, dict[str, Json]] = {}
    for name in (name for name in ours if name in theirs):
        mine, other = runs_of(ours[name]), runs_of(theirs[name])
        cells[name] = {s: compare_runs(mine[s], other[s]) for s in mine if s in other}
    return {"datasets": cells} | count_outcomes(cells)


def compare_published(ours: dict[str, Json], scores: Sequence[PublishedScore]) -> Json:
    """Compare a trunk with one model's published scores of data sets and settings that ran here; the sign decides."""
    cells: dict[str, dict[str, Json]] = {}
    for row in scores:
        mine = runs_of(ours[row.dataset]).get(row.setting) if row.dataset in ours else None
        if mine is not None:
            cells.setdefault(row.dataset, {})[row.setting] = compare_runs([float(np.mean(mine))], [row.score])
    return {"datasets": cells} | count_outcomes(cells)


def count_outcomes(cells: dict[str, dict[str, Json]]) -> Json:
    """Return how many data sets are won, lost and undecided in each setting, and the mean difference in points."""
    settings: dict[str, list[Json]] = {}
    for row in cells.values():
        for setting, cell in row.items():
            settings.setdefault(setting, []).append(cell)
    return {
        "settings": {
            setting: {
                "wins": sum(c["outcome"] == WIN for c in found),
                "losses": sum(c["outcome"] == LOSS for c in found),
                "undecided": sum(c["outcome"] == UNDECIDED for c in found),
                "gain": float(np.mean([c["difference"] for c in found])),
            }
            for setting, found in settings.items()
        }
    }


def win_table(result: Json) -> str:
    """Format the comparison in a transfer.json as text: one line for each data set and setting, a column for each model.

    A score is the mean over the seeds ± their standard deviation, and what it means for the first column: W (it wins),
    L (it loses) or = (undecided).
    """
    others, published = result.get("backbones", []), result.get("published", [])
    titles = ["ours", *(f"[{i}]" for i in range(1, len(others) + 1))]
    titles += [f"[{i}] published" for i in range(len(others) + 1, len(others) + len(published) + 1)]
    lines = [("data set", "setting", *titles)]
    names = list(result["datasets"])
    means = [row["dataset"] for model in published for row in model["scores"] if row["dataset"] not in names]
    for name in [*names, *dict.fromkeys(means)]:
        columns = [
            *(_backbone_cells(m.get("datasets", {}), m.get("comparison"), name) for m in (result, *others)),
            *(_published_cells(model, name) for model in published),
        ]
        for setting in _in_order({s for column in columns for s in column}):
            lines.append((name, setting, *(column.get(setting, "–") for column in columns)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(
            c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    for number, model in enumerate([*others, *published], 1):
        text.append(f"[{number}] {model['name']}{_summary(model['comparison']['settings'])}")
    return "\n".join(text)


def _backbone_cells(datasets: dict[str, Json], comparison: Json | None, name: str) -> dict[str, str]:
    if name not in datasets:
        return {}
    outcomes = (comparison or {}).get("datasets", {}).get(name, {})
    found = {}
    for setting, runs in runs_of(datasets[name]).items():
        spread = f" ± {np.std(runs, ddof=1):.1f}" if len(runs) > 1 else ""
        found[setting] = f"{np.mean(runs):.1f}{spread}{_mark(outcomes.get(setting))}"
    return found


def _published_cells(model: Json, name: str) -> dict[str, str]:
    outcomes = model["comparison"]["datasets"].get(name, {})
    rows = [row for row in model["scores"] if row["dataset"] == name]
    return {row["setting"]: f"{row['score']:.1f}{_mark(outcomes.get(row['setting']))}" for row in rows}


def _mark(cell: Json | None) -> str:
    return "" if cell is None else {WIN: " W", LOSS: " L", UNDECIDED: " ="}[cell["outcome"]]


def _summary(settings: dict[str, Json]) -> str:
    parts = []
    for setting in _in_order(settings):
        s = settings[setting]
        parts.append(f"{setting} {s['wins']} wins, {s['losses']} losses, {s['undecided']} undecided ({s['gain']:+.1f})")
    return f": {'; '.join(parts)}" if parts else ""


def _in_order(settings: Any) -> list[str]:
    """Return settings in the order zero-shot, few-shot by number, full."""
    number = {ZERO_SHOT: 0.0, FULL: float("inf")}
    return sorted(settings, key=lambda s: number[s] if s in number else float(s.partition("-")[0]))
