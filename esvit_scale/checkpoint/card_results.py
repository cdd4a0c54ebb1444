"""Collecting the evaluation results (JSON files) in a run dir into the table of the run's model card."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

Row = tuple[str, str, str]  # a row of the table: what was measured, the result, the data set
Json = dict[str, Any]

QUOTED_K = 10  # fixed beforehand: the best k would be chosen on the test images
SEARCH_DEPTH = 2  # how many levels of folders below the run dir are searched for results


def table(run: Path) -> str:
    """Return a Markdown table of all results in the run's knn, linear, transfer and correspondence JSON files.

    The table is "" when there are no results. Damaged files and files of other programs are skipped.
    """
    rows: list[Row] = []
    for name, read in _READ.items():
        for depth in range(SEARCH_DEPTH + 1):
            for path in sorted(run.glob("*/" * depth + name)):
                rows += _rows(path, read)
    if not rows:
        return ""
    return "\n".join(["| measure | | data |", "|---|---|---|", *(f"| {a} | {b} | {c} |" for a, b, c in rows)])


def quoted_k(ks: Iterable[str | int]) -> int:
    """Return the number of neighbours whose k-NN accuracy is quoted: 10 where it was measured, else the nearest to it."""
    return min(map(int, ks), key=lambda k: (abs(k - QUOTED_K), k))


def _rows(path: Path, read: Callable[[Json], Iterator[Row]]) -> list[Row]:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        at = f", step {result['step']}" if result["step"] is not None else ""
        at += f", {result['name']}" if result.get("name") else ""  # a baseline beside the checkpoint's own results
        return [(measure + at, figure, data) for measure, figure, data in read(result)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def _knn(result: Json) -> Iterator[Row]:
    k = quoted_k(result["results"])
    row = result["results"][str(k)]
    yield f"k-NN, k = {k}", _percent(row["top1"], row.get("interval")), _sets(result)
    for shots, of_k in result.get("few_shot", {}).get("results", {}).items():
        k = quoted_k(of_k)
        yield f"k-NN, {shots} of each class, k = {k}", _percent(of_k[str(k)]["top1"]), _sets(result)


def _linear(result: Json) -> Iterator[Row]:
    share = "" if result["fraction"] == 1 else f", {100 * result['fraction']:g} % of the labels"
    for protocol, row in result["results"].items():
        yield f"linear probe, {protocol}{share}", _percent(row["top1"], row.get("interval")), _sets(result)


def _transfer(result: Json) -> Iterator[Row]:
    done = result["datasets"]
    if done:
        yield "transfer, mean", _percent(result["mean"]), f"{len(done)} data sets"
    for name, row in done.items():
        yield f"transfer, {row['metric']}", _percent(row["score"], row.get("interval")), name


def _correspondence(result: Json) -> Iterator[Row]:
    for name, found in result["measures"].items():
        if found:  # empty when every crop had cut away the places of all tokens
            data = _name(result["data"]) if name != "stereo" else "stereo_motorcycle"
            figure = f"{found['top_accuracy']:.1f} % (chance {found['chance']:.1f} %)"
            yield f"correspondence, {name}, 10 most similar", figure, data
            yield f"correspondence, {name}, all", f"{found['accuracy']:.1f} % (chance {found['chance']:.1f} %)", data


_READ: dict[str, Callable[[Json], Iterator[Row]]] = {
    "knn*.json": _knn,
    "linear*.json": _linear,
    "transfer*.json": _transfer,
    "correspondence*.json": _correspondence,
}


def _percent(value: float, interval: list[float] | None = None) -> str:
    return f"{value:.1f} %" + (f" ({interval[0]:.1f} – {interval[1]:.1f})" if interval else "")


def _sets(result: Json) -> str:
    return " → ".join(_name(result.get(split, "?")) for split in ("train", "test"))


def _name(path: str) -> str:
    return Path(path).name.replace("|", "\\|")
