"""The figures (PNG and SVG) and the HTML page of a fitted scaling law, from plain arrays.

Measurements are dots, fits are lines and 95 % intervals are bands. Beyond the largest measured compute, lines are dashed.
"""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    LogFormatterSciNotation,
    LogLocator,
    MaxNLocator,
    NullFormatter,
)
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

from esvit_scale import __version__, files
from esvit_scale.report.plots import BLUE, DPI, GREEN, GREY, ORANGE
from esvit_scale.report.sample_images import data_uri
from esvit_scale.report.templates import render

Array = NDArray[np.float64]
WIDE, TALL = 9.6, 4.2
LABEL_GAP = 2  # pixels of a figure that stay free around the label of a tick
SIZES, BUDGETS = colormaps["viridis"], colormaps["plasma"]
BRIGHT, DARK = 0.85, 0.1  # part of a colour map that is visible on white and on black


class RenderedFigure(NamedTuple):
    """A figure, rendered as PNG and as SVG."""

    png: bytes
    svg: bytes


class Band(NamedTuple):
    """A fitted curve with its 95 % interval, which is NaN where unknown."""

    x: Array
    y: Array
    low: Array
    high: Array


class Section(NamedTuple):
    """A section of the page, with one figure."""

    name: str  # part of the names of its files
    title: str
    caption: str
    picture: RenderedFigure


def curve(
    compute: Array, y: Array, sizes: Array | None, band: Band, predicted: Band, x_label: str, y_label: str
) -> RenderedFigure:
    """Draw measurements over compute with the fitted curve and its predictions.

    With two inputs, `sizes` [n] are the model sizes, which colour the dots, and the curve is the compute-optimal
    frontier; with one input, `sizes` is None.
    """
    figure = _figure(WIDE, TALL)
    axes = figure.subplots()
    _style(axes, x_label, y_label)
    _band(
        axes, band, BLUE, compute.max(), "compute-optimal, 95 % interval" if sizes is not None else "fit, 95 % interval"
    )
    _dots(figure, axes, compute, y, sizes)
    if np.isfinite(predicted.y).any():
        below_above = np.abs(np.stack([predicted.y - predicted.low, predicted.high - predicted.y]))
        axes.errorbar(
            predicted.x, predicted.y, below_above, fmt="D", color=ORANGE, markersize=6, capsize=4, label="predicted"
        )
    _log_y(axes, y)
    axes.legend(frameon=False, labelcolor=GREY, fontsize=9)
    return _save(figure)


def isoflop(budgets: Sequence[dict[str, Any]], n_label: str, y_label: str) -> RenderedFigure:
    """Draw, for each compute budget, the measurements, the law's curve, and the parabola (dashed) with its minimum.

    Args:
        budgets: dicts with compute, sizes [m], y [m], law (xs, ys), parabola (xs, ys) or None, minimum (x, y) or None.
    """
    figure = _figure(WIDE, TALL)
    axes = figure.subplots()
    _style(axes, n_label, y_label)
    colours = BUDGETS(np.linspace(DARK, BRIGHT, max(2, len(budgets))))
    for budget, colour in zip(budgets, colours, strict=False):
        label = f"{budget['compute']:.2g} FLOPs"
        axes.plot(budget["sizes"], budget["y"], "o", color=colour, markersize=5, label=label)
        axes.plot(*budget["law"], color=colour, linewidth=1.6)
        if budget["parabola"] is not None:
            axes.plot(*budget["parabola"], color=colour, linewidth=1.1, linestyle=(0, (4, 3)))
        if budget["minimum"] is not None:
            axes.plot(*budget["minimum"], "*", color=colour, markersize=12, markeredgecolor="white", zorder=5)
    _log_y(axes, np.concatenate([budget["y"] for budget in budgets]))
    axes.legend(frameon=False, labelcolor=GREY, fontsize=8, ncols=2 if len(budgets) > 5 else 1)
    return _save(figure)


def frontier(
    n: Band, d: Band, measured: float, minima: tuple[Array, Array], n_label: str, d_label: str, x_label: str
) -> RenderedFigure:
    """Draw the best model size and amount of data over compute; stars are the minima of the isoFLOP parabolas.

    Args:
        measured: largest measured compute, beyond which lines are dashed.
        minima: compute and best size of each parabola.
    """
    figure = _figure(WIDE, 3.8)
    left, right = figure.subplots(1, 2)
    for axes, band, colour, label in ((left, n, BLUE, n_label), (right, d, GREEN, d_label)):
        _style(axes, x_label, f"best {label}")
        axes.set_yscale("log")
        _band(axes, band, colour, measured, "law, 95 % interval")
    if len(minima[0]):
        left.plot(*minima, "*", color=ORANGE, markersize=11, label="isoFLOP parabolas", zorder=5)
    left.legend(frameon=False, labelcolor=GREY, fontsize=9)
    return _save(figure)


def residuals(compute: Array, percent: Array, sizes: Array | None, x_label: str) -> RenderedFigure:
    """Draw how far every measurement is from the fit, in percent of the fit."""
    figure = _figure(WIDE, 3.2)
    axes = figure.subplots()
    _style(axes, x_label, "measured over fitted, %")
    axes.axhline(0, color=GREY, linewidth=1)
    _dots(figure, axes, compute, percent, sizes)
    reach = 1.15 * max(np.abs(percent).max(), 1e-3)
    axes.set_ylim(-reach, reach)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    return _save(figure)


