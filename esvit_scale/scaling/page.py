"""`sweep report`: turns fit.json into figures and an HTML page (report/scaling_figures.py draws them)."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from esvit_scale.errors import UserError
from esvit_scale.report import scaling_figures
from esvit_scale.report.scaling_figures import Band, Section
from esvit_scale.scaling.fit import FORMAT_VERSION
from esvit_scale.scaling.forms import FORMS, Array, predict

NAME = "scaling"
LAWS = {
    "power": "y = A / x^α",
    "power_constant": "y = E + A / x^α",
    "two_power": "y = A / N^α + B / D^β",
    "chinchilla": "y = E + A / N^α + B / D^β",
}

Json = dict[str, Any]


def write(where: Path, out: Path | None, tflops: float | None, mfu: float) -> Path:
    """Write the HTML page of a fit and its figures (PNG and SVG); return the page's path.

    Args:
        where: a fit.json, or the folder that holds one.
        out: folder to write to; None: the folder of fit.json.
        tflops: TFLOP/s of one GPU, to convert FLOPs to GPU hours; None leaves these out.
        mfu: fraction of `tflops` that training reaches.

    Raises:
        UserError: there is no fit.json, or it has another format version.
    """
    path = where / "fit.json" if where.is_dir() else where
    fit = read(path)
    columns = fit["columns"]
    title = f"Scaling of {columns['y']}"
    return scaling_figures.write(out or path.parent, NAME, title, _facts(fit, tflops, mfu), _sections(fit))


def read(path: Path) -> Json:
    """Read fit.json from its path or its folder.

    Raises:
        UserError: there is none, or it has another format version.
    """
    try:
        fit = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; `sweep fit` makes it") from None
    except ValueError:
        raise UserError(f"{path}: not valid JSON; run `sweep fit` again") from None
    if not isinstance(fit, dict) or fit.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{path}: not a fit.json of format version {FORMAT_VERSION}; run `sweep fit` again")
    return fit


def _sections(fit: Json) -> list[Section]:
    two = len(fit["columns"]["inputs"]) == 2
    x_label = "FLOPs" if two else fit["columns"]["inputs"][0]
    y_label = fit["columns"]["y"]
    compute = np.array([p["compute"] for p in fit["points"]])
    x = np.array([p["x"] for p in fit["points"]])
    y, fitted = (np.array([p[key] for p in fit["points"]]) for key in ("y", "fitted"))
    sizes = x[:, 0] if two else None
    best = fit["frontier"] if two else fit["curve"]
    found = [
        Section(
            "curve",
            f"{y_label} and compute",
            "Dots are measured. The line is "
            + ("the best that the law reaches with a budget" if two else "the fit")
            + "; dashed, it goes beyond the data.",
            scaling_figures.curve(
                compute, y, sizes, _band(best, "y"), _band(fit["predictions"], "y"), x_label, y_label
            ),
        )
    ]
    if two:
        found += _two_input_sections(fit, compute, x, y)
    found.append(
        Section(
            "residuals",
            "Residuals",
            "Measured over fitted. A pattern over compute or size means that the law is not the right one.",
            scaling_figures.residuals(compute, 100 * (y / fitted - 1), sizes, x_label),
        )
    )
    return found


def _two_input_sections(fit: Json, compute: Array, x: Array, y: Array) -> list[Section]:
    n_name, d_name = fit["columns"]["inputs"]
    found = []
    if fit["isoflop"]:
        budgets = [_budget(fit, parabola, compute, x, y) for parabola in fit["isoflop"]]
        caption = (
            "Solid: the law. Dashed: a parabola through the budget's points, with its minimum. A valley is not symmetric, "
            "so a parabola's minimum is off by an amount that depends on the sizes chosen; the table says how much."
        )
        found.append(
            Section(
                "isoflop",
                "Sizes at equal compute",
                caption,
                scaling_figures.isoflop(budgets, n_name, fit["columns"]["y"]),
            )
        )
    inside = [p for p in fit["isoflop"] if p["inside"]]
    minima = np.array([p["compute"] for p in inside]), np.array([p["n_opt"] for p in inside])
    bands = _band(fit["frontier"], "N"), _band(fit["frontier"], "D")
    if not np.isfinite(bands[0].y).any():  # the law has no optimum
        return found
    picture = scaling_figures.frontier(*bands, float(compute.max()), minima, n_name, d_name, "FLOPs")
    caption = "The size and the amount of data that the law prefers for a budget."
    return [*found, Section("frontier", "Compute-optimal split", caption, picture)]


def _budget(fit: Json, parabola: Json, compute: Array, x: Array, y: Array) -> Json:
    near = np.abs(np.log(compute / parabola["compute"])) < np.log(1.25)
    sizes = x[near, 0]
    xs = np.geomspace(sizes.min() / 1.3, sizes.max() * 1.3, 80)
    k, kappa = fit["cost_rule"]["k"], fit["cost_rule"]["kappa"]
    at = np.stack([xs, parabola["compute"] / (k * xs**kappa)], axis=1)
    law = predict(FORMS[fit["form"]], np.array([list(fit["params"].values())]), at)[0]
    return {
        "compute": parabola["compute"],
        "sizes": sizes,
        "y": y[near],
        "law": (xs, law),
        "parabola": (xs, np.exp(np.polyval(parabola["curve"], np.log(xs)))),
        "minimum": (parabola["n_opt"], parabola["y_opt"]) if parabola["inside"] else None,
    }


def _band(rows: list[Json], name: str) -> Band:
    number = lambda v: np.nan if v is None else v  # noqa: E731
    low, high = (np.array([number(row[f"{name}_ci95"][i]) for row in rows]) for i in (0, 1))
    return Band(np.array([row["compute"] for row in rows]), np.array([number(row[name]) for row in rows]), low, high)


# --- words and tables ------------------------------------------------------------------------------------------------


def _facts(fit: Json, tflops: float | None, mfu: float) -> Json:
    columns = fit["columns"]
    return {
        "subtitle": f"{columns['y']} over {' and '.join(columns['inputs'])} · {fit['n']} points of {fit['runs']} runs · "
        f"{fit['form']}: {fit['form_because']}",
        "law": LAWS[fit["form"]] + " with " + ", ".join(f"{k} = {v:.4g}" for k, v in fit["params"].items()),
        "next": _next(fit, tflops, mfu),
        "warnings": fit["warnings"],
        "tables": [_parameter_table(fit), *_check_tables(fit)],
    }


def _next(fit: Json, tflops: float | None, mfu: float) -> list[str]:
    """Return a sentence for each prediction that was asked for; without any, one at 10 times the largest compute."""
    rows = fit["predictions"] or [(fit.get("frontier") or fit["curve"])[-1]]
    largest = fit["compute_range"][1]
    return [_prediction(row, fit["columns"], largest, tflops, mfu) for row in rows]


def _prediction(row: Json, columns: Json, largest: float, tflops: float | None, mfu: float) -> str:
    by_flops = "N" in row or "flop" in columns["inputs"][0].lower() or columns["inputs"][0].lower() == "compute"
    unit = "FLOPs" if by_flops else columns["inputs"][0]
    text = f"Next, at {row['compute']:.3g} {unit} ({row['compute'] / largest:.3g} × the largest measured): "
    if "N" in row:
        text += (
            f"{columns['inputs'][0]} {_with_interval(row, 'N')}, {columns['inputs'][1]} {_with_interval(row, 'D')}, "
        )
    text += f"{columns['y']} {_with_interval(row, 'y')}"
    if by_flops:
        text += f"; cost {row['compute'] / 8.64e19:.3g} PFLOP/s-days"
        if tflops:
            hours = row["compute"] / (tflops * 1e12 * mfu * 3600)
            text += f", {hours:,.3g} GPU hours at {tflops:g} TFLOP/s and MFU {mfu:g}"
    return text + "."


def _with_interval(row: Json, name: str) -> str:
    low, high = row[f"{name}_ci95"]
    if row[name] is None:
        return "not determined"
    if low is None:
        return f"{row[name]:.3g} (interval not determined)"
    return f"{row[name]:.3g} ({low:.3g} to {high:.3g})"


def _parameter_table(fit: Json) -> Json:
    second, drops = fit["second_method"]["params"], fit["drop_worst"]
    rows = []
    for name, value in fit["params"].items():
        low, high = fit["ci95"][name]
        rows.append([name, f"{value:.5g}", f"{_number(low)} to {_number(high)}", f"{second[name]:.5g}"])
        rows[-1] += [f"{drop['params'][name]:.5g}" for drop in drops]
    head = ["", "fit", "95 % interval", "second method", *(f"without worst {len(d['dropped'])}" for d in drops)]
    caption = (
        f"Huber loss (δ = 0.001) on log residuals; interval from {fit['bootstrap']['resamples']} resamples of whole runs; "
        f"second method: {fit['second_method']['method']}."
    )
    return {"title": "Parameters", "caption": caption, "head": head, "rows": rows}


def _check_tables(fit: Json) -> list[Json]:
    tables = []
    if fit["hold_out"]:
        first = fit["hold_out"][0]
        rows = [
            [s["form"], f"{100 * s['error']:.3g} %", f"± {100 * s['standard_error']:.2g} %"] for s in fit["hold_out"]
        ]
        caption = f"Fitted to the {first['fitted']} smaller runs, asked for the {first['held_out']} largest."
        tables.append({"title": "Hold-out", "caption": caption, "head": ["form", "mean error", ""], "rows": rows})
    if fit.get("isoflop"):
        rows = [
            [
                f"{p['compute']:.3g}",
                str(p["points"]),
                f"{p['n_opt']:.3g}" + ("" if p["inside"] else " (outside the sizes)"),
                f"{p['y_opt']:.4g}",
                "–" if p["law_bias"] is None else f"{p['law_bias']:.3g} ×",
            ]
            for p in fit["isoflop"]
        ]
        caption = (
            "The minimum of each parabola, and where the same parabola would put the law's own minimum: its known bias."
        )
        head = ["FLOPs", "points", "best N", "y there", "bias"]
        tables.append({"title": "IsoFLOP parabolas", "caption": caption, "head": head, "rows": rows})
    return tables


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
