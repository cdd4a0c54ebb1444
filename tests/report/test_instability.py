"""The picture of a run's instability: where spikes and dips are, and that both are seen in it."""

import io
import math
from statistics import median

import numpy as np
import pytest
from PIL import Image

from esvit_scale.report import instability
from esvit_scale.train.monitors import DIP, WINDOW


def slow_ratios(norms: np.ndarray) -> list[float]:
    ratios = []
    for i, norm in enumerate(norms):
        before = [n for n in norms[max(0, i - WINDOW) : i] if math.isfinite(n)]
        if not before:
            ratios.append(1.0)
        else:
            ratios.append(norm / median(before) if math.isfinite(norm) else math.inf)
    return ratios


def test_ratio_to_running_median_equals_slow_reference() -> None:
    norms = np.exp(np.random.default_rng().normal(size=130))
    norms[40] = np.nan
    np.testing.assert_allclose(instability.over_median(norms), slow_ratios(norms), rtol=1e-12)


def test_dip_is_below_the_best_so_far() -> None:
    best, low = 0.5, 0.5 - DIP
    accuracy = np.array([np.nan, 0.1, best, np.nan, low + 0.01, low - 0.01, 0.6, 0.6 - DIP - 0.01, np.nan])
    assert instability.dips(accuracy).tolist() == [False, False, False, False, False, True, False, True, False]


def metrics(steps: int = 1500) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    rows = {"step": np.arange(1.0, steps + 1)}
    for i, part in enumerate(("patch_embed", "stage1", "stage2")):
        norms = np.exp(generator.normal(0, 0.1, steps))
        norms[800 + 30 * i] = 60.0  # a spike of one step, later in later layers
        rows[f"grad_norm_{part}"] = norms
    rows["knn_top1"] = np.where(np.arange(steps) % 100 == 99, 0.5, np.nan)
    rows["knn_top1"][899] = 0.2
    return rows


def drawn(rows: dict[str, np.ndarray]) -> np.ndarray:
    png = instability.heat_map(rows, {})
    assert png is not None
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA")).astype(int)


def dark_red(pixels: np.ndarray) -> int:
    red, green, blue, _ = np.moveaxis(pixels, -1, 0)
    return int(((red > 120) & (green < 60) & (blue < 60)).sum())


def test_spike_of_one_step_is_drawn() -> None:
    calm = metrics()
    for name in list(calm):
        if name.startswith("grad_norm_"):
            calm[name] = calm[name].clip(max=2.0)
    bar = dark_red(drawn(calm))  # the colour bar's own, and the dip's mark
    assert dark_red(drawn(metrics())) > bar + 3 * 8


def test_dip_is_marked() -> None:
    level = metrics()
    level["knn_top1"][899] = 0.5
    assert dark_red(drawn(metrics())) > dark_red(drawn(level)) + 50


@pytest.mark.parametrize("rows", [{}, {"step": np.arange(5.0)}, {"step": np.array([1.0]), "grad_norm_x": np.ones(1)}])
def test_picture_without_data_is_none(rows: dict[str, np.ndarray]) -> None:
    assert instability.heat_map(rows, {}) is None
