"""Small figures of curves from columns of metrics.jsonl, as PNG bytes.

The background is transparent and the greys are neutral, so that a figure is readable on light and dark pages.
"""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

Metrics = Mapping[str, np.ndarray]  # column → float64 [rows]; NaN in rows without it

BLUE, ORANGE, GREEN, VIOLET, GREY = "#3b82f6", "#f0883e", "#2ea36f", "#a371f7", "#80868f"
WIDTHS = {3: 3.5, 4: 2.6}  # panels in a row → inches of a panel
HEIGHT, DPI = 2.1, 200  # inches; dots per inch, twice the resolution of a screen
ROUND = [1, 2, 2.5, 5, 10]  # ticks are multiples of these
POINTS = 2000  # largest number of points of a curve that are drawn
SMOOTH_FROM = 200  # number of points above which a noisy curve gets a running mean
LOG_FROM = 20.0  # ratio of largest to smallest gradient norm above which the axis is logarithmic


class Curve(NamedTuple):
    """One run's curve in a small figure."""

    label: str
    metrics: Metrics
    colour: str


class Panel(NamedTuple):
    """The settings of one small figure: the column it shows, and how it is drawn."""

    column: str
    x: str = "step"  # column of the x axis: step or images_seen
    from_zero: bool = False
    noisy: bool = True
    limits: tuple[float, float] | None = None  # of the y axis; None fits it to the values
    prototypes: int | None = None  # K, to mark ln K in the figure of an entropy
    in_a_row: int = 3
    marks: tuple[tuple[str, float], ...] = ()  # names and values of dashed lines


def columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Return rows of metrics.jsonl as columns; values that are not numbers become NaN."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: np.array([_number(row.get(name)) for row in rows]) for name in names}


def panel(curves: Sequence[Curve], panel: Panel) -> bytes:
    """Return a small figure of one column, with a curve for every run, as PNG."""
    figure = blank_figure(WIDTHS[panel.in_a_row], HEIGHT)
    axes = figure.subplots()
    style(axes)
    for curve in curves:
        _draw(axes, curve, panel)
    if panel.limits and panel.limits[0] < panel.limits[1]:
        axes.set_ylim(*panel.limits)
    if panel.prototypes:
        _mark_uniform(axes, panel.prototypes)
    if panel.from_zero:
        highest = max(_finite(curves, panel.column).max(), 0, *(value for _, value in panel.marks))
        axes.set_ylim(0, 1.08 * highest or 1)
    for i, (name, value) in enumerate(sorted(panel.marks, key=lambda mark: mark[1])):
        axes.axhline(value, color=GREY, linestyle=(0, (4, 3)), linewidth=1.2)
        _label(axes, f"{name} {value:.3f}", value, below=not i and len(panel.marks) > 1)
    if panel.column == "grad_norm" and _is_wide(curves, panel.column):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(_short))
    axes.set_xlabel(panel.x.replace("_", " "), color=GREY, fontsize=8.5)
    return png(figure)


def _mark_uniform(axes: Axes, prototypes: int) -> None:
    limit = math.log(prototypes)
    axes.axhline(limit, color=GREY, linestyle=(0, (4, 3)), linewidth=1.2)
    low, high = axes.get_ylim()
    axes.set_ylim(low, max(high, limit + 0.12 * (limit - low)))
    _label(axes, f"ln K = {limit:.2f}", limit)


def _label(axes: Axes, text: str, value: float, below: bool = False) -> None:
    """Write a text at the right end of a horizontal line, above or below it."""
    axes.annotate(
        text,
        (0.99, value),
        xycoords=("axes fraction", "data"),
        xytext=(0, -2 if below else 2),
        textcoords="offset points",
        ha="right",
        va="top" if below else "bottom",
        color=GREY,
        fontsize=8,
    )


def _is_wide(curves: Sequence[Curve], column: str) -> bool:
    values = _finite(curves, column)
    values = values[values > 0]
    return len(values) > 0 and bool(values.max() > LOG_FROM * values.min())


def _finite(curves: Sequence[Curve], column: str) -> np.ndarray:
    values = np.concatenate([curve.metrics[column] for curve in curves])
    return values[np.isfinite(values)]


def blank_figure(width: float, height: float) -> Figure:
    """Return an empty transparent figure of a size in inches."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    figure.patch.set_alpha(0)
    return figure


def style(axes: Axes) -> None:
    """Give axes the look of the report: transparent, with neutral grey lines and few ticks."""
    axes.patch.set_alpha(0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color((*_rgb(GREY), 0.5))
    axes.tick_params(colors=GREY, labelsize=8.5, length=2.5)
    axes.grid(color=GREY, alpha=0.18, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=ROUND))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=ROUND))
    axes.xaxis.set_major_formatter(FuncFormatter(_count))


def _draw(axes: Axes, curve: Curve, panel: Panel) -> None:
    """Draw a curve; if it is noisy and long, draw its values thin and their running mean on top."""
    x, values = _x(curve.metrics, panel.x), curve.metrics[panel.column]
    finite = np.isfinite(values) & np.isfinite(x)
    x, values = x[finite], values[finite]
    if len(values) <= SMOOTH_FROM or not panel.noisy:
        marker = "o" if len(values) == 1 else None
        axes.plot(*thinned(x, values), color=curve.colour, linewidth=1.7, alpha=0.9, marker=marker, markersize=4)
        return
    axes.plot(*thinned(x, values), color=curve.colour, linewidth=0.6, alpha=0.3)
    window = len(values) // 50
    mean = np.convolve(values, np.ones(window) / window, mode="valid")
    axes.plot(*thinned(x[window - 1 :], mean), color=curve.colour, linewidth=1.7, alpha=0.9)


def thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return at most about POINTS points, among them the smallest and largest of every interval, so that no spike is lost."""
    stretch = -(-2 * len(x) // POINTS)
    if stretch < 2:
        return x, y
    whole = len(y) // stretch * stretch
    parts = y[:whole].reshape(-1, stretch)
    starts = np.arange(0, whole, stretch)
    kept = np.unique(np.concatenate([starts + parts.argmin(1), starts + parts.argmax(1), [0, len(y) - 1]]))
    return x[kept], y[kept]


def _x(metrics: Metrics, name: str) -> np.ndarray:
    length = len(next(iter(metrics.values())))
    return metrics.get(name, np.arange(1, length + 1, dtype=float))


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def _count(value: float, _: Any) -> str:
    """Return a number of steps or images as text, such as 40,000 or 1.2M."""
    return f"{value / 1e6:.4g}M" if abs(value) >= 1e6 else f"{value:,.0f}"


def _short(value: float, _: Any) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _rgb(colour: str) -> tuple[float, float, float]:
    return tuple(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))  # type: ignore[return-value]


def png(figure: Figure) -> bytes:
    """Return a figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
