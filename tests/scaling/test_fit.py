"""Laws that are known are found again, with intervals that mean what they say."""

import json
import time

import numpy as np
import pytest

from esvit_scale.errors import UserError
from esvit_scale.scaling import checks, fit, optimum, solver, varpro
from esvit_scale.scaling.forms import FORMS, points, predict, to_parameters
from esvit_scale.scaling.table import Columns, Measurements
from tests.scaling import laws

ND = Columns(("N", "D"), "loss")
QUICK = fit.Options(resamples=40)


def data_of(x, y):
    return Measurements(x, y, 6 * x[:, 0] * x[:, 1], np.arange(len(y)))


@pytest.mark.parametrize(
    "truth",
    [laws.TRUTH, [[0.5, 40, 900, 0.2, 0.35]], [[2.5, 5000, 3000, 0.5, 0.4]], [[0.02, 12, 30, 0.15, 0.18]]],
)
def test_fit_of_noise_free_data_recovers_the_parameters(tmp_path, truth):
    truth, x = np.array(truth), laws.grid()
    table = laws.write(tmp_path / "f.csv", x, laws.measure(x, truth=truth))

    fit.run(table, ND, tmp_path / "out", QUICK)

    found = json.loads((tmp_path / "out" / "fit.json").read_text())
    assert {"form", "params", "ci95", "loss", "n"} <= set(found)
    assert (found["form"], found["n"]) == ("chinchilla", 64)
    np.testing.assert_allclose([found["params"][name] for name in laws.NAMES], truth[0], rtol=1e-4)
    np.testing.assert_allclose([found["second_method"]["params"][n] for n in laws.NAMES], truth[0], rtol=1e-3)
    assert not found["warnings"]


@pytest.mark.parametrize("name", FORMS)
def test_every_form_recovers_its_parameters(name):
    form = FORMS[name]
    truth = np.array([[0.3, 20.0, 50.0, 0.25, 0.35]])[:, [i for i, n in enumerate(laws.NAMES) if n in form.names]]
    x = laws.grid()[:, : form.inputs]
    data = points(x, predict(form, truth, x)[0])
    found = to_parameters(form, solver.solve(form, data).theta[None], data.means)
    np.testing.assert_allclose(found, truth, rtol=1e-6)
    np.testing.assert_allclose(varpro.solve(form, x, np.exp(data.log_y)), truth[0], rtol=1e-4)


def test_thousand_resamples_take_seconds():
    x = laws.grid()
    data = points(x, laws.measure(x, noise=0.02))
    theta = solver.solve(laws.CHINCHILLA, data).theta
    began = time.monotonic()
    samples = checks.bootstrap(laws.CHINCHILLA, data, np.arange(64), theta, 1000, 0)
    assert samples.shape == (1000, 5)
    assert time.monotonic() - began < 30  # about 0.5 s on an idle core


def test_warm_started_resamples_reach_the_minimum():
    """A resample that is descended from the fit of all points is not stuck beside its own minimum."""
    x, generator = laws.grid(), np.random.default_rng(0)
    data = points(x, laws.measure(x, noise=0.01))
    theta = solver.solve(laws.CHINCHILLA, data).theta
    counts = generator.multinomial(64, np.full(64, 1 / 64), size=5).astype(float)
    _, warm = solver.descend(laws.CHINCHILLA, data, np.repeat(theta[None], 5, axis=0), counts)
    for row, loss in zip(counts, warm, strict=True):
        full = solver.solve(laws.CHINCHILLA, data.take(np.repeat(np.arange(64), row.astype(int))))
        assert loss * solver.DELTA**2 <= full.loss * 1.002


@pytest.mark.slow
def test_confidence_intervals_cover_the_truth(capsys):
    """100 draws of 64 points with log-normal noise, 200 resamples each: every parameter is covered 88 times or more."""
    noise, x, covered = 0.01, laws.grid(), np.zeros(5)
    for draw in range(100):
        data = points(x, laws.measure(x, noise=noise, seed=draw))
        theta = solver.solve(laws.CHINCHILLA, data).theta
        samples = checks.bootstrap(laws.CHINCHILLA, data, np.arange(64), theta, 200, draw)
        low, high = np.quantile(samples, [0.025, 0.975], axis=0)
        covered += (low <= laws.TRUTH[0]) & (laws.TRUTH[0] <= high)
    report = dict(zip(laws.NAMES, covered.astype(int).tolist(), strict=True))
    with capsys.disabled():
        print(f"\ncoverage of the 95 % intervals in 100 draws at {noise:.0%} noise: {report}")
    assert (covered >= 88).all()


