"""`sweep fit`: fits a law to a CSV of measurements and writes fit.json, with predictions and the checks of their
reliability.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from esvit_scale import files
from esvit_scale.errors import UserError, nearest
from esvit_scale.scaling import checks, optimum, solver, varpro
from esvit_scale.scaling.forms import FORMS, Array, Form, points, predict, to_parameters
from esvit_scale.scaling.table import Columns, Measurements, best_of_each_budget, read

FORMAT_VERSION = 1
FARTHEST = 10.0  # predictions may go up to this multiple of the largest measured compute
DROPPED = 3
FRONTIER_POINTS = 25


@dataclass(frozen=True)
class Options:
    """Options of `sweep fit`."""

    form: str = "auto"  # power, power_constant, two_power, chinchilla; auto: see `_choose_form`
    resamples: int = 1000
    seed: int = 0
    predict: tuple[float, ...] = ()  # where to predict: budgets in FLOPs (with one input: values of x)
    force: bool = False
    best: bool = False  # fit only the best point of each budget (the frontier)
    runs: tuple[tuple[float, float], ...] = ()  # runs to predict, each as its N and D; for laws of N and D


def run(path: Path, columns: Columns, out: Path, options: Options) -> dict[str, Any]:
    """Fit a law to the CSV at `path`, write the result to the folder `out`, and return the content of fit.json.

    `out` also gets resamples.csv, the parameters of every bootstrap resample.

    Raises:
        UserError: the CSV is not valid, the form does not suit its columns, or a prediction is asked for at more than
            10 times the largest measured compute.
    """
    data, columns = read(path, columns)
    _check_reach("--predict", options.predict, data, options.force)
    if options.runs and len(columns.inputs) == 1:
        raise UserError("--predict-run: needs a law of N and D: --n COL --d COL --loss COL; with --x use --predict")
    if options.best:
        data = best_of_each_budget(data)
    try:
        result, samples = fit(data, options)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    result["columns"] = {
        "inputs": list(columns.inputs),
        "y": columns.y,
        "group": columns.group,
        "compute": columns.compute or (columns.inputs[0] if len(columns.inputs) == 1 else "6*N*D"),
    }
    out.mkdir(parents=True, exist_ok=True)
    lines = [",".join(result["params"])] + [",".join(repr(float(v)) for v in row) for row in samples]
    files.write_text(out / "resamples.csv", "\n".join(lines) + "\n")
    files.write_json(out / "fit.json", _without_nan(result))
    return result


def fit(data: Measurements, options: Options) -> tuple[dict[str, Any], Array]:
    """Fit a law; return the content of fit.json (without column names) and the bootstrap's parameters [R, p]."""
    scores = checks.hold_out(data)
    form, why = _choose_form(data, options.form, scores)
    if problem := checks.can_fit(form, data):
        raise UserError(f"too few points: {problem}")
    prepared = points(data.x, data.y)
    best = solver.solve(form, prepared)
    parameters = to_parameters(form, best.theta[None], prepared.means)[0]
    samples = checks.bootstrap(form, prepared, data.groups, best.theta, options.resamples, options.seed)
    ci95 = {name: checks.interval(column) for name, column in zip(form.names, samples.T, strict=True)}
    second = _named(form, varpro.solve(form, data.x, data.y))
    result: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "form": form.name,
        "params": _named(form, parameters),
        "ci95": ci95,
        "loss": best.loss,
        "n": len(data.y),
        "runs": int(data.groups.max()) + 1,
        "form_because": why,
        "hold_out": [score._asdict() for score in scores],
        "second_method": {"method": "variable projection, least squares", "params": second},
        "drop_worst": checks.drop_worst(form, prepared, best.theta, DROPPED),
        "warnings": checks.warnings(form, data, parameters, ci95, second),
        "bootstrap": {"resamples": options.resamples, "seed": options.seed, "unit": "run"},
        "compute_range": [float(data.compute.min()), float(data.compute.max())],
        "points": _points(form, parameters, data),
    }
    result |= _beyond(form, parameters, samples, data, options)
    return result, samples


