"""Curves of a run: columns of metrics.jsonl → PNG bytes.

Every function returns None when the run did not log what it draws. The background is transparent and the greys are
neutral, so that one picture reads well on a light and on a dark page.
"""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

Metrics = Mapping[str, np.ndarray]  # column → float64 [rows], NaN where a row lacks it

BLUE, ORANGE, GREEN, VIOLET, GREY = "#3b82f6", "#f0883e", "#2ea36f", "#a371f7", "#80868f"
HALF, FULL, HEIGHT, DPI = 5.0, 10.4, 2.5, 200  # inches of half a page and a whole one; twice the screen's resolution


def columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Rows of metrics.jsonl as columns; values that are not numbers become NaN."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: np.array([_number(row.get(name)) for row in rows]) for name in names}


def losses(metrics: Metrics) -> bytes | None:
    """Total loss, with its view and region parts."""
    return _lines(metrics, [("loss", "total", BLUE), ("loss_view", "view", ORANGE), ("loss_region", "region", GREEN)])


def entropies(metrics: Metrics, prototypes: int | None) -> bytes | None:
    """Entropy of the teacher's targets in nats, under the ln K of a uniform target."""
    series = [("teacher_entropy_view", "view", ORANGE), ("teacher_entropy_region", "region", GREEN)]
    limit = (f"ln K = {math.log(prototypes):.2f} (uniform)", math.log(prototypes)) if prototypes else None
    return _lines(metrics, series, limit)


def grad_norm(metrics: Metrics) -> bytes | None:
    """Gradient norm before clipping, on a logarithmic axis when it spans more than one power of ten."""
    values = metrics.get("grad_norm", np.empty(0))
    values = values[np.isfinite(values) & (values > 0)]
    wide = len(values) > 0 and values.max() > 20 * values.min()
    return _lines(metrics, [("grad_norm", "gradient norm", VIOLET)], log=wide)


def schedules(metrics: Metrics) -> bytes | None:
    """The four numbers that move during training, each in its own panel."""
    titles = {
        "lr": "learning rate",
        "wd": "weight decay",
        "momentum": "teacher momentum",
        "teacher_temp": "teacher temperature",
    }
    return _panels(metrics, titles, BLUE, FULL, measured=False)


def throughput(metrics: Metrics) -> bytes | None:
    """Images per second, and the seconds a step waited for data."""
    return _panels(
        metrics, {"images_per_s": "images per second", "data_wait_s": "wait for data, s"}, GREEN, HALF, measured=True
    )


def _lines(
    metrics: Metrics,
    series: Sequence[tuple[str, str, str]],
    limit: tuple[str, float] | None = None,
    log: bool = False,
) -> bytes | None:
    present = [(column, label, colour) for column, label, colour in series if _has(metrics, column)]
    if not present:
        return None
    figure, [axes] = _figure(1, HALF)
    for column, label, colour in present:
        _curve(axes, metrics, column, colour, label)
    if limit:
        axes.axhline(limit[1], color=GREY, linestyle=(0, (4, 3)), linewidth=1.2)
        axes.annotate(
            limit[0],
            (0.995, limit[1]),
            xycoords=("axes fraction", "data"),
            xytext=(0, -3),
            textcoords="offset points",
            ha="right",
            va="top",
            color=GREY,
            fontsize=9,
        )
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(_short))
    if len(present) > 1:
        axes.legend(frameon=False, labelcolor="linecolor", fontsize=10, ncols=len(present), loc="best")
    axes.set_xlabel("step", color=GREY)
    return png(figure)


def _panels(metrics: Metrics, titles: Mapping[str, str], colour: str, width: float, measured: bool) -> bytes | None:
    present = [column for column in titles if _has(metrics, column)]
    if not present:
        return None
    figure, all_axes = _figure(len(present), width)
    for axes, column in zip(all_axes, present, strict=True):
        _curve(axes, metrics, column, colour, smooth=measured)
        axes.set_title(titles[column], color=GREY, fontsize=10, loc="left")
        axes.set_xlabel("step", color=GREY)
        if measured:
            axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(FuncFormatter(_short))
    return png(figure)


def _figure(panels: int, width: float) -> tuple[Figure, list[Axes]]:
    figure = blank_figure(width, HEIGHT)
    all_axes = list(figure.subplots(1, panels, squeeze=False).flat)
    for axes in all_axes:
        _style(axes)
    return figure, all_axes


def blank_figure(width: float, height: float) -> Figure:
    """A transparent figure of that many inches."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    figure.patch.set_alpha(0)
    return figure


def _style(axes: Axes) -> None:
    axes.patch.set_alpha(0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color((*_rgb(GREY), 0.5))
    axes.tick_params(colors=GREY, labelsize=9, length=3)
    axes.grid(color=GREY, alpha=0.18, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _curve(
    axes: Axes, metrics: Metrics, column: str, colour: str, label: str | None = None, smooth: bool = True
) -> None:
    """The logged values; of a long run thin, with their running mean over them, where they are noisy."""
    steps, values = _steps(metrics), metrics[column]
    finite = np.isfinite(values)
    steps, values = steps[finite], values[finite]
    if len(values) <= 200 or not smooth:
        axes.plot(steps, values, color=colour, linewidth=1.8, label=label, marker="o" if len(values) == 1 else None)
        return
    axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.3)
    window = len(values) // 50
    mean = np.convolve(values, np.ones(window) / window, mode="valid")
    axes.plot(steps[window - 1 :], mean, color=colour, linewidth=1.8, label=label)


def _steps(metrics: Metrics) -> np.ndarray:
    length = len(next(iter(metrics.values())))
    return metrics.get("step", np.arange(1, length + 1, dtype=float))


def _has(metrics: Metrics, column: str) -> bool:
    return column in metrics and bool(np.isfinite(metrics[column]).any())


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _short(value: float, _: Any) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _rgb(colour: str) -> tuple[float, float, float]:
    return tuple(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))  # type: ignore[return-value]


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
