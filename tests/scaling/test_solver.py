"""The minimiser against scipy on the textbook objective, and the fault of published fits that it must not have."""

import numpy as np
import pytest
from scipy.optimize import approx_fprime, minimize
from scipy.special import huber

from esvit_scale.scaling import solver
from esvit_scale.scaling.forms import FORMS, evaluate, points, predict, to_parameters
from tests.scaling import laws


def test_evaluate_returns_the_law_and_its_derivative():
    generator = np.random.default_rng(1)
    for form in FORMS.values():
        x = np.exp(generator.uniform(2, 9, (11, form.inputs)))
        data = points(x, np.ones(11))
        theta = generator.uniform(0.1, 1, (3, form.size))
        log_y, slopes = evaluate(form, theta, data.logs)
        np.testing.assert_allclose(np.exp(log_y), predict(form, to_parameters(form, theta, data.means), x), rtol=1e-12)
        for p in range(form.size):
            nudge = np.zeros(form.size)
            nudge[p] = 1e-6
            numeric = (evaluate(form, theta + nudge, data.logs)[0] - evaluate(form, theta - nudge, data.logs)[0]) / 2e-6
            np.testing.assert_allclose(slopes[:, p], numeric, atol=1e-8)


GOOD_STARTS = ([1.69, 406.4, 410.7, 0.34, 0.28], [1.6, 450, 380, 0.34, 0.28], [1.7, 350, 450, 0.335, 0.285])


@pytest.mark.parametrize("noise", [0.003, 0.01])
@pytest.mark.parametrize("seed", range(2))
def test_mean_scaled_objective_stops_early_and_ours_does_not(seed, noise):
    """L-BFGS-B with its default tolerances, from good starts (the truth itself is the first): on the averaged bare Huber
    loss of published fits it returns where it happens to be, on the same loss in units of δ² it finds the minimum."""
    x = laws.grid()
    y = laws.measure(x, noise=noise, seed=seed)
    data = points(x, y)
    ours = solver.solve(laws.CHINCHILLA, data)
    published = solver.DELTA**2 / len(y)
    for start in GOOD_STARTS:
        e, a, b, alpha, beta = start
        theta = np.array([*np.log([e, a, b]) - [0, *(data.means * [alpha, beta])], alpha, beta])
        stopped, found = (_lbfgs(data, theta, scale) for scale in (published, 1.0))
        assert stopped > 1.001 * ours.loss
        assert found == pytest.approx(ours.loss, rel=1e-4)


def _lbfgs(data, theta, scale):
    """The loss Σ huber at which default L-BFGS-B stops when it is given scale · f."""
    given = lambda t: tuple(scale * part for part in solver.objective(laws.CHINCHILLA, data, t))  # noqa: E731
    return solver.huber_sum(laws.CHINCHILLA, data, minimize(given, theta, jac=True, method="L-BFGS-B").x)


def test_objective_equals_scipy_huber():
    x = laws.grid(4, 4)
    data = points(x, laws.measure(x, 0.002))
    theta = solver.solve(laws.CHINCHILLA, data).theta + 0.001
    fitted = predict(laws.CHINCHILLA, to_parameters(laws.CHINCHILLA, theta[None], data.means), x)[0]
    value, gradient = solver.objective(laws.CHINCHILLA, data, theta)
    assert value * solver.DELTA**2 == pytest.approx(huber(solver.DELTA, np.log(fitted) - data.log_y).sum())
    numeric = approx_fprime(theta, lambda t: solver.objective(laws.CHINCHILLA, data, t)[0], 1e-7)
    np.testing.assert_allclose(gradient, numeric, rtol=1e-3)


def test_no_random_start_beats_the_grid():
    """No start of a random cloud ends lower than the grid's answer."""
    x = laws.grid(5, 5)
    data = points(x, laws.measure(x, noise=0.02, seed=5))
    ours = solver.solve(laws.CHINCHILLA, data)
    low, high = np.array([-2.0, -3, -3, 0, 0]), np.array([1.0, 2, 2, 2, 2])
    cloud = np.random.default_rng(0).uniform(low, high, (300, 5))
    _, loss = solver.descend(laws.CHINCHILLA, data, cloud)
    assert loss.min() * solver.DELTA**2 > ours.loss * (1 - 1e-3)


def test_descending_in_chunks_gives_the_same_result(monkeypatch):
    x = laws.grid(4, 4)
    data = points(x, laws.measure(x, noise=0.01))
    start = solver.starts(laws.CHINCHILLA, data)[:30]
    together = solver.descend(laws.CHINCHILLA, data, start, iterations=30)
    monkeypatch.setattr(solver, "AT_ONCE", 7 * 16)
    for whole, part in zip(together, solver.descend(laws.CHINCHILLA, data, start, iterations=30), strict=True):
        np.testing.assert_allclose(part, whole, rtol=1e-6)


def test_newton_steps_end_where_reweighting_ends(monkeypatch):
    """Points enough for Newton's steps: the same minima as by reweighting alone, which converges linearly (1e-4 of a
    parameter is what its end, a gain below 1e-10, leaves open)."""
    x = laws.grid(30, 30)
    data = points(x, laws.measure(x, noise=0.005, seed=7))
    counts = np.random.default_rng(8).multinomial(900, np.full(900, 1 / 900), size=6).astype(float)
    start = np.repeat(solver.solve(laws.CHINCHILLA, data).theta[None], 6, axis=0)
    ended, steps = [], []
    step = solver._step
    monkeypatch.setattr(solver, "_step", lambda *given: steps.append(len(given[0])) or step(*given))
    for enough in (solver.ENOUGH, 10**9):
        monkeypatch.setattr(solver, "ENOUGH", enough)
        steps.clear()
        ended.append((*solver.descend(laws.CHINCHILLA, data, start, counts), sum(steps)))
    (theta, loss, few), (slow_theta, slow_loss, many) = ended
    assert few < many / 2
    np.testing.assert_allclose(theta, slow_theta, rtol=1e-4)
    assert (loss <= slow_loss * (1 + 1e-9)).all()


def test_few_of_many_points_choose_the_starts(monkeypatch):
    x = laws.grid(30, 30)
    data = points(x, laws.measure(x, noise=0.01, seed=9))
    every = solver.solve(laws.CHINCHILLA, data)
    monkeypatch.setattr(solver, "FEW", 100)
    few = solver.solve(laws.CHINCHILLA, data)
    np.testing.assert_allclose(few.theta, every.theta, rtol=1e-6)
    assert few.loss == pytest.approx(every.loss, rel=1e-9)


def test_counts_equal_copies_of_points():
    x = laws.grid(4, 4)
    data = points(x, laws.measure(x, noise=0.01))
    counts = np.random.default_rng(0).multinomial(16, np.full(16, 1 / 16)).astype(float)
    theta = solver.solve(laws.CHINCHILLA, data).theta[None]
    _, loss = solver.descend(laws.CHINCHILLA, data, theta, counts[None])
    copies = data.take(np.repeat(np.arange(16), counts.astype(int)))
    _, copied_loss = solver.descend(laws.CHINCHILLA, copies, theta)
    np.testing.assert_allclose(loss, copied_loss, rtol=1e-6)


def test_outliers_hardly_change_the_fit():
    x = laws.grid()
    y = laws.measure(x)
    y[[3, 17, 40]] *= 1.5
    data = points(x, y)
    found = to_parameters(laws.CHINCHILLA, solver.solve(laws.CHINCHILLA, data).theta[None], data.means)
    np.testing.assert_allclose(found, laws.TRUTH, rtol=0.02)
