"""Curves: drawn from what was logged, one panel a column, every run in it."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from esvit_scale.report import plots
from esvit_scale.report.plots import BLUE, GREEN, ORANGE, Curve, Panel

ROWS = [
    {"step": 10 * i, "images_seen": 640 * i, "loss": 7 - i / 20, "grad_norm": 0.5 + i, "images_per_s": 200.0 + i}
    for i in range(1, 40)
]


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA")).astype(int)


def shows(png: bytes, colour: str) -> int:
    """How many nearly opaque pixels have the colour."""
    target = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    image = pixels(png)
    return int(((np.abs(image[..., :3] - target).max(-1) < 8) & (image[..., 3] > 200)).sum())


def drawn(rows: list[dict], panel: Panel, colour: str = BLUE) -> bytes:
    return plots.panel([Curve("a", plots.columns(rows), colour)], panel)


@pytest.mark.parametrize("column", ["loss", "grad_norm", "images_per_s"])
def test_curve_is_drawn_on_a_transparent_background(column: str) -> None:
    png = drawn(ROWS, Panel(column))
    assert pixels(png)[0, 0, 3] == 0  # it lies on a light or a dark page
    assert shows(png, BLUE) > 200


def test_each_run_is_drawn_in_its_colour() -> None:
    other = [row | {"loss": row["loss"] - 1} for row in ROWS]
    both = [Curve("a", plots.columns(ROWS), ORANGE), Curve("b", plots.columns(other), GREEN)]
    png = plots.panel(both, Panel("loss"))
    assert shows(png, ORANGE) > 200
    assert shows(png, GREEN) > 200
    assert shows(plots.panel(both[:1], Panel("loss")), GREEN) == 0


def test_uniform_entropy_is_marked() -> None:
    images = [pixels(drawn(ROWS, Panel("loss", prototypes=k))) for k in (None, 1024, 4096)]
    assert (images[0] != images[1]).any()
    assert (images[1] != images[2]).any()


def test_long_runs_are_smoothed_and_single_rows_visible() -> None:
    rng = np.random.default_rng(0)
    long = [{"step": i, "loss": float(rng.random())} for i in range(1000)]
    assert shows(drawn(long, Panel("loss")), BLUE) > 200
    assert shows(drawn(ROWS[:1], Panel("loss")), BLUE) > 20


def test_thinning_keeps_spikes_and_ends() -> None:
    x, y = np.arange(1_000_000.0), np.zeros(1_000_000)
    y[314_159], y[271_828] = 5, -3
    thin_x, thin_y = plots.thinned(x, y)
    assert len(thin_x) <= 2 * plots.POINTS
    assert (np.diff(thin_x) > 0).all()
    assert thin_y[thin_x == 314_159].tolist() == [5]
    assert thin_y[thin_x == 271_828].tolist() == [-3]
    assert (thin_x[0], thin_x[-1]) == (0, 999_999)


def test_non_numeric_values_leave_gaps() -> None:
    rows = [*ROWS, json.loads('{"step": 400, "loss": NaN, "grad_norm": Infinity}'), {"step": 410, "loss": "oops"}]
    metrics = plots.columns(rows)
    assert np.isnan(metrics["loss"][-2:]).all()
    for column in ("loss", "grad_norm"):
        assert drawn(rows, Panel(column))
        assert drawn(rows, Panel(column, from_zero=True))


def test_axes_can_be_changed() -> None:
    assert (pixels(drawn(ROWS, Panel("loss", x="images_seen"))) != pixels(drawn(ROWS, Panel("loss")))).any()
    assert pixels(drawn(ROWS, Panel("loss", in_a_row=4))).shape[1] < pixels(drawn(ROWS, Panel("loss"))).shape[1]
