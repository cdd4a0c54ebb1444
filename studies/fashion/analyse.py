"""Fit the study's laws to the committed CSVs, and write the tables of README.md.

    python studies/fashion/analyse.py

reads results/*.csv (`sweep collect` wrote them), and writes results/runs.csv (the grid with its second seeds), fit.json
and figures per measure in results/knn and results/linear, and the part of README.md between its two markers. The held-out
run is never in a fit.
"""

import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from esvit_scale.scaling import checks, fit, page
from esvit_scale.scaling.table import Columns, read

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
MEASURES = {"linear": "linear_error", "knn": "knn_error"}
NAMES = {"linear": "logistic probe", "knn": "k-NN"}
HELD_OUT = (3116775.0, 27392.0)  # parameters, images seen: the cell of held_out.yaml
BEGIN, END = "<!-- tables by analyse.py -->\n", "<!-- end of tables -->\n"
Row = dict[str, str]
Json = dict[str, Any]


def main() -> None:
    grid = rows_of("sweep") + rows_of("seeds")
    write(RESULTS / "runs.csv", grid)
    for short, column in MEASURES.items():
        law(column, RESULTS / short)
        page.write(RESULTS / short, None, None, 0.35)
        keep_small(RESULTS / short)
    text = (HERE / "README.md").read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    (HERE / "README.md").write_text(before + BEGIN + tables(grid) + END + after)


def law(column: str, out: Path) -> Json:
    """Fit the law of parameters and images seen to a measure, with the prediction of the held-out run.

    The form is the simplest within one standard error of the best on hold-out, as `sweep fit` chooses it for one input.
    """
    columns = Columns(("params", "images_seen"), column, "flops", "cell")
    measured, _ = read(RESULTS / "runs.csv", columns)
    form = checks.choose(checks.hold_out(measured))
    return fit.run(RESULTS / "runs.csv", columns, out, fit.Options(form, runs=(HELD_OUT,)))


def rows_of(name: str) -> list[Row]:
    """Return the rows of results/NAME.csv; none if it was not measured."""
    path = RESULTS / f"{name}.csv"
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: list[Row]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def keep_small(folder: Path) -> None:
    """Keep fit.json and two figures; what else a report has can be made again."""
    for path in folder.iterdir():
        if path.name not in ("fit.json", "scaling-curve.svg", "scaling-isoflop.svg"):
            path.unlink()


# --- tables ----------------------------------------------------------------------------------------------------------


def tables(grid: list[Row]) -> str:
    """Return the Markdown of all tables."""
    parts = []
    for short, column in MEASURES.items():
        found = json.loads((RESULTS / short / "fit.json").read_text())
        parts += [error_table(grid, short, column), optima_table(found), prediction(found, short, column)]
    parts += [more_seeds_table(grid), reuse_table(grid), view_table(grid), ranking_table(grid)]
    return "\n" + "\n\n".join(part for part in parts if part) + "\n\n"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def error_table(grid: list[Row], short: str, column: str) -> str:
    """Return the errors by size and budget; both seeds where there are two."""
    budgets = sorted({float(row["budget"]) for row in grid})
    rows = []
    for size in sorted({int(row["params"]) for row in grid}):
        line = [f"{size / 1e6:.2f} M"]
        for budget in budgets:
            some = [row for row in grid if int(row["params"]) == size and float(row["budget"]) == budget]
            line.append(" / ".join(f"{float(row[column]):.1f}" for row in sorted(some, key=lambda row: row["seed"])))
        before = [row[column] for row in rows_of("untrained") if int(row["params"]) == size]
        line.insert(1, f"{float(before[0]):.1f}" if before else "–")
        rows.append(line)
    head = ["parameters", "untrained", *(f"{budget:.3g} FLOPs" for budget in budgets)]
    return f"**Error of the {NAMES[short]}, %** (two seeds where there are two figures):\n\n" + table(head, rows)


def optima_table(found: Json) -> str:
    """Return the law, and for each budget the best size by the law and by a parabola through the points."""
    law_text = ", ".join(
        f"{name} = {value:.4g} ({low:.3g} to {high:.3g})"
        for (name, value), (low, high) in zip(found["params"].items(), map(pair, found["ci95"].values()), strict=True)
    )
    cost = found["cost_rule"]
    rows = []
    for parabola in found["isoflop"]:
        size = best_size(found["params"], cost, parabola["compute"])
        at = f"{parabola['n_opt'] / 1e6:.2f} M" if parabola["inside"] else "outside the sizes"
        rows.append([f"{parabola['compute']:.3g}", str(parabola["points"]), at, size])
    exponent = found["size_exponent"]
    grows = (
        "not determined" if exponent["value"] is None else f"{exponent['value']:.2f} (95 % {span(exponent['ci95'])})"
    )
    scores = ", ".join(f"{score['form']} {100 * score['error']:.1f} %" for score in found["hold_out"])
    text = f"{page.LAWS[found['form']]} with {law_text} (95 % intervals). Best size ∝ FLOPs^{grows}. "
    text += f"Mean error on the dearest quarter of the runs, from a fit to the others: {scores}."
    notes = "".join(f"\n- Warning of the fit: {warning}." for warning in found["warnings"])
    head = ["FLOPs", "points", "best size, parabola", "best size, law"]
    return text + "\n" + notes + ("\n\n" + table(head, rows) if rows else "")


