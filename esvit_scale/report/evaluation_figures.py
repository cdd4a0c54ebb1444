"""Figures of evaluation results, as PNG bytes: correspondences between two views, attention maps, token components.

As in plots.py, backgrounds are transparent and greys neutral, so that figures are readable on light and dark pages.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from numpy.typing import NDArray

from esvit_scale import files
from esvit_scale.evaluate.attention import AttentionResult
from esvit_scale.evaluate.correspondence import TOP, CorrespondenceResult, ViewPair
from esvit_scale.report.plots import GREY, blank_figure, png

GOOD, BAD = "#34d399", "#fb7185"
GAP = 0.06  # space between two views, as a fraction of their height
BULGE = 0.05  # height of the bulge of a connecting line, as a fraction of its length
HEADS_SHOWN = 8  # largest number of heads that are drawn
WIDTH = 10.4  # inches


def correspondences(cases: Sequence[ViewPair], shown: int = TOP) -> bytes:
    """Draw the views of each pair side by side, with lines between matched tokens: green if right, else red.

    Args:
        shown: number of matches to draw of each pair; see `_spread`.
    """
    shapes = [_pair_shape(case) for case in cases]
    width = sum(w / h for h, w in shapes)
    height = WIDTH / width
    figure = blank_figure(WIDTH, height + 0.35)
    ratios = [w / h for h, w in shapes]
    for axes, case in zip(figure.subplots(1, len(cases), width_ratios=ratios, squeeze=False).flat, cases, strict=True):
        _pair(axes, case, shown)
    return png(figure)


def attention(seen: AttentionResult) -> bytes:
    """Draw the attention that each token receives: a row for each stage (its last block), a column for each head."""
    last = {block.stage: block for block in seen.blocks}
    columns = 1 + min(HEADS_SHOWN, max(block.probabilities.shape[1] for block in last.values()))
    height, width = seen.picture.shape[:2]
    figure = blank_figure(WIDTH, (WIDTH / columns) * height / width * len(last) + 0.28 * len(last))
    grid = figure.subplots(len(last), columns, squeeze=False)
    grey = seen.picture @ np.array([0.299, 0.587, 0.114])
    for row, block in zip(grid, last.values(), strict=True):
        maps = block.received().float().numpy()
        _image(row[0], seen.picture)
        more = f", {HEADS_SHOWN} shown" if len(maps) > HEADS_SHOWN else ""
        heads = f"{len(maps)} head{'s' if len(maps) > 1 else ''}{more}"
        row[0].set_title(f"stage {block.stage + 1} · {heads}", color=GREY, fontsize=8.5, loc="left")
        for axes in row[1:]:
            axes.set_axis_off()
        for axes, received in zip(row[1:], maps, strict=False):
            axes.imshow(grey, cmap="gray", vmin=0, vmax=255)
            top = max(float(np.quantile(received, 0.99)), float(received.mean()))
            axes.imshow(_stretched(received, height, width), cmap="magma", vmin=0, vmax=top, alpha=0.66)
    return png(figure)


def components(seen: AttentionResult) -> bytes:
    """Draw the picture, and the first three principal components of each stage's tokens as red, green and blue."""
    height, width = seen.picture.shape[:2]
    columns = 1 + len(seen.components)
    figure = blank_figure(WIDTH, WIDTH / columns * height / width + 0.28)
    row = figure.subplots(1, columns, squeeze=False)[0]
    _image(row[0], seen.picture)
    row[0].set_title("picture", color=GREY, fontsize=8.5, loc="left")
    for s, (axes, values) in enumerate(zip(row[1:], seen.components, strict=True)):
        _image(axes, _stretched(values.permute(1, 2, 0).numpy(), height, width))
        axes.set_title(
            f"stage {s + 1} · {values.shape[1]}×{values.shape[2]} tokens", color=GREY, fontsize=8.5, loc="left"
        )
    return png(figure)


def kept(seen: AttentionResult) -> bytes:
    """Draw the picture, and beside it what each pruning stage of a sparse trunk keeps: pruned tokens are left blank."""
    height, width = seen.picture.shape[:2]
    columns = 1 + len(seen.kept)
    figure = blank_figure(WIDTH, WIDTH / columns * height / width + 0.28)
    row = figure.subplots(1, columns, squeeze=False)[0]
    _image(row[0], seen.picture)
    row[0].set_title("picture", color=GREY, fontsize=8.5, loc="left")
    for s, (axes, mask) in enumerate(zip(row[1:], seen.kept, strict=True), start=1):
        opaque = 255 * _stretched(mask.numpy().astype(np.uint8), height, width)
        _image(axes, np.dstack([seen.picture, opaque]))
        axes.set_title(
            f"pruning {s} · {int(mask.sum())} of {mask.numel()} tokens", color=GREY, fontsize=8.5, loc="left"
        )
    return png(figure)


