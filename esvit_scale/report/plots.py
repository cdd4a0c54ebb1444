"""Curves of runs: columns of metrics.jsonl → PNG bytes.

The background is transparent and the greys are neutral, so that one picture reads well on a light and on a dark page.
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

Metrics = Mapping[str, np.ndarray]  # column → float64 [rows], NaN where a row lacks it

BLUE, ORANGE, GREEN, VIOLET, GREY = "#3b82f6", "#f0883e", "#2ea36f", "#a371f7", "#80868f"
WIDTHS = {3: 3.5, 4: 2.6}  # inches of a panel, by how many stand in a row
HEIGHT, DPI = 2.1, 200  # inches; twice the screen's resolution
ROUND = [1, 2, 2.5, 5, 10]  # ticks are multiples of these
POINTS = 2000  # of a curve that are drawn: more are not seen
SMOOTH_FROM = 200  # points, from which a noisy curve gets a running mean
LOG_FROM = 20.0  # largest over smallest gradient norm


class Curve(NamedTuple):
    """One run's values."""

    label: str
    metrics: Metrics
    colour: str


class Panel(NamedTuple):
    column: str
    x: str = "step"  # or images_seen
    from_zero: bool = False
    noisy: bool = True
    limits: tuple[float, float] | None = None  # of the axis; None: what the values need
    prototypes: int | None = None  # K, of an entropy: marks ln K
    in_a_row: int = 3


def columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Rows of metrics.jsonl as columns; values that are not numbers become NaN."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: np.array([_number(row.get(name)) for row in rows]) for name in names}


def panel(curves: Sequence[Curve], panel: Panel) -> bytes:
    """One column of every run, in one small figure."""
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
        axes.set_ylim(0, 1.08 * max(_finite(curves, panel.column).max(), 0) or 1)
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
    axes.annotate(
        f"ln K = {limit:.2f}",
        (0.99, limit),
        xycoords=("axes fraction", "data"),
        xytext=(0, 2),
        textcoords="offset points",
        ha="right",
        va="bottom",
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
    """A transparent figure of that many inches."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    figure.patch.set_alpha(0)
    return figure


def style(axes: Axes) -> None:
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
    """The logged values; of a long run thin, with their running mean over them, where they are noisy."""
    x, values = _x(curve.metrics, panel.x), curve.metrics[panel.column]
    finite = np.isfinite(values) & np.isfinite(x)
    x, values = x[finite], values[finite]
    if len(values) <= SMOOTH_FROM or not panel.noisy:
        marker = "o" if len(values) == 1 else None
        axes.plot(*_thinned(x, values), color=curve.colour, linewidth=1.7, alpha=0.9, marker=marker, markersize=4)
        return
    axes.plot(*_thinned(x, values), color=curve.colour, linewidth=0.6, alpha=0.3)
    window = len(values) // 50
    mean = np.convolve(values, np.ones(window) / window, mode="valid")
    axes.plot(*_thinned(x[window - 1 :], mean), color=curve.colour, linewidth=1.7, alpha=0.9)


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most about POINTS points, the smallest and largest of every stretch among them: no spike is lost."""
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
    """Steps and images: 40,000 and 1.2M."""
    return f"{value / 1e6:.4g}M" if abs(value) >= 1e6 else f"{value:,.0f}"


def _short(value: float, _: Any) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _rgb(colour: str) -> tuple[float, float, float]:
    return tuple(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))  # type: ignore[return-value]


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