def best_size(params: dict[str, float], cost: Json, compute: float) -> str:
    """Return the size that the law prefers for a budget, from a fine grid between 0.01 M and 100 M parameters."""
    sizes = np.geomspace(1e4, 1e8, 4000)
    images = compute / (cost["k"] * sizes ** cost["kappa"])
    errors = params.get("E", 0.0) + params["A"] / sizes ** params["alpha"] + params["B"] / images ** params["beta"]
    at = int(errors.argmin())
    return f"{sizes[at] / 1e6:.2f} M" if 0 < at < len(sizes) - 1 else "none"


def prediction(found: Json, short: str, column: str) -> str:
    """Return what the law says of the held-out run, and what was measured."""
    row = found["predicted_runs"][0]
    text = (
        f"Held out, {row['N'] / 1e6:.2f} M parameters and {row['D']:,.0f} images ({row['compute']:.3g} FLOPs): predicted "
        f"{row['y']:.2f} % (law {span(row['y_ci95'])}; a measurement {span(row['measured_ci95'])})"
    )
    measured = rows_of("held_out")
    if not measured:
        return text + ". Not run yet."
    value, (low, high) = float(measured[0][column]), pair(row["measured_ci95"])
    where = "inside" if low <= value <= high else "**outside**"
    return text + f", measured {value:.2f} %: {where} the interval."


def more_seeds_table(grid: list[Row]) -> str:
    """Return the errors of dear cells with a second seed, which no fit has."""
    rows = rows_of("more_seeds")
    if not rows:
        return ""
    first = {(row["params"], row["budget"]): row for row in [*like(grid, rows), *rows_of("held_out")]}
    lines = [
        [
            described(row),
            *(
                f"{float(first[row['params'], row['budget']][column]):.1f} / {float(row[column]):.1f}"
                for column in MEASURES.values()
            ),
        ]
        for row in rows
    ]
    head = ["run", "logistic error, %", "k-NN error, %"]
    return "**Second seeds of dear runs**, in no fit (seed 0 / seed 1):\n\n" + table(head, lines)


def reuse_table(grid: list[Row]) -> str:
    """Return the errors by the number of different images, at one size and budget."""
    rows = rows_of("reuse")
    if not rows:
        return ""
    every = rows + like(grid, rows)
    lines = [
        [f"{int(row['unique_images']):,}", f"{float(row['epochs']):.1f}", *both(row), f"{float(row['loss']):.2f}"]
        for row in sorted(every, key=lambda row: int(row["unique_images"]))
    ]
    head = ["different images", "times each is seen", "logistic error, %", "k-NN error, %", "loss"]
    return f"**Reuse of data**, {described(rows[0])}:\n\n" + table(head, lines)


def view_table(grid: list[Row]) -> str:
    """Return the errors with the view loss alone beside those with both losses."""
    rows = rows_of("view")
    if not rows:
        return ""
    lines = [
        [
            f"{int(row['params']) / 1e6:.2f} M",
            f"{float(row['flops']):.3g}",
            f"{int(row['images_seen']):,}",
            name,
            *both(row),
        ]
        for name, some in (("V", rows), ("V+R", like(grid, rows)))
        for row in some
    ]
    head = ["parameters", "FLOPs", "images seen", "loss", "logistic error, %", "k-NN error, %"]
    return "**The view loss alone (V) against both losses (V+R)** at equal FLOPs:\n\n" + table(head, lines)


def like(grid: list[Row], rows: list[Row]) -> list[Row]:
    """Return the grid's rows of seed 0 that have the size and budget of one of `rows`."""
    wanted = {(row["params"], row["budget"]) for row in rows}
    return [row for row in grid if (row["params"], row["budget"]) in wanted and row["seed"] == "0"]


def ranking_table(grid: list[Row]) -> str:
    """Return the rank correlations of the self-supervised losses with the errors."""
    lines = []
    groups = {"all": grid}
    for size in sorted({int(row["params"]) for row in grid}):
        groups[f"{size / 1e6:.2f} M, all budgets"] = [row for row in grid if int(row["params"]) == size]
    for budget in sorted({float(row["budget"]) for row in grid}):
        groups[f"{budget:.3g} FLOPs, all sizes"] = [row for row in grid if float(row["budget"]) == budget]
    for name, rows in groups.items():
        if len(rows) < 4:
            continue
        found = [
            f"{rank_correlation([float(row[loss]) for row in rows], [float(row[error]) for row in rows]):+.2f}"
            for error in MEASURES.values()
            for loss in ("loss", "loss_view", "loss_region")
        ]
        lines.append([name, str(len(rows)), *found])
    head = [
        "cells",
        "number",
        *(f"{loss}, {NAMES[short]}" for short in MEASURES for loss in ("loss", "view", "region")),
    ]
    return (
        "**Does the loss rank the runs?** Spearman's rank correlation of the last logged loss with the error (+1: the lower "
        "the loss, the better the features):\n\n" + table(head, lines)
    )


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Return Spearman's correlation, without ties."""
    first, second = (np.argsort(np.argsort(values)).astype(float) for values in (a, b))
    return float(np.corrcoef(first, second)[0, 1])


def described(row: Row) -> str:
    return f"{int(row['params']) / 1e6:.2f} M parameters, {float(row['flops']):.3g} FLOPs"


def both(row: Row) -> list[str]:
    return [f"{float(row[column]):.1f}" for column in MEASURES.values()]


def pair(interval: list[float | None]) -> tuple[float, float]:
    low, high = (float("nan") if value is None else value for value in interval)
    return low, high


def span(interval: list[float | None]) -> str:
    low, high = pair(interval)
    return f"{low:.3g} to {high:.3g}" if np.isfinite(low) else "not determined"


if __name__ == "__main__":
    main()
