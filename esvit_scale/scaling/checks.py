"""Checks of how far a fit may be trusted: resampling, hold-out beyond the fitted range, outliers, undetermined
parameters.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from esvit_scale.scaling import solver
from esvit_scale.scaling.forms import FORMS, Array, Form, Points, evaluate, points, predict, to_parameters
from esvit_scale.scaling.table import Measurements

HELD_OUT = 0.25  # fraction of the points that are held out: those with the largest compute
TIGHT = 3.0  # an exponent whose interval spans more than this factor is not determined
TOGETHER = 0.98  # correlation of log N and log D above which the data cannot tell them apart


class Score(NamedTuple):
    """The hold-out error of one form: fitted to the smaller runs, tested on the larger ones."""

    form: str
    error: float  # mean |log ŷ − log y| of the points held out
    standard_error: float
    fitted: int
    held_out: int


def bootstrap(form: Form, data: Points, groups: NDArray[np.int64], theta: Array, resamples: int, seed: int) -> Array:
    """Bootstrap the fit: refit the form to runs drawn with replacement; return the parameters [resamples, p].

    Whole groups (runs) are drawn, because several checkpoints of one run are not independent measurements. Every refit
    starts at `theta`, the fit of all points, and all refits are minimised together.
    """
    generator = np.random.default_rng(seed)
    total = int(groups.max()) + 1
    drawn = generator.multinomial(total, np.full(total, 1 / total), size=resamples)
    counts = drawn[:, groups].astype(np.float64)
    fitted, _ = solver.descend(form, data, np.repeat(theta[None], resamples, axis=0), counts)
    return to_parameters(form, fitted, data.means)


def interval(samples: Array) -> list[float]:
    """Return the 2.5 % and 97.5 % quantiles of the finite values; both NaN if more than 5 % of them are not finite."""
    finite = samples[np.isfinite(samples)]
    if len(finite) < 0.95 * len(samples) or not len(finite):
        return [float("nan")] * 2
    return [float(q) for q in np.quantile(finite, [0.025, 0.975])]


def can_fit(form: Form, data: Measurements) -> str | None:
    """Return why a form cannot be fitted to these points; None when it can."""
    if len(data.y) < form.size + 1:
        return f"{len(data.y)} points; {form.name} has {form.size} parameters and needs at least {form.size + 1}"
    least = 3 if form.constant else 2
    for column, name in zip(data.x.T, ("x",) if form.inputs == 1 else ("N", "D"), strict=True):
        if (distinct := len(np.unique(column))) < least:
            return f"{distinct} different values of {name}; {form.name} needs at least {least}"
    return None


def hold_out(data: Measurements) -> list[Score]:
    """Compare forms by hold-out: fit each without the points of the largest compute and predict those.

    Returns:
        The scores, best first, of the forms that have the data's number of inputs and can be fitted.
    """
    threshold = np.quantile(data.compute, 1 - HELD_OUT)
    small = data.compute < threshold * (1 - 1e-9)
    if not small.any() or small.all():
        return []
    train, test = data.take(small), data.take(~small)
    scores = []
    for form in FORMS.values():
        if form.inputs != data.x.shape[1] or can_fit(form, train):
            continue
        prepared = points(train.x, train.y)
        parameters = to_parameters(form, solver.solve(form, prepared).theta[None], prepared.means)
        errors = np.abs(np.log(predict(form, parameters, test.x)[0] / test.y))
        spread = float(errors.std() / np.sqrt(len(errors)))
        scores.append(Score(form.name, float(errors.mean()), spread, len(train.y), len(test.y)))
    return sorted(scores, key=lambda score: score.error)


def choose(scores: list[Score]) -> str:
    """Return the name of the simplest form whose held-out error is within one standard error of the best form's."""
    limit = scores[0].error + scores[0].standard_error
    return min((s for s in scores if s.error <= limit), key=lambda s: FORMS[s.form].size).form


def drop_worst(form: Form, data: Points, theta: Array, most: int) -> list[dict[str, Any]]:
    """Refit without the worst-fitting 1, 2, … `most` points; return the dropped points and parameters of each refit."""
    residual = np.abs(evaluate(form, theta[None], data.logs)[0][0] - data.log_y)
    order, found = np.argsort(-residual, kind="stable"), []
    for k in range(1, most + 1):
        kept = np.sort(order[k:])
        if len(kept) <= form.size:
            break
        best = solver.solve(form, data.take(kept))
        parameters = to_parameters(form, best.theta[None], data.means)[0]
        found.append({"dropped": [int(i) for i in order[:k]], "params": _named(form, parameters)})
    return found


def warnings(
    form: Form, data: Measurements, parameters: Array, ci95: dict[str, list[float]], second: dict[str, float]
) -> list[str]:
    """Return a warning sentence for every parameter or question that these measurements do not determine."""
    found = []
    if form.constant:
        low, high = ci95["E"]
        if high - low > 0.5 * data.y.min() or low < 0.01 * data.y.min():
            found.append(
                f"the asymptote E is not determined: 95 % interval {low:.3g} to {high:.3g}, smallest y {data.y.min():.3g}; "
                f"predictions far beyond the data depend on it"
            )
    for name in form.names[-form.inputs :]:
        low, high = ci95[name]
        if low <= 0 or high / low > TIGHT:
            found.append(f"the exponent {name} is not determined: 95 % interval {low:.3g} to {high:.3g}")
    if form.inputs == 2:
        together = abs(np.corrcoef(np.log(data.x.T))[0, 1])
        if together > TOGETHER:
            found.append(
                f"N and D move together (correlation of their logs {together:.3f}): which of them helps cannot be told; "
                f"measure other ratios"
            )
    names = [n for n in form.names if not ci95[n][0] * (1 - 1e-6) <= second[n] <= ci95[n][1] * (1 + 1e-6)]
    if names:
        found.append(f"the two methods disagree beyond the interval on {', '.join(names)}: outliers, or a flat optimum")
    return found


def _named(form: Form, parameters: Array) -> dict[str, float]:
    return {name: float(value) for name, value in zip(form.names, parameters, strict=True)}