def _choose_form(data: Measurements, name: str, scores: list[checks.Score]) -> tuple[Form, str]:
    """Return the form to fit, and why it was chosen.

    `name` is a form or "auto". Auto means: with two inputs, N and D, the form E + A/N^α + B/D^β; with one input, the form
    that predicts held-out points best.
    """
    inputs = data.x.shape[1]
    allowed = [form.name for form in FORMS.values() if form.inputs == inputs]
    if name == "auto":
        if inputs == 2:
            note = f"; by hold-out: {checks.choose(scores)}" if scores else ""
            return FORMS["chinchilla"], f"the default for N and D{note}"
        if scores:
            return FORMS[checks.choose(scores)], "the simplest within one standard error of the best on hold-out"
        return FORMS["power"], "too few points to hold any out"
    if name not in allowed:
        raise UserError(
            f"--form {name}: no form with {inputs} input(s) has this name{nearest(name, allowed)}; there are {', '.join(allowed)}"
        )
    return FORMS[name], "asked for"


def _check_reach(option: str, targets: Iterable[float], data: Measurements, force: bool) -> None:
    limit = FARTHEST * float(data.compute.max())
    for target in targets:
        if target > limit and not force:
            raise UserError(
                f"{option} {target:.3g}: {target / data.compute.max():.3g} times the largest measured compute "
                f"({data.compute.max():.3g}); beyond {FARTHEST:.0f} times a fit is unreliable; nearest: {limit:.3g}, or add --force"
            )


def _points(form: Form, parameters: Array, data: Measurements) -> list[dict[str, Any]]:
    fitted = predict(form, parameters[None], data.x)[0]
    rows = zip(data.x.tolist(), data.compute.tolist(), data.y.tolist(), fitted.tolist(), strict=True)
    return [{"x": x, "compute": c, "y": y, "fitted": f} for x, c, y, f in rows]


def _beyond(form: Form, parameters: Array, samples: Array, data: Measurements, options: Options) -> dict[str, Any]:
    """Return the parts of fit.json that the fitted law predicts.

    These are the curve and the predictions; with N and D the compute-optimal frontier replaces the curve, and the
    exponents of its sizes and the isoFLOP parabolas are added.
    """
    low, high = float(data.compute.min()), float(data.compute.max())
    grid = np.geomspace(low, FARTHEST * high, FRONTIER_POINTS)
    asked = np.array(options.predict, dtype=np.float64)
    if form.inputs == 1:
        rows = lambda at: _curve(form, parameters, samples, at)  # noqa: E731
        return {"curve": rows(grid), "predictions": rows(asked)}
    cost = optimum.cost_rule(data)
    exponent = optimum.size_exponent(form, np.vstack([parameters, samples]), cost)
    found = optimum.parabolas(data, form, parameters, cost)
    return {
        "cost_rule": cost._asdict(),
        "frontier": _frontier(form, parameters, samples, cost, grid),
        "size_exponent": {"value": float(exponent[0]), "ci95": checks.interval(exponent[1:])},
        "isoflop": [parabola._asdict() for parabola in found],
        "isoflop_size_exponent": _isoflop_exponent(found),
        "predictions": _frontier(form, parameters, samples, cost, asked),
        "predicted_runs": _predicted_runs(form, parameters, samples, data, cost, options),
    }


def _predicted_runs(
    form: Form, parameters: Array, samples: Array, data: Measurements, cost: optimum.Cost, options: Options
) -> list[dict[str, Any]]:
    """Return for every run that was asked for what the law says, and the interval in which its measurement should lie.

    `y_ci95` is the interval of the law, from the bootstrap alone. `measured_ci95` is that of one new measurement, which
    has noise of its own (test images, seed): every resample is multiplied by the exponential of a draw from Student's t
    with n − p degrees of freedom, scaled by the standard deviation √(Σ r²/(n − p)) of the log residuals r, for n points
    and p parameters.
    """
    if not options.runs:
        return []
    at = np.array(options.runs, dtype=np.float64)
    compute = cost.k * at[:, 0] ** cost.kappa * at[:, 1]
    _check_reach("--predict-run, FLOPs", compute.tolist(), data, options.force)
    fitted = predict(form, parameters[None], data.x)[0]
    freedom = len(data.y) - form.size
    deviation = math.sqrt((np.log(data.y / fitted) ** 2).sum() / freedom)
    drawn = deviation * np.random.default_rng(options.seed).standard_t(freedom, size=(len(samples), len(at)))
    laws = predict(form, samples, at)
    measured = laws * np.exp(drawn)
    y = predict(form, parameters[None], at)[0]
    return [
        {
            "N": float(n),
            "D": float(d),
            "compute": float(compute[i]),
            "y": float(y[i]),
            "y_ci95": checks.interval(laws[:, i]),
            "measured_ci95": checks.interval(measured[:, i]),
        }
        for i, (n, d) in enumerate(at)
    ]


