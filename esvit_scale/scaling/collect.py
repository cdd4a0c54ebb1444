"""`sweep collect`: writes the results of the finished cells to runs.csv, one row per cell."""

import csv
import io
import json
from pathlib import Path
from typing import Any

from esvit_scale import files
from esvit_scale.objective import costs
from esvit_scale.scaling import runner
from esvit_scale.scaling.cells import Cell
from esvit_scale.scaling.sweep_file import Sweep
from esvit_scale.train.row_file import read_rows
from esvit_scale.train.run_records import read_summary

COLUMNS = (
    *("cell", "params", "head_params", "budget", "flops", "useful_flops", "images_seen", "unique_images", "epochs"),
    *("batch", "steps", "seed", "lr", "knn_error", "linear_error", "loss", "loss_view", "loss_region", "rank_me"),
    *("feature_std", "images_per_s", "run_dir"),
)


def collect(found: list[Cell], sweep: Sweep, out: Path) -> list[dict[str, Any]]:
    """Write one CSV row per finished cell to `out` and return the rows; values that were not measured are empty."""
    rows = [_row(cell, sweep) for cell in found if runner.state(cell, sweep).word == "finished"]
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    out.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(out, text.getvalue())
    return rows


def _row(cell: Cell, sweep: Sweep) -> dict[str, Any]:
    last = (read_rows(cell.path / "metrics.jsonl") or [{}])[-1]
    numbers = cell.plan.numbers
    measured = ("loss", "loss_view", "loss_region", "rank_me", "feature_std")
    return {
        "cell": cell.name,
        "params": numbers["trunk_params"],
        "head_params": numbers["head_params"],
        "budget": cell.budget,
        "flops": cell.flops,
        "useful_flops": costs.image_flops(cell.config, "useful") * cell.images_seen,
        "images_seen": cell.images_seen,
        "unique_images": cell.unique_images,
        "epochs": round(cell.epochs, 3),
        "batch": cell.config.train.global_batch,
        "steps": cell.steps,
        "seed": cell.config.seed,
        "lr": cell.config.optim.lr,
        "knn_error": _knn_error(cell, sweep),
        "linear_error": _linear_error(cell),
        "images_per_s": read_summary(cell.path).get("images_per_s", ""),
        "run_dir": cell.path,
    } | {name: last.get(name, "") for name in measured}


def _knn_error(cell: Cell, sweep: Sweep) -> float | str:
    """Return the k-NN error in percent, at the sweep's k or at the size of the training set if that is smaller."""
    path = cell.path / "knn.json"
    if sweep.evaluate is None or not path.is_file():
        return ""
    result = json.loads(path.read_text())
    k = min(sweep.evaluate.k, result["n_train"])
    return 100 - float(result["results"][str(k)]["top1"])


def _linear_error(cell: Cell) -> float | str:
    """Return the error, in percent, of logistic regression on the features of the cell's last checkpoint."""
    path = cell.path / "linear.json"
    found = json.loads(path.read_text())["results"].get("logistic") if path.is_file() else None
    return "" if found is None else 100 - float(found["top1"])
