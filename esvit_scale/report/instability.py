"""The figure that shows when training was unstable and in which layer that began: accuracy above a map of gradients.

MoCo v3 (Chen et al. 2021) found that accuracy can dip for a while although the loss looks fine, and that the gradient
spikes behind such a dip begin in the first layer and reach the last one some steps later.
"""

import re

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, LogNorm

from esvit_scale.report import plots
from esvit_scale.report.plots import GREEN, GREY, Metrics
from esvit_scale.train.monitors import DIP, SPIKE, WINDOW

PREFIX = "grad_norm_"
WIDTH, ROW = 11.0, 0.17  # inches: width of the figure, height of a layer's row
COLUMNS = 600  # largest number of columns; one that stands for several steps shows their largest value
HEAT = LinearSegmentedColormap.from_list("heat", ["#80868f18", "#f0883e", "#dc2626", "#7f1d1d"])
RED = "#dc2626"


def layers(metrics: Metrics) -> list[str]:
    """Return the parts of the network whose gradient norms were logged, from input to output."""
    return sorted((name.removeprefix(PREFIX) for name in metrics if name.startswith(PREFIX)), key=place)


def place(part: str) -> tuple[int, int]:
    """Return the place of a part in the network, to sort by: patch embedding, stages by number, final norm, heads."""
    number = re.search(r"\d+", part)
    if part == "patch_embed":
        return 0, 0
    if number and part.startswith("stage"):
        return 1, int(number[0])
    return (2, 0) if part == "norm" else (3, 0)


def heat_map(metrics: Metrics, titles: dict[str, str]) -> bytes | None:
    """Draw the figure of one run as PNG: k-NN accuracy above a heat map of gradient norms (layers × steps).

    Return None for a run that logged no gradient norms by layer.

    Args:
        titles: layer → its name on the figure.
    """
    names = layers(metrics)
    steps = metrics.get("step")
    if not names or steps is None or len(steps) < 2:
        return None
    knn = metrics.get("knn_top1", np.full(len(steps), np.nan))
    with_knn = bool(np.isfinite(knn).any())
    heights = ([1.5] if with_knn else []) + [max(0.9, ROW * len(names))]
    figure = plots.blank_figure(WIDTH, sum(heights) + 0.6)
    axes = figure.subplots(len(heights), 1, sharex=True, gridspec_kw={"height_ratios": heights}, squeeze=False)[:, 0]
    if with_knn:
        _accuracy(axes[0], steps, knn)
    jumps = np.array([over_median(metrics[PREFIX + name]) for name in names])  # [layers, rows]
    _heat(axes[-1], steps, jumps, [titles.get(name, name.replace("_", " ")) for name in names])
    bar = figure.colorbar(ScalarMappable(LogNorm(1, 10 * SPIKE), HEAT), ax=axes.tolist(), pad=0.01, aspect=30)
    bar.outline.set_visible(False)
    bar.ax.tick_params(which="both", colors=GREY, labelsize=8)
    bar.set_label("times the median before", color=GREY, fontsize=8.5)
    return plots.png(figure)


def in_words(metrics: Metrics, titles: dict[str, str]) -> str:
    """Return the largest jump that the figure shows, in words."""
    steps, names = metrics["step"], layers(metrics)
    jumps = np.array([over_median(metrics[PREFIX + name]) for name in names])
    layer, row = np.unravel_index(jumps.argmax(), jumps.shape)
    return (
        f"gradient norms of {len(names)} layers over {len(steps):,} logged steps; the largest is {jumps.max():.3g} times the "
        f"median before, in {titles.get(names[layer], names[layer])} at step {steps[row]:,.0f}"
    )


def over_median(norms: np.ndarray) -> np.ndarray:
    """Divide every norm by the median of the finite ones among the 50 before it, to make spikes visible.

    The first norm becomes 1; a norm that is not finite becomes infinity.
    """
    ratios = np.ones(len(norms))
    for i in range(1, len(norms)):
        before = norms[max(0, i - WINDOW) : i]
        before = before[np.isfinite(before)]
        if len(before) and np.median(before) > 0:
            ratios[i] = norms[i] / np.median(before) if np.isfinite(norms[i]) else np.inf
    return ratios


def dips(knn: np.ndarray) -> np.ndarray:
    """Return a mask of the accuracies (0 to 1) that are more than five points below the best before them.

    It is False where the accuracy is NaN.
    """
    best = np.fmax.accumulate(np.where(np.isfinite(knn), knn, -np.inf))
    with np.errstate(invalid="ignore"):
        return np.isfinite(knn) & (knn < best - DIP)


def _accuracy(axes: Axes, steps: np.ndarray, knn: np.ndarray) -> None:
    plots.style(axes)
    there, low = np.isfinite(knn), dips(knn)
    axes.plot(steps[there], 100 * knn[there], color=GREEN, linewidth=1.7, marker="o", markersize=2.5)
    axes.plot(steps[low], 100 * knn[low], "v", color=RED, markersize=6)
    axes.set_ylabel("k-NN, %", color=GREY, fontsize=8.5)


def _heat(axes: Axes, steps: np.ndarray, jumps: np.ndarray, names: list[str]) -> None:
    stretch = -(-jumps.shape[1] // COLUMNS)
    starts = np.arange(0, jumps.shape[1], stretch)
    largest = np.maximum.reduceat(jumps, starts, axis=1)
    edges = np.append(steps[starts], 2 * steps[-1] - steps[-2])
    axes.pcolormesh(
        edges, np.arange(len(names) + 1), largest.clip(1, 10 * SPIKE), cmap=HEAT, norm=LogNorm(1, 10 * SPIKE)
    )
    plots.style(axes)
    axes.grid(visible=False)
    axes.set_yticks(np.arange(len(names)) + 0.5, names)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.set_xlabel("step", color=GREY, fontsize=8.5)