def test_optimal_split_minimizes_the_law_at_the_budget():
    cost = optimum.Cost(k=3.0, kappa=0.8, worst=0.0)
    budgets = np.array([1e19, 1e21])
    n, d, y = optimum.optimal_split(laws.CHINCHILLA, laws.TRUTH, cost, budgets)
    for i, budget in enumerate(budgets):
        sizes = np.geomspace(n[0, i] / 10, n[0, i] * 10, 20001)
        x = np.stack([sizes, budget / (cost.k * sizes**cost.kappa)], axis=1)
        values = predict(laws.CHINCHILLA, laws.TRUTH, x)[0]
        assert sizes[values.argmin()] == pytest.approx(n[0, i], rel=1e-3)
        assert values.min() == pytest.approx(y[0, i], rel=1e-6)
        assert d[0, i] == pytest.approx(x[values.argmin(), 1], rel=1e-3)


def test_law_without_an_optimum_is_reported(tmp_path, capsys):
    """Noise alone: neither size nor data helps, and no best split is invented."""
    x = laws.grid(3, 3)
    table = laws.write(tmp_path / "f.csv", x, np.exp(0.01 * np.random.default_rng(0).standard_normal(9)))
    result = fit.run(table, ND, tmp_path, fit.Options(resamples=60, predict=(1e20,)))
    assert "not determined" in "\n".join(fit.summary(result))
    assert len(result["warnings"]) >= 2
    saved = json.loads((tmp_path / "fit.json").read_text())
    assert saved["predictions"][0]["N_ci95"] == [None, None]


def test_cost_rule_is_recovered_from_the_data():
    x = laws.grid()
    data = Measurements(x, laws.measure(x), 2.5 * x[:, 0] ** 0.9 * x[:, 1], np.arange(64))
    cost = optimum.cost_rule(data)
    assert cost[:2] == pytest.approx((2.5, 0.9))
    assert cost.worst < 1e-9


def test_parabolas_report_their_bias():
    x = laws.isoflop()
    found = optimum.parabolas(data_of(x, laws.measure(x)), laws.CHINCHILLA, laws.TRUTH[0], optimum.Cost(6, 1, 0))
    assert len(found) == 5
    for parabola in found:
        exact = optimum.optimal_split(laws.CHINCHILLA, laws.TRUTH, optimum.Cost(6, 1, 0), np.array([parabola.compute]))
        assert parabola.n_opt / exact[0][0, 0] == pytest.approx(parabola.law_bias, rel=1e-6)
        assert parabola.inside
        assert abs(np.log(parabola.law_bias)) > 0.01  # a parabola is not the law


def test_hold_out_chooses_the_true_form():
    x = np.geomspace(1e15, 1e20, 24)[:, None]
    for name, truth in (("power", [[300.0, 0.15]]), ("power_constant", [[1.0, 3000.0, 0.2]])):
        noise = np.exp(0.003 * np.random.default_rng(3).standard_normal(24))
        y = predict(FORMS[name], np.array(truth), x)[0] * noise
        assert checks.choose(checks.hold_out(Measurements(x, y, x[:, 0], np.arange(24)))) == name


def test_undetermined_asymptote_is_a_warning():
    x = np.geomspace(1e15, 1e17, 12)[:, None]
    y = predict(FORMS["power_constant"], np.array([[0.1, 3000.0, 0.2]]), x)[0]
    y *= np.exp(0.02 * np.random.default_rng(0).standard_normal(12))
    result, _ = fit.fit(Measurements(x, y, x[:, 0], np.arange(12)), fit.Options("power_constant", resamples=100))
    assert any("asymptote E is not determined" in warning for warning in result["warnings"])


def test_correlated_inputs_are_a_warning():
    n = np.geomspace(1e7, 1e9, 12)
    x = np.stack([n, 20 * n], axis=1)
    result, _ = fit.fit(data_of(x, laws.measure(x, 0.005)), QUICK)
    assert any("move together" in warning for warning in result["warnings"])


def test_bootstrap_resamples_whole_runs():
    """Ten copies of every point are no more evidence than one."""
    x = laws.grid(5, 5)
    y = laws.measure(x, noise=0.02)
    once, _ = fit.fit(data_of(x, y), fit.Options(resamples=200))
    copied = np.repeat(np.arange(25), 10)
    tenfold = Measurements(x[copied], y[copied], (6 * x[:, 0] * x[:, 1])[copied], copied)
    width = lambda ci: np.log(ci["alpha"][1] / ci["alpha"][0])  # noqa: E731
    assert width(fit.fit(tenfold, fit.Options(resamples=200))[0]["ci95"]) > 0.7 * width(once["ci95"])


def test_worst_point_is_named():
    x = laws.grid(5, 5)
    y = laws.measure(x, noise=0.001)
    y[7] *= 1.4
    result, _ = fit.fit(data_of(x, y), QUICK)
    assert result["drop_worst"][0]["dropped"] == [7]


