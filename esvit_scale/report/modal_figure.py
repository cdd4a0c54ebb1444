"""The figure of `evaluate attention` on samples of several modalities, as PNG bytes.

A sample has a row for each modality: what the trunk reads of it, and beside it a map for each attention head of the last
block, over patches of the picture, stretches of the spectrogram or waveform, tubes of the video, or characters of the text.
"""

import warnings
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.gridspec import GridSpecFromSubplotSpec
from numpy.typing import NDArray

from esvit_scale import files
from esvit_scale.config import Config
from esvit_scale.data.pixel_format import PixelFormat, pixel_format
from esvit_scale.data.signals import video_pixels
from esvit_scale.evaluate.modal_attention import Attended, ModalAttention
from esvit_scale.models.modal import ModalTrunk
from esvit_scale.models.modal_tokens import (
    PATCH_FRAMES,
    TUBE_FRAMES,
    ImageTokens,
    SpectrogramTokens,
    TubeTokens,
    WaveformTokens,
)
from esvit_scale.report.plots import GREY, blank_figure, png
from esvit_scale.report.sample_images import unnormalized

WIDTH = 10.4  # inches
HEADS_SHOWN = 8  # largest number of heads that are drawn
TITLE = 0.32  # inches above a row
LOWEST, HIGHEST = 0.4, 2.6  # inches that a row may have
SOUND = 0.4  # height of a sound's panel as a multiple of its width
WAVE_HEIGHT, WAVE_WIDTH = 64, 4  # pixels: height of a waveform, and width of one of its tokens
LINE, LONGEST = 20, 240  # characters of a text in one line, and in all, that are drawn
CHARACTER = (12, 7)  # height and width of a character's cell, in units of its panel
TOKENS = {"image": "patches", "audio": "stretches", "video": "tubes", "text": "bytes"}


class Drawing(NamedTuple):
    """What one modality of a sample looks like, and the maps that lie on it."""

    pixels: NDArray[np.uint8] | None  # [H, W] grey or [H, W, 3]; None for text
    cell: tuple[int, int]  # height and width in pixels of a cell of a map
    maps: NDArray[np.float64]  # [heads, rows, columns] of the last block; NaN for a cell without a token
    aspect: float | None  # height of the panel as a multiple of its width; None: that of the pixels
    text: str = ""  # characters to write into the cells, LINE to a row


def write(seen: ModalAttention, out: Path) -> Path:
    """Write attention.png to the folder `out`; return its path."""
    path = out / "attention.png"
    files.write_bytes(path, attention(seen))
    return path


def attention(seen: ModalAttention) -> bytes:
    """Draw what the aggregation token of every modality of every sample attends to in the last block."""
    rows = [
        (f"{sample.key} · {one.modality}" if not i else one.modality, drawing(seen.config, seen.trunk, one), one)
        for sample in seen.samples
        for i, one in enumerate(sample.attended)
    ]
    columns = 1 + min(HEADS_SHOWN, max(len(drawn.maps) for _, drawn, _ in rows))
    heights = [float(np.clip(WIDTH / columns * _aspect(drawn), LOWEST, HIGHEST)) for _, drawn, _ in rows]
    figure = blank_figure(WIDTH, sum(heights) + TITLE * len(rows))
    grid = figure.add_gridspec(len(rows), 1, height_ratios=[height + TITLE for height in heights])
    for row, (name, drawn, one) in enumerate(rows):
        places = GridSpecFromSubplotSpec(1, columns, grid[row])
        panels = [figure.add_subplot(places[column]) for column in range(columns)]
        heads = f"{len(drawn.maps)} head{'s' if len(drawn.maps) > 1 else ''}"
        more = f", {HEADS_SHOWN} shown" if len(drawn.maps) > HEADS_SHOWN else ""
        title = f"{name} · {one.attention[0, 0].size} {TOKENS[one.modality]} · {heads}{more}"
        panels[0].set_title(title, color=GREY, fontsize=8.5, loc="left", parse_math=False)
        for axes in panels:
            axes.set_axis_off()
        _panel(panels[0], drawn, None)
        for axes, of_head in zip(panels[1:], drawn.maps, strict=False):
            _panel(axes, drawn, of_head)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # of scripts that the font lacks
        return png(figure)


def _aspect(drawn: Drawing) -> float:
    """Return the height of a panel as a multiple of its width."""
    height, width = _size(drawn)
    return drawn.aspect or height / width


def _size(drawn: Drawing) -> tuple[int, int]:
    """Return height and width of a panel in pixels, or in units of its characters' cells."""
    if drawn.pixels is not None:
        return drawn.pixels.shape[0], drawn.pixels.shape[1]
    return drawn.maps.shape[1] * drawn.cell[0], drawn.maps.shape[2] * drawn.cell[1]