def _curve(form: Form, parameters: Array, samples: Array, at: Array) -> list[dict[str, Any]]:
    if not len(at):
        return []
    every = predict(form, np.vstack([parameters, samples]), at[:, None])
    return [
        {"compute": float(c), "y": float(v[0]), "y_ci95": checks.interval(v[1:])}
        for c, v in zip(at, every.T, strict=True)
    ]


def _frontier(form: Form, parameters: Array, samples: Array, cost: optimum.Cost, at: Array) -> list[dict[str, Any]]:
    if not len(at):
        return []
    every = optimum.optimal_split(form, np.vstack([parameters, samples]), cost, at)
    rows = []
    for i, budget in enumerate(at):
        row: dict[str, Any] = {"compute": float(budget)}
        for name, values in zip(("N", "D", "y"), every, strict=True):
            row |= {name: float(values[0, i]), f"{name}_ci95": checks.interval(values[1:, i])}
        rows.append(row)
    return rows


def _isoflop_exponent(found: list[optimum.Parabola]) -> float | None:
    """Return the exponent a of N* ∝ C^a, fitted to the minima of the isoFLOP parabolas; None with fewer than two.

    Only minima that lie between the measured sizes count.
    """
    inside = [p for p in found if p.inside]
    if len(inside) < 2:
        return None
    slope = np.polyfit(np.log([p.compute for p in inside]), np.log([p.n_opt for p in inside]), 1)[0]
    return float(slope)


def _named(form: Form, parameters: Array) -> dict[str, float]:
    return {name: float(value) for name, value in zip(form.names, parameters, strict=True)}


def _without_nan(value: Any) -> Any:
    """Replace NaN and infinity by None in nested values, because JSON has neither."""
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def summary(result: dict[str, Any]) -> list[str]:
    """Return the lines that `sweep fit` prints: the law, its intervals, its predictions and warnings."""
    lines = [f"{result['form']} ({result['form_because']}), {result['n']} points of {result['runs']} runs"]
    for name, value in result["params"].items():
        low, high = result["ci95"][name]
        second = result["second_method"]["params"][name]
        lines.append(f"  {name:6s} {value:11.5g}   95 % {low:.4g} to {high:.4g}   second method {second:.5g}")
    for score in result["hold_out"]:
        held = f"the {score['held_out']} largest runs from the {score['fitted']} smaller"
        lines.append(f"  hold-out, {score['form']}: {100 * score['error']:.2g} % mean error on {held}")
    if "size_exponent" in result:
        lines.append(f"  N* grows as C^{_estimate(result['size_exponent']['value'], result['size_exponent']['ci95'])}")
    for row in result["predictions"]:
        split = f" with N* {row['N']:.3g}, D* {row['D']:.3g}" if math.isfinite(row.get("N", math.nan)) else ""
        lines.append(f"  at {row['compute']:.3g}: y {_estimate(row['y'], row['y_ci95'])}{split}")
    for row in result.get("predicted_runs", ()):
        low, high = row["measured_ci95"]
        lines.append(
            f"  run with N {row['N']:.4g}, D {row['D']:.4g}: y {_estimate(row['y'], row['y_ci95'])}; "
            f"95 % of measurements {low:.4g} to {high:.4g}"
        )
    return lines + [f"  warning: {warning}" for warning in result["warnings"]]


def _estimate(value: float, ci95: list[float]) -> str:
    if not math.isfinite(value):
        return "not determined"
    known = math.isfinite(ci95[0])
    return f"{value:.4g} (95 % {ci95[0]:.4g} to {ci95[1]:.4g})" if known else f"{value:.4g} (interval not determined)"