def write_correspondences(result: CorrespondenceResult, out: Path) -> list[Path]:
    """Write correspondence-best.png, -worst.png and -stereo.png to the folder `out`; return their paths."""
    pictures = {"best": result.best, "worst": result.worst, "stereo": [result.stereo]}
    shown = {"stereo": 40}
    return [
        _write(out / f"correspondence-{name}.png", correspondences(cases, shown.get(name, TOP)))
        for name, cases in pictures.items()
        if cases
    ]


def write_attention(seen: AttentionResult, out: Path) -> list[Path]:
    """Write attention.png, components.png and, of a sparse trunk, kept.png to the folder `out`; return their paths."""
    drawn = {"attention": attention(seen), "components": components(seen)}
    if seen.kept:
        drawn["kept"] = kept(seen)
    return [_write(out / f"{name}.png", content) for name, content in drawn.items()]


def _write(path: Path, content: bytes) -> Path:
    files.write_bytes(path, content)
    return path


def _pair_shape(case: ViewPair) -> tuple[int, int]:
    """Return height and width in pixels of two views side by side."""
    height = max(case.first.shape[0], case.second.shape[0])
    return height, case.first.shape[1] + case.second.shape[1] + round(GAP * height)


def _pair(axes: Axes, case: ViewPair, shown: int) -> None:
    height, width = _pair_shape(case)
    canvas = np.zeros((height, width, 4), np.uint8)
    offset = width - case.second.shape[1]
    for pixels, left in ((case.first, 0), (case.second, offset)):
        part = canvas[: pixels.shape[0], left : left + pixels.shape[1]]
        part[..., :3], part[..., 3] = pixels, 255
    _image(axes, canvas)
    pairs = case.pairs
    chosen = _spread(len(pairs.right), shown)
    start, end, right = (
        pairs.start.numpy()[chosen],
        pairs.found.numpy()[chosen] + [offset, 0],
        pairs.right.numpy()[chosen],
    )
    colours = [GOOD if ok else BAD for ok in right]
    axes.add_collection(LineCollection(_arcs(start, end), colors=colours, linewidths=1.1, alpha=0.9), autolim=False)
    for places in (start, end):
        axes.scatter(places[:, 0], places[:, 1], s=13, c=colours, edgecolors="black", linewidths=0.5, zorder=3)
    share = 100 * float(pairs.right.float().mean())
    axes.set_title(
        f"{_short(case.key)} · {share:.0f} % of {len(pairs.right)} tokens", color=GREY, fontsize=8.5, loc="left"
    )


def _arcs(start: NDArray, end: NDArray) -> list[NDArray]:
    """Return arcs of points from each start [N, 2] to its end [N, 2].

    An arc bulges upwards in proportion to its length, so that the lines of mirrored tokens, which lie in one row, do not
    cover each other.
    """
    t = np.linspace(0, 1, 25)[None, :, None]
    length = np.linalg.norm(end - start, axis=1)[:, None]
    line = start[:, None] * (1 - t) + end[:, None] * t  # [N, 25, 2]
    line[..., 1] -= BULGE * length * (4 * t * (1 - t))[..., 0]
    return list(line)


def _spread(n: int, shown: int) -> NDArray[np.int64]:
    """Return the indices of at most `shown` of `n` matches (sorted by similarity) to draw.

    They are the most similar ones, or evenly spaced ones if `shown` is more than TOP.
    """
    return (
        np.arange(min(n, shown))
        if shown <= TOP
        else np.unique(np.linspace(0, n - 1, min(n, shown)).round().astype(int))
    )


def _image(axes: Axes, pixels: NDArray) -> None:
    axes.imshow(pixels, interpolation="nearest")
    axes.set_axis_off()


def _stretched(values: NDArray, height: int, width: int) -> NDArray:
    """Enlarge a map [H, W, …] to [height, width, …] without interpolation: every cell becomes a block."""
    rows = np.arange(height) * values.shape[0] // height
    return values[rows][:, np.arange(width) * values.shape[1] // width]


def _short(key: str) -> str:
    return key if len(key) <= 28 else "…" + key[-27:]