def _panel(axes: Axes, drawn: Drawing, values: NDArray[np.float64] | None) -> None:
    """Draw what the trunk reads, with one head's map [rows, columns] over it."""
    height, width = _size(drawn)
    top = 1.0
    if drawn.pixels is not None:
        grey = values is not None and drawn.pixels.ndim == 3
        pixels = drawn.pixels @ np.array([0.299, 0.587, 0.114]) if grey else drawn.pixels
        axes.imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    if values is not None:
        top = max(float(np.nanquantile(values, 0.99)), float(np.nanmean(values)))
        over = values.repeat(drawn.cell[0], 0).repeat(drawn.cell[1], 1)[:height, :width]
        alpha = 1.0 if drawn.pixels is None else 0.66
        axes.imshow(over, cmap="magma", vmin=0, vmax=top, alpha=alpha, interpolation="nearest")
    for i, character in enumerate(drawn.text):
        y, x = divmod(i, LINE)
        colour = GREY if values is None else "white" if values[y, x] < 0.6 * top else "black"
        at = (x + 0.5) * drawn.cell[1] - 0.5, (y + 0.5) * drawn.cell[0] - 0.5
        how = {"fontsize": 7, "ha": "center", "va": "center", "family": "monospace", "parse_math": False}
        axes.text(*at, character, color=colour, **how)  # type: ignore[arg-type]
    axes.set_xlim(-0.5, width - 0.5)
    axes.set_ylim(height - 0.5, -0.5)
    axes.set_aspect("auto" if drawn.aspect else "equal", anchor="NW")


def drawing(config: Config, trunk: ModalTrunk, one: Attended) -> Drawing:
    """Return what is drawn of one modality of a sample."""
    embed, maps = trunk.embed[one.modality], one.attention[-1]
    if one.modality == "image":
        patch = cast(ImageTokens, embed).patch
        return Drawing(_rgb(one, pixel_format(config.data)), (patch, patch), maps, None)
    if one.modality == "audio":
        if isinstance(embed, SpectrogramTokens):
            pixels = _spectrogram(embed, one)
            return Drawing(pixels, (len(pixels), PATCH_FRAMES), maps[:, None], SOUND)
        return Drawing(_waveform(cast(WaveformTokens, embed), one), (WAVE_HEIGHT, WAVE_WIDTH), maps[:, None], SOUND)
    if one.modality == "video":
        return _sheet(cast(TubeTokens, embed), one, video_pixels(config.data))
    return _text(one)


def _rgb(one: Attended, pixels: PixelFormat) -> NDArray[np.uint8]:
    return np.asarray(unnormalized(one.values, pixels))


def _spectrogram(embed: SpectrogramTokens, one: Attended) -> NDArray[np.uint8]:
    """Return the log-mel spectrogram of what there is of a sound, low bands at the bottom, black to white."""
    frames = -(-one.length // embed.hop)
    logs = embed.spectrogram(one.values[None].cpu(), torch.tensor([frames]))[0, :frames].numpy().T[::-1]
    low, high = np.quantile(logs, [0.02, 0.98])
    return (255 * ((logs - low) / max(high - low, 1e-9)).clip(0, 1)).round().astype(np.uint8)


def _waveform(embed: WaveformTokens, one: Attended) -> NDArray[np.uint8]:
    """Return a picture of a waveform: in every column, the range of its samples."""
    tokens = one.attention.shape[-1]
    padded = np.zeros(tokens * embed.patch)
    padded[: one.length] = one.values[: one.length].cpu().numpy()
    pieces = np.array_split(padded / max(float(np.abs(padded).max()), 1e-9), tokens * WAVE_WIDTH)
    at = np.linspace(1, -1, WAVE_HEIGHT)[:, None]
    low, high = (np.array([edge(piece) for piece in pieces]) for edge in (np.min, np.max))
    step = 2 / (WAVE_HEIGHT - 1)
    return np.where((at >= low - step / 2) & (at <= high + step / 2), 255, 0).astype(np.uint8)


def _sheet(embed: TubeTokens, one: Attended, pixels: PixelFormat) -> Drawing:
    """Return the first frames of a video's tubes as a sheet, and its maps arranged alike."""
    heads, steps, side, _ = (maps := one.attention[-1]).shape
    columns = int(np.ceil(np.sqrt(steps)))
    rows, wide = -(-steps // columns), side * embed.patch
    sheet = np.zeros((rows * wide, columns * wide, 3), np.uint8)
    arranged = np.full((heads, rows * side, columns * side), np.nan)
    for step in range(steps):
        y, x = divmod(step, columns)
        frame = np.asarray(unnormalized(one.values[:, step * TUBE_FRAMES], pixels))
        sheet[y * wide :, x * wide :][: frame.shape[0], : frame.shape[1]] = frame
        arranged[:, y * side : (y + 1) * side, x * side : (x + 1) * side] = maps[:, step]
    return Drawing(sheet, (embed.patch, embed.patch), arranged, None)


def _text(one: Attended) -> Drawing:
    """Return the characters of a text, and for each the mean of the maps over its bytes."""
    text = bytes((one.values[: one.length] - 1).tolist()).decode()[:LONGEST]
    ends = np.cumsum([0, *(len(character.encode()) for character in text)])
    rows = -(-len(text) // LINE)
    maps = np.full((len(one.attention[-1]), rows * LINE), np.nan)
    for i, (start, end) in enumerate(pairwise(ends)):
        maps[:, i] = one.attention[-1][:, start:end].mean(1)
    aspect = rows * CHARACTER[0] / (LINE * CHARACTER[1])
    return Drawing(None, CHARACTER, maps.reshape(len(maps), rows, LINE), aspect, text)
