"""A grid of small pictures with titles, as PNG bytes; much faster than one axes for each picture would be."""

import io
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from esvit_scale.report.plots import GREY
from esvit_scale.report.sample_images import SMALL_SIDE

TITLE, GAP, FRAME = 22, 10, 4  # pixels: height of a title, space between tiles, width of a frame
TITLE_SIZE = 14  # of the letters


class Tile(NamedTuple):
    """A picture of the grid."""

    image: Image.Image  # RGB or RGBA
    title: str
    frame: str | None = None  # colour


def draw(rows: Sequence[Sequence[Tile]], side: int = 150, heights: Sequence[int] | None = None) -> bytes:
    """Return a PNG of the tiles, each fitted into a square of `side` pixels; small pictures are enlarged pixel by pixel.

    The background is transparent.

    Args:
        heights: height in pixels of every row's tiles; None: `side`.
    """
    columns, heights = max(map(len, rows)), heights or [side] * len(rows)
    width, height = columns * (side + GAP) + GAP, sum(heights) + len(rows) * (TITLE + GAP) + GAP
    sheet = Image.new("RGBA", (width, height), (0, 0, 0, 0))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(TITLE_SIZE)
    top = GAP
    for row, tall in zip(rows, heights, strict=True):
        for x, tile in enumerate(row):
            left = GAP + x * (side + GAP)
            pen.text((left, top), _fitted(tile.title, font, side), fill=GREY, font=font)
            picture = _fit(tile.image.convert("RGBA"), side - 2 * FRAME, tall - 2 * FRAME)
            at = left + (side - picture.width) // 2, top + TITLE + (tall - picture.height) // 2
            if tile.frame is not None:
                box = (at[0] - FRAME, at[1] - FRAME, at[0] + picture.width + FRAME, at[1] + picture.height + FRAME)
                pen.rectangle(box, fill=tile.frame)
            sheet.paste(picture, at)
        top += tall + TITLE + GAP
    out = io.BytesIO()
    sheet.save(out, "PNG")
    return out.getvalue()


def _fit(image: Image.Image, width: int, height: int) -> Image.Image:
    scale = min(width / image.width, height / image.height)
    if max(image.size) <= SMALL_SIDE and scale >= 1:
        return image.resize((image.width * int(scale), image.height * int(scale)), Image.Resampling.NEAREST)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.BICUBIC)


def _fitted(text: str, font: "ImageFont.ImageFont | ImageFont.FreeTypeFont", width: int) -> str:
    """Return the text, shortened until it fits."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
