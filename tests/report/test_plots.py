"""Curves: drawn from what was logged, absent when it was not."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from esvit_scale.report import plots

ROWS = [
    {
        "step": 10 * i,
        "loss": 7 - i / 20,
        "loss_view": 7.1 - i / 20,
        "loss_region": 6.9 - i / 20,
        "teacher_entropy_view": 5.0,
        "teacher_entropy_region": 5.5,
        "grad_norm": 0.5 + i,
        "lr": 1e-3,
        "wd": 0.04,
        "momentum": 0.99,
        "teacher_temp": 0.04,
        "images_per_s": 200.0,
        "data_wait_s": 0.01,
    }
    for i in range(1, 40)
]
DRAW = {
    "losses": plots.losses,
    "entropies": lambda m: plots.entropies(m, 1024),
    "grad_norm": plots.grad_norm,
    "schedules": plots.schedules,
    "throughput": plots.throughput,
}


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA")).astype(int)


def shows(png: bytes, colour: str) -> bool:
    """Whether a good number of opaque pixels have the colour."""
    target = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    image = pixels(png)
    return int(((np.abs(image[..., :3] - target).max(-1) < 8) & (image[..., 3] > 200)).sum()) > 200


@pytest.mark.parametrize("name", DRAW)
def test_draws_a_picture_or_nothing(name: str) -> None:
    png = DRAW[name](plots.columns(ROWS))
    assert png is not None
    assert pixels(png)[0, 0, 3] == 0  # transparent: it lies on a light or a dark page
    assert DRAW[name](plots.columns([{"step": 1, "other": 2.0}])) is None


def test_every_loss_part_is_drawn() -> None:
    png = plots.losses(plots.columns(ROWS))
    assert all(shows(png, colour) for colour in (plots.BLUE, plots.ORANGE, plots.GREEN))
    view_only = [{k: v for k, v in row.items() if k != "loss_region"} for row in ROWS]
    assert not shows(plots.losses(plots.columns(view_only)), plots.GREEN)


def test_uniform_entropy_is_marked() -> None:
    metrics = plots.columns(ROWS)
    drawn = [pixels(plots.entropies(metrics, k)) for k in (None, 1024, 4096)]
    assert (drawn[0] != drawn[1]).any()
    assert (drawn[1] != drawn[2]).any()


def test_long_runs_are_smoothed_and_single_rows_visible() -> None:
    rng = np.random.default_rng(0)
    long = [{"step": i, "loss": float(rng.random())} for i in range(1000)]
    assert shows(plots.losses(plots.columns(long)), plots.BLUE)
    assert shows(plots.losses(plots.columns(ROWS[:1])), plots.BLUE)


def test_values_that_are_not_numbers_leave_gaps() -> None:
    rows = [*ROWS, json.loads('{"step": 400, "loss": NaN, "grad_norm": Infinity}'), {"step": 410, "loss": "oops"}]
    metrics = plots.columns(rows)
    assert np.isnan(metrics["loss"][-2:]).all()
    for draw in DRAW.values():
        assert draw(metrics) is not None
