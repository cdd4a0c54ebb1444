"""Minimisation of the Huber loss on log residuals, from many starts or for many bootstrap resamples at once.

    f(θ) = Σ_i n_i · huber_δ(log ŷ_i − log y_i) / δ²,   δ = 1e-3;   n_i: weight of point i (its count in a resample)

Dividing by δ² matters. Published fits have averaged the Huber loss without it: with δ = 1e-3 that is about 1e-6, its
gradient lies below an optimiser's default tolerance, and the optimiser returns its start as the answer
(tests/scaling/test_solver.py shows it).

`descend` runs Levenberg-Marquardt on a batch of parameter rows: every row has its own start, weights and damping, and a
row takes a step only if that lowers its loss. A step is Newton's, with the curvature that the loss has between its kinks,
where enough points lie there; otherwise, or where that fails, it is that of iterative reweighting, which is slower but never
overshoots.
"""

from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from esvit_scale.scaling.forms import Array, Form, Points, bounds, evaluate

DELTA = 1e-3
CONSTANT_SHARES = (1e-3, 0.3, 0.7, 0.95)  # in the starts: E as a fraction of the smallest y
TERM_SHARES = (0.2, 0.5, 0.8)  # in the starts: the first term as a fraction of y − E
START_EXPONENTS = (0.05, 0.2, 0.5, 1.0, 2.0)
AT_ONCE = 60_000  # rows × points that are processed together: arrays that the processor's caches hold
WIDE_DELTA, KEPT_STARTS = 0.1, 12  # starts are ranked with a wide, nearly quadratic Huber loss; the best go on
ENOUGH = 50  # points within ±δ, from which their curvature stands for that of the loss
FEW, FINALISTS = 1000, 3  # of more points, this many random ones choose among the starts; these go on with all points


class Solution(NamedTuple):
    """The minimum that `solve` found: parameters and loss."""

    theta: Array  # [p]
    loss: float  # Σ huber_δ, not divided by δ²


def solve(form: Form, data: Points) -> Solution:
    """Fit the form to the data from a deterministic grid of starts; return the best minimum."""
    few = data
    if len(data.log_y) > FEW:
        few = data.take(np.random.default_rng(0).choice(len(data.log_y), FEW, replace=False))
    theta = starts(form, few)
    theta, loss = descend(form, few, theta, delta=WIDE_DELTA, iterations=40)
    theta = theta[np.argsort(loss, kind="stable")[:KEPT_STARTS]]
    theta, loss = descend(form, few, theta, delta=10 * DELTA, iterations=100)
    if few is not data:
        theta = theta[np.argsort(loss, kind="stable")[:FINALISTS]]
    theta, loss = descend(form, data, theta)
    return _polish(form, data, theta[np.argmin(loss)])


def starts(form: Form, data: Points) -> Array:
    """Return starting points theta [S, p]: a grid of constants, sizes of the terms, and exponents.

    All their curves pass through the middle of the data.
    """
    middle, least = np.exp(np.median(data.log_y)), np.exp(data.log_y.min())
    rows = []
    for constant in CONSTANT_SHARES if form.constant else (0.0,):
        rest = middle - constant * least if middle > constant * least else 0.05 * middle
        for share in TERM_SHARES if form.inputs == 2 else (1.0,):
            sizes = [share * rest, (1 - share) * rest][: form.inputs]
            for exponents in product(START_EXPONENTS, repeat=form.inputs):
                e = [np.log(constant * least)] if form.constant else []
                rows.append([*e, *np.log(sizes), *exponents])
    return np.clip(np.array(rows), *bounds(form, data))