def write(folder: Path, name: str, title: str, facts: dict[str, Any], sections: Sequence[Section]) -> Path:
    """Write a self-contained page and its figures, and return the page's path.

    The page is `folder`/`name`.html. The figure of each section stands beside it as NAME-SECTION.png and .svg, where NAME
    is `name` and SECTION the section's name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for section in sections:
        for kind, content in section.picture._asdict().items():
            files.write_bytes(folder / f"{name}-{section.name}.{kind}", content)
    shown = [s._asdict() | {"image": data_uri(s.picture.png, "image/png")} for s in sections]
    page = render("scaling.html.j2", title=title, facts=facts, sections=shown, version=__version__)
    path = folder / f"{name}.html"
    files.write_text(path, page)
    return path


# --- parts -----------------------------------------------------------------------------------------------------------


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    figure.patch.set_alpha(0)
    return figure


def _style(axes: Axes, x_label: str, y_label: str) -> None:
    axes.patch.set_alpha(0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.spines[["left", "bottom"]].set_alpha(0.5)
    axes.tick_params(which="both", colors=GREY, labelsize=9)
    axes.grid(color=GREY, alpha=0.18, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(LogFormatterSciNotation())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(x_label, color=GREY)
    axes.set_ylabel(y_label, color=GREY)


def _ticks_in_a_decade(axes: Axes) -> None:
    """Label more ticks of a logarithmic x axis that spans little more than a power of ten."""
    low, high = axes.get_xlim()
    if high / low < 30:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low > 4 else (1, 1.5, 2, 3, 4, 5, 6, 8)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.3g}"))


def _label_without_overlap(axis: Axis) -> None:
    """Leave out labels of a drawn axis that would touch another: the roundest numbers keep theirs."""
    ticks = [tick for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()] if _is_shown(tick.label1, axis)]
    kept: list[Bbox] = []
    for tick in sorted(ticks, key=lambda t: _roundness(float(t.get_loc()))):
        box = tick.label1.get_window_extent().padded(LABEL_GAP)
        if any(box.overlaps(other) for other in kept):
            axis.set_major_locator(FixedLocator([v for v in axis.get_majorticklocs() if v != tick.get_loc()]))
            axis.set_minor_locator(FixedLocator([v for v in axis.get_minorticklocs() if v != tick.get_loc()]))
        else:
            kept.append(box)


def _is_shown(label: Text, axis: Axis) -> bool:
    low, high = sorted(axis.get_view_interval())
    place = label.get_position()[axis is axis.axes.yaxis]
    return bool(label.get_text()) and low <= place <= high


def _roundness(value: float) -> tuple[int, float]:
    """Return a key that sorts powers of ten before 2 and 5 times a power, and these before other numbers."""
    digit = f"{abs(value):.3e}"[:5]
    return ({"1.000": 0, "0.000": 0, "5.000": 1, "2.000": 1}.get(digit, 2), abs(value))


def _log_y(axes: Axes, y: Array) -> None:
    """Make the y axis logarithmic, with plain numbers as labels, also over less than a power of ten."""
    axes.set_yscale("log")
    if y.max() / y.min() < 20:
        axes.yaxis.set_major_locator(
            LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)) if y.max() / y.min() > 2 else MaxNLocator(5)
        )
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.3g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _band(axes: Axes, band: Band, colour: str, measured: float, label: str) -> None:
    inside = band.x <= measured * (1 + 1e-9)
    beyond = band.x >= band.x[inside].max() if inside.any() else ~inside
    axes.fill_between(band.x, band.low, band.high, color=colour, alpha=0.16, linewidth=0, label=label)
    axes.plot(band.x[inside], band.y[inside], color=colour, linewidth=2)
    axes.plot(band.x[beyond], band.y[beyond], color=colour, linewidth=1.6, linestyle=(0, (4, 3)))


def _dots(figure: Figure, axes: Axes, x: Array, y: Array, sizes: Array | None) -> None:
    if sizes is None or math.isclose(sizes.min(), sizes.max()):
        axes.plot(x, y, "o", color=GREEN, markersize=5, label="measured")
        return
    low, high = np.log(sizes.min()), np.log(sizes.max())
    colours = SIZES(DARK + (BRIGHT - DARK) * (np.log(sizes) - low) / (high - low))
    axes.scatter(x, y, c=colours, s=26, zorder=3, label="measured")
    shown = ListedColormap(SIZES(np.linspace(DARK, BRIGHT, 256)))
    bar = figure.colorbar(ScalarMappable(LogNorm(sizes.min(), sizes.max()), shown), ax=axes, pad=0.01, aspect=30)
    bar.ax.tick_params(which="both", colors=GREY, labelsize=8)
    bar.outline.set_visible(False)
    bar.set_label("N", color=GREY, fontsize=9)


def _save(figure: Figure) -> RenderedFigure:
    made = []
    for axes in figure.axes:
        if axes.get_xscale() == "log":
            _ticks_in_a_decade(axes)
    figure.canvas.draw()  # places the labels
    for axes in figure.axes:
        _label_without_overlap(axes.xaxis)
        _label_without_overlap(axes.yaxis)
    for kind in ("png", "svg"):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, metadata={"Date": None} if kind == "svg" else None)
        made.append(buffer.getvalue())
    return RenderedFigure(*made)
