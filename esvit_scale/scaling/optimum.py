"""The best split of a budget between size and data: from a fitted law, and from isoFLOP parabolas.

Under the budget C = k·N^κ·D, the law E + A/N^α + B/D^β has its minimum at

    N*(C) = (αA / κβB · (C/k)^β)^(1/(α + κβ)),      D*(C) = C / (k·N*^κ)

k and κ are fitted to the costs in the measurements. For C = 6ND they are 6 and 1; a vision trunk with its heads,
teacher and padding has another k and a κ that is not quite 1.
"""

from typing import NamedTuple

import numpy as np

from esvit_scale.scaling.forms import Array, Form, predict
from esvit_scale.scaling.table import SAME_BUDGET, Measurements

FLAT = 1e-3  # a smaller exponent counts as 0: 1,000 times the compute would gain less than a percent


class Cost(NamedTuple):
    """A fitted rule C ≈ k·N^kappa·D for the cost of a run in FLOPs."""

    k: float
    kappa: float
    worst: float  # largest |log(rule / measured cost)|


class Parabola(NamedTuple):
    """A parabola of log y over log N through the points of one budget."""

    compute: float  # the budget: geometric mean of the points' FLOPs
    n_opt: float
    y_opt: float
    curve: tuple[float, float, float]  # coefficients of log y as a polynomial in log N, highest power first
    points: int
    inside: bool  # the minimum lies between the sizes that were measured
    law_bias: float | None  # bias factor: minimum of a parabola through the law's values over the law's N*


def cost_rule(data: Measurements) -> Cost:
    """Fit k and kappa of the rule C = k·N^kappa·D to the measured costs."""
    size, per_item = np.log(data.x[:, 0]), np.log(data.compute / data.x[:, 1])
    if np.ptp(size) < 1e-9:
        return Cost(float(np.exp((per_item - size).mean())), 1.0, float(np.ptp(per_item)))
    kappa, log_k = np.polyfit(size, per_item, 1)
    worst = np.abs(per_item - log_k - kappa * size).max()
    return Cost(float(np.exp(log_k)), float(kappa), float(worst))


def optimal_split(form: Form, parameters: Array, cost: Cost, compute: Array) -> tuple[Array, Array, Array]:
    """Return the compute-optimal N*, D* and y*, each [R, m], for parameter rows [R, p] at budgets [m].

    They are NaN for rows without an optimum, in which more size or more data does not help.
    """
    columns = dict(zip(form.names, parameters.T[:, :, None], strict=True))
    a, b, alpha, beta = (columns[name] for name in ("A", "B", "alpha", "beta"))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        helps = (alpha > FLAT) & (beta > FLAT) & (a > 0) & (b > 0)
        alpha = np.where(helps, alpha, np.nan)
        log_n = (np.log(alpha * a / (cost.kappa * beta * b)) + beta * np.log(compute / cost.k)) / (
            alpha + cost.kappa * beta
        )
        n = np.exp(log_n)
        d = compute / (cost.k * n**cost.kappa)
        y = a * n**-alpha + b * d**-beta + (columns["E"] if form.constant else 0.0)
    return n, d, y


def size_exponent(form: Form, parameters: Array, cost: Cost) -> Array:
    """Return the exponent a of N* ∝ C^a for each parameter row [R]; NaN for rows without an optimum."""
    alpha, beta = parameters[:, form.names.index("alpha")], parameters[:, form.names.index("beta")]
    with np.errstate(divide="ignore", invalid="ignore"):
        result: Array = np.where((alpha > FLAT) & (beta > FLAT), beta / (alpha + cost.kappa * beta), np.nan)
    return result


def parabolas(data: Measurements, form: Form, parameters: Array, cost: Cost) -> list[Parabola]:
    """Fit a parabola of log y over log N to every budget with at least 3 sizes; return those that have a minimum.

    A parabola is symmetric and the true curve is not, so its minimum is biased unless the sizes lie close to the
    optimum and evenly on both sides. `law_bias` is the bias at these sizes if the law with `parameters` [p] is exact.
    """
    found = []
    order = np.argsort(data.compute, kind="stable")
    edges = np.flatnonzero(np.diff(np.log(data.compute[order])) > np.log(SAME_BUDGET)) + 1
    for rows in np.split(order, edges):
        sizes, budget = data.x[rows, 0], float(np.exp(np.log(data.compute[rows]).mean()))
        if len(np.unique(sizes)) < 3:
            continue
        curve = _parabola(sizes, data.y[rows])
        if curve[0] <= 0:
            continue
        n_opt = _minimum(curve)
        law = _parabola(sizes, predict(form, parameters[None], data.x[rows])[0])
        exact = float(optimal_split(form, parameters[None], cost, np.array([budget]))[0][0, 0])
        bias = _minimum(law) / exact if law[0] > 0 and np.isfinite(exact) and exact > 0 else None
        inside = bool(sizes.min() < n_opt < sizes.max())
        y_opt = float(np.exp(np.polyval(curve, np.log(n_opt))))
        found.append(Parabola(budget, n_opt, y_opt, tuple(curve), len(rows), inside, bias))
    return found


def _parabola(sizes: Array, y: Array) -> Array:
    """Fit log y as a quadratic in log N; return the coefficients, highest power first.

    The fit itself uses centred logs, for numerical accuracy.
    """
    middle = np.log(sizes).mean()
    a, b, c = np.polyfit(np.log(sizes) - middle, np.log(y), 2)
    return np.array([a, b - 2 * a * middle, c - b * middle + a * middle**2])


def _minimum(curve: Array) -> float:
    with np.errstate(over="ignore"):
        return float(np.exp(-curve[1] / (2 * curve[0])))
