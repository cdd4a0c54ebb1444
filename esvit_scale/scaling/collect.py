"""`sweep collect`: writes the results of the finished cells to runs.csv, one row per evaluated checkpoint.

Rows of one run have the same value in the column `cell`, by which `sweep fit` groups them: they are not independent.
"""

import csv
import io
import json
from pathlib import Path
from typing import Any

from esvit_scale import files
from esvit_scale.objective import costs
from esvit_scale.scaling import runner
from esvit_scale.scaling.cells import Cell, evaluated_steps
from esvit_scale.scaling.sweep_file import Sweep
from esvit_scale.train.row_file import read_rows
from esvit_scale.train.run_records import read_summary

COLUMNS = (
    *("cell", "params", "head_params", "budget", "flops", "useful_flops", "images_seen", "unique_images", "epochs"),
    *(
        "batch",
        "step",
        "steps",
        "seed",
        "lr",
        "knn_error",
        "linear_error",
        "loss",
        "loss_view",
        "loss_region",
        "rank_me",
    ),
    *("feature_std", "images_per_s", "run_dir"),
)


def collect(found: list[Cell], sweep: Sweep, out: Path) -> list[dict[str, Any]]:
    """Write a CSV row per evaluated checkpoint of the finished cells to `out` and return the rows.

    Values that were not measured are empty.
    """
    finished = [cell for cell in found if runner.state(cell, sweep).word == "finished"]
    rows = [_row(cell, sweep, step) for cell in finished for step in evaluated_steps(cell, sweep)]
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    out.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(out, text.getvalue())
    return rows


def _row(cell: Cell, sweep: Sweep, step: int) -> dict[str, Any]:
    logged = [row for row in read_rows(cell.path / "metrics.jsonl") if row["step"] <= step]
    last = logged[-1] if logged else {}
    numbers, folder = cell.plan.numbers, runner.results_of(cell, step)
    images_seen = step * cell.config.train.global_batch
    measured = ("loss", "loss_view", "loss_region", "rank_me", "feature_std")
    return {
        "cell": cell.name,
        "params": numbers["trunk_params"],
        "head_params": numbers["head_params"],
        "budget": cell.budget,
        "flops": cell.flops * step / cell.steps,
        "useful_flops": costs.image_flops(cell.config, "useful") * images_seen,
        "images_seen": images_seen,
        "unique_images": cell.unique_images,
        "epochs": round(images_seen / cell.unique_images, 3),
        "batch": cell.config.train.global_batch,
        "step": step,
        "steps": cell.steps,
        "seed": cell.config.seed,
        "lr": cell.config.optim.lr,
        "knn_error": _knn_error(folder, sweep),
        "linear_error": _linear_error(folder),
        "images_per_s": read_summary(cell.path).get("images_per_s", ""),
        "run_dir": cell.path,
    } | {name: last.get(name, "") for name in measured}


def _knn_error(folder: Path, sweep: Sweep) -> float | str:
    """Return the k-NN error in percent, at the sweep's k or at the size of the training set if that is smaller."""
    path = folder / "knn.json"
    if sweep.evaluate is None or not path.is_file():
        return ""
    result = json.loads(path.read_text())
    k = min(sweep.evaluate.k, result["n_train"])
    return 100 - float(result["results"][str(k)]["top1"])


def _linear_error(folder: Path) -> float | str:
    """Return the error, in percent, of logistic regression on the features of a checkpoint."""
    path = folder / "linear.json"
    found = json.loads(path.read_text())["results"].get("logistic") if path.is_file() else None
    return "" if found is None else 100 - float(found["top1"])