def test_far_extrapolation_needs_force(tmp_path):
    x = laws.isoflop()
    table = laws.write(tmp_path / "f.csv", x, laws.measure(x, 0.01))
    with pytest.raises(UserError, match=r"20 times the largest measured compute .* or add --force"):
        fit.run(table, ND, tmp_path, fit.Options(resamples=40, predict=(2e22,)))
    assert not (tmp_path / "fit.json").exists()
    result = fit.run(table, ND, tmp_path, fit.Options(resamples=40, predict=(2e22, 5e21), force=True))
    for row in result["predictions"]:
        exact = optimum.optimal_split(laws.CHINCHILLA, laws.TRUTH, optimum.Cost(6, 1, 0), np.array([row["compute"]]))
        assert row["N_ci95"][0] < exact[0][0, 0] < row["N_ci95"][1]
        assert row["y_ci95"][0] < exact[2][0, 0] < row["y_ci95"][1]


def test_interval_of_a_predicted_run_covers_its_measurement():
    """A new run is measured with noise of its own, so 95 % of measurements lie in an interval wider than the law's."""
    x, noise, inside = laws.grid(4, 5), 0.02, []
    new = (float(np.median(x[:, 0])), float(np.median(x[:, 1])))
    for draw in range(3):
        result, _ = fit.fit(data_of(x, laws.measure(x, noise, seed=draw)), fit.Options(resamples=200, runs=(new,)))
        row = result["predicted_runs"][0]
        law = predict(laws.CHINCHILLA, np.array([list(result["params"].values())]), np.array([new]))
        assert row["y"] == pytest.approx(law[0, 0])
        assert row["compute"] == pytest.approx(6 * new[0] * new[1], rel=1e-6)
        assert np.diff(row["measured_ci95"]) > 1.5 * np.diff(row["y_ci95"])
        measured = laws.measure(np.tile(new, (200, 1)), noise, seed=100 + draw)
        inside.append((row["measured_ci95"][0] <= measured) & (measured <= row["measured_ci95"][1]))
    assert np.mean(inside) == pytest.approx(0.95, abs=0.05)
    assert f"run with N {new[0]:.4g}" in "\n".join(fit.summary(result))


def test_runs_are_predicted_by_laws_of_two_inputs_near_the_data(tmp_path):
    x = laws.isoflop()
    table = laws.write(
        tmp_path / "f.csv", np.column_stack([x, 6 * x[:, 0] * x[:, 1]]), laws.measure(x, 0.01), "N,D,flops,loss"
    )
    with pytest.raises(UserError, match="--predict-run: needs a law of N and D"):
        fit.run(table, Columns(("flops",), "loss"), tmp_path, fit.Options(resamples=40, runs=((1e8, 1e9),)))
    with pytest.raises(UserError, match=r"--predict-run, FLOPs .* or add --force"):
        fit.run(table, ND, tmp_path, fit.Options(resamples=40, runs=((1e12, 1e12),)))


def test_best_option_keeps_the_lowest_loss_of_each_budget(tmp_path):
    x = laws.isoflop()
    y = laws.measure(x)
    table = laws.write(tmp_path / "f.csv", np.column_stack([x, 6 * x[:, 0] * x[:, 1]]), y, "N,D,flops,loss")
    result = fit.run(table, Columns(("flops",), "loss"), tmp_path, fit.Options("power", resamples=40, best=True))
    assert sorted(p["y"] for p in result["points"]) == sorted(y.reshape(5, 7).min(1))


BAD = {
    "N,D,los\n1,2,3\n": "no column 'loss'; did you mean 'los'",
    "N,D,loss\n1,2,nan\n": "row 2, column loss: nan",
    "N,D,loss\n1,2,3\n1,,3\n": "row 3, column D: empty",
    "N,D,loss\n1,2,3\n1,x,3\n": "row 3, column D: 'x' is not a number",
    "N,D,loss\n1,2,-3\n": "row 2, column loss: -3; a power law needs values above 0",
    "N,D,loss\n1,2\n": "row 2: 2 values for 3 columns",
    "N,D,loss\n1,2,3\n2,3,4\n": "2 rows; a fit needs at least 4",
    "N,D,loss\n1,2,3\n2,3,4\n3,4,5\n4,5,6\n": "too few points: 4 points; chinchilla has 5 parameters",
    "": "empty",
    "N,D,loss\n" + "".join(f"{i % 2 + 1},{i + 1},{9 - i}\n" for i in range(8)): "2 different values of N",
}


@pytest.mark.parametrize("text", BAD)
def test_bad_table_is_one_line(tmp_path, text):
    table = tmp_path / "bad.csv"
    table.write_text(text)
    with pytest.raises(UserError) as error:
        fit.run(table, ND, tmp_path / "out", QUICK)
    assert BAD[text] in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_missing_table_is_an_error(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        fit.run(tmp_path / "none.csv", ND, tmp_path, QUICK)