def descend(
    form: Form,
    data: Points,
    theta: Array,
    counts: Array | None = None,
    delta: float = DELTA,
    iterations: int = 400,
    tolerance: float = 1e-10,
) -> tuple[Array, Array]:
    """Minimise the loss from every row of theta [R, p] independently.

    Args:
        counts: weights of the points for each row [R, n]; None: 1 each.

    Returns:
        The minima theta [R, p], and the loss Σ counts·huber_δ / δ² of each row [R].
    """
    counts = np.ones((len(theta), len(data.log_y))) if counts is None else counts
    at_once = max(1, AT_ONCE // len(data.log_y))
    parts = [
        _descend(form, data, theta[i : i + at_once], counts[i : i + at_once], delta, iterations, tolerance)
        for i in range(0, len(theta), at_once)
    ]
    return np.concatenate([part for part, _ in parts]), np.concatenate([loss for _, loss in parts])


def _descend(
    form: Form, data: Points, theta: Array, counts: Array, delta: float, iterations: int, tolerance: float
) -> tuple[Array, Array]:
    low, high = bounds(form, data)
    theta = np.clip(theta, low, high)
    live, damping, stalled = np.arange(len(theta)), np.full(len(theta), 1e-3), np.zeros(len(theta), int)
    newton = np.ones(len(theta), bool)  # whether a row's next step is Newton's
    fitted, slopes = evaluate(form, theta, data.logs)
    residual = fitted - data.log_y
    loss = _huber(residual, counts, delta)
    at, here = theta.copy(), loss.copy()  # parameters and loss of the rows that are still being minimised
    for _ in range(iterations):
        curvature = _curvature(residual, counts[live], delta, newton)
        step, expected = _step(at, residual, slopes, counts[live], curvature, damping, delta, low, high)
        trial = np.clip(at - step, low, high)
        fitted, trial_slopes = evaluate(form, trial, data.logs)
        trial_residual = fitted - data.log_y
        trial_loss = _huber(trial_residual, counts[live], delta)
        better = trial_loss < here
        gain = np.where(better, here - trial_loss, 0)
        stalled = np.where(gain > tolerance * np.maximum(here, 1e-30), 0, stalled + 1)
        at[better], here[better] = trial[better], trial_loss[better]
        residual[better], slopes[better] = trial_residual[better], trial_slopes[better]
        # A Newton step that fails is replaced by a majorizing one with the same damping.
        damping = np.clip(np.where(better, damping / 4, np.where(newton, damping, damping * 6)), 1e-12, 1e8)
        newton = better | ~newton
        done = (expected < 1e-3 * tolerance * here) & (damping <= 1e-3)
        go_on = (stalled < 8) & (here > 1e-22) & ~done
        if not go_on.all():
            theta[live], loss[live] = at, here
            live, at, here, damping, stalled = live[go_on], at[go_on], here[go_on], damping[go_on], stalled[go_on]
            newton = newton[go_on]
            residual, slopes = residual[go_on], slopes[go_on]
            if not len(live):
                break
    theta[live], loss[live] = at, here
    return theta, loss


def _step(
    theta: Array,
    residual: Array,
    slopes: Array,
    counts: Array,
    curvature: Array,
    damping: Array,
    delta: float,
    low: Array,
    high: Array,
) -> tuple[Array, Array]:
    """Return the damped step [R, p], to be subtracted from theta, and by how much it should lower the loss [R].

    Args:
        residual: log ŷ − log y [R, n].
        slopes: its derivatives by theta [R, p, n].
        counts: weights of the points in the loss [R, n].
        curvature: of the loss by the residual [R, n], times δ.
        damping: of each row [R].
    """
    normal = np.matmul(slopes * curvature[:, None], slopes.transpose(0, 2, 1))  # [R, p, p]
    pull = counts * np.clip(residual / delta, -1, 1)  # [R, n]
    gradient = np.matmul(slopes, pull[:, :, None])[:, :, 0]
    # A parameter at a bound, whose step would leave the allowed range, stays fixed.
    held = ((theta <= low) & (gradient > 0)) | ((theta >= high) & (gradient < 0))
    free = ~held
    normal *= free[:, :, None] & free[:, None, :]
    diagonal = np.einsum("rpp->rp", normal).copy()
    floor = 1e-12 * diagonal.max(1, keepdims=True) + 1e-300
    add = np.where(held, 1.0, damping[:, None] * np.maximum(diagonal, floor) + floor)
    index = np.arange(normal.shape[1])
    normal[:, index, index] += add
    step: Array = np.linalg.solve(normal, (gradient * free)[:, :, None])[:, :, 0]
    return step, 0.5 / delta * (gradient * free * step).sum(1)


def _curvature(residual: Array, counts: Array, delta: float, newton: NDArray[np.bool_]) -> Array:
    """Return the curvature of the loss by the residual [R, n], times δ.

    For rows where `newton` holds and enough points lie within ±δ, this is the second derivative: 0 beyond ±δ. For the
    others it is that of the quadratic which is nowhere below the loss and touches it at the residual.
    """
    size = np.abs(residual)
    inside = size <= delta
    second = newton & (inside.sum(1) >= ENOUGH)
    return counts * np.where(second[:, None], inside / delta, 1 / np.maximum(size, delta))


def _huber(residual: Array, counts: Array, delta: float) -> Array:
    """Return the loss Σ counts·huber_δ(residual) / δ², summed over the last axis (points)."""
    size = np.abs(residual) / delta
    total: Array = (counts * np.where(size <= 1, 0.5 * size**2, size - 0.5)).sum(-1)
    return total


def huber_sum(form: Form, data: Points, theta: Array, delta: float = DELTA) -> float:
    """Return the loss Σ huber_δ(log ŷ − log y), not divided by δ², of one parameter row theta [p]."""
    fitted, _ = evaluate(form, theta[None], data.logs)
    return float(_huber(fitted - data.log_y, np.ones(len(data.log_y)), delta)[0] * delta**2)


def objective(form: Form, data: Points, theta: Array, delta: float = DELTA) -> tuple[float, Array]:
    """Return f(θ) of one parameter row theta [p], with all n_i = 1, and its gradient [p]."""
    fitted, slopes = evaluate(form, theta[None], data.logs)
    residual = fitted[0] - data.log_y
    gradient = slopes[0] @ np.clip(residual / delta, -1, 1) / delta
    return float(_huber(residual, np.ones(len(residual)), delta)), gradient


def _polish(form: Form, data: Points, theta: Array) -> Solution:
    """Minimise f by L-BFGS-B from a good start, because reweighting can converge slowly along an edge of the loss."""
    found = minimize(
        lambda t: objective(form, data, t),
        theta,
        jac=True,
        method="L-BFGS-B",
        bounds=list(zip(*bounds(form, data), strict=True)),
        options={"maxiter": 2000, "maxcor": 20, "ftol": 1e-15, "gtol": 1e-9},
    )
    best = min((theta, found.x), key=lambda t: huber_sum(form, data, t))
    return Solution(best, huber_sum(form, data, best))
