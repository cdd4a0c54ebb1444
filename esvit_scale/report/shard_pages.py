"""Pictures of a shard set: a figure of its statistics, and contact sheets of its images (PNG or HTML)."""

import html
import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw

from esvit_scale.data.decode import BadImage, decode
from esvit_scale.data.manifest import Manifest
from esvit_scale.data.order import permutation
from esvit_scale.data.picture import open_picture
from esvit_scale.data.pixel_format import PixelFormat
from esvit_scale.data.reader import ShardReader
from esvit_scale.data.shard_stats import Stats
from esvit_scale.report.false_colour import composite
from esvit_scale.report.sample_images import enlarged, thumbnail

SIDE, MARGIN, CAPTION = 160, 8, 26  # pixels of a contact sheet's cell
BLUE, GREY = "#3b82f6", "#80868f"


class ShownSample(NamedTuple):
    """A sample on a contact sheet."""

    key: str
    label: str  # name of its class; "" without classes
    image: Image.Image | None  # None if it cannot be decoded


def overview(stats: Stats) -> bytes:
    """Draw a set's statistics as PNG: file sizes, short sides of images, samples per class (else per shard)."""
    figure = Figure(figsize=(10.4, 2.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    _histogram(left, stats.image_bytes / 1000, "kB per image")
    _histogram(middle, stats.sides.min(1) if len(stats.sides) else np.empty(0), "short side, pixels")
    if len(stats.class_counts):
        _sorted(right, stats.class_counts, f"samples per class, {len(stats.classes):,} classes")
    else:
        _sorted(right, stats.shard_samples, f"samples per shard, {len(stats.shard_samples):,} shards")
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def draw_samples(manifest: Manifest, count: int, seed: int, bands: Sequence[int] | None = None) -> list[ShownSample]:
    """Return `count` random samples of a set, or all if it has fewer. `bands` is as in `false_colour.composite`."""
    starts = np.cumsum([0, *manifest.shards.samples])
    reader, shown = ShardReader(manifest), []
    try:
        for number in permutation(manifest.samples, seed, "show")[:count].tolist():
            shard = int(np.searchsorted(starts, number, side="right")) - 1
            shown.append(_shown(manifest, reader, shard, number - int(starts[shard]), bands))
    finally:
        reader.close()
    return shown


def contact_sheet(shown: Sequence[ShownSample], columns: int = 8) -> bytes:
    """Draw thumbnails in rows, with key and class under each, as PNG."""
    columns = min(columns, len(shown))
    rows = -(-len(shown) // columns)
    step_x, step_y = SIDE + MARGIN, SIDE + CAPTION + MARGIN
    sheet = Image.new("RGB", (columns * step_x + MARGIN, rows * step_y + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for at, sample in enumerate(shown):
        x, y = MARGIN + at % columns * step_x, MARGIN + at // columns * step_y
        if sample.image is None:
            draw.rectangle((x, y, x + SIDE, y + SIDE), outline="red")
        else:
            small = enlarged(sample.image, SIDE).copy()
            small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
            sheet.paste(small, (x + (SIDE - small.width) // 2, y + (SIDE - small.height) // 2))
        for line, text in enumerate((sample.key[-26:], sample.label)):
            draw.text((x, y + SIDE + 1 + 12 * line), _plain(text)[:26], fill="black")
    out = io.BytesIO()
    sheet.save(out, "PNG")
    return out.getvalue()


def contact_page(shown: Sequence[ShownSample], title: str) -> str:
    """Return a contact sheet as a self-contained HTML page: thumbnails with key and class under each."""
    cells = "\n".join(
        f"<figure>{_img(sample)}<figcaption>{html.escape(sample.key)}<br><b>{html.escape(sample.label)}</b></figcaption></figure>"
        for sample in shown
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        "<style>body{font:13px system-ui;margin:1.5em}main{display:flex;flex-wrap:wrap;gap:.7em}"
        "figure{margin:0;width:208px;overflow-wrap:anywhere}img{max-width:100%}img.small{image-rendering:pixelated}</style>"
        f"<h1>{html.escape(title)}</h1><main>\n{cells}\n</main></html>\n"
    )


def _img(sample: ShownSample) -> str:
    if sample.image is None:
        return "<p>does not decode</p>"
    shown = thumbnail(sample.image, SIDE)
    small = f' class="small" style="width: {shown.width}px"' if shown.width else ""
    return f'<img{small} src="{shown.uri}" alt="{html.escape(sample.key)}, {shown.size}">'


def _shown(manifest: Manifest, reader: ShardReader, shard: int, i: int, bands: Sequence[int] | None) -> ShownSample:
    key, label = f"{manifest.shards[shard].name}: sample {i}", ""
    try:
        entry = reader.entry(shard, i)
        key, number = entry.key, reader.label(shard, entry)
        label = manifest.classes[number] if 0 <= number < len(manifest.classes) else ""
        data = reader.image(shard, entry)
        if (manifest.channels, manifest.bits) == (3, 8) and bands is None:
            return ShownSample(key, label, decode(data))
        pixels, _ = open_picture(data, PixelFormat(manifest.channels, manifest.bits)).pixels()
        return ShownSample(key, label, composite(pixels, bands, stretch=manifest.bits == 16))
    except (BadImage, OSError):
        return ShownSample(key, label, None)


def _histogram(axes: Axes, values: np.ndarray, title: str) -> None:
    _style(axes, title)
    if len(values):
        axes.hist(values, bins=40, color=BLUE)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def _sorted(axes: Axes, counts: np.ndarray, title: str) -> None:
    _style(axes, title)
    axes.fill_between(np.arange(len(counts)), np.sort(counts)[::-1], color=BLUE, step="mid")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=10, loc="left", color=GREY)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=GREY, labelsize=8)


def _plain(text: str) -> str:
    return text.encode("latin-1", "replace").decode("latin-1")  # the built-in font has only these letters
