"""The figure of a label propagation: frames of videos with their true and propagated objects."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from esvit_scale import files
from esvit_scale.data.videos import VOID, Mask
from esvit_scale.evaluate.video import VideoResult
from esvit_scale.report import picture_grid
from esvit_scale.report.picture_grid import Tile
from esvit_scale.report.segmentation_figure import colour

OPACITY = 0.6  # of an object's colour over the frame


def write(result: VideoResult, out: Path) -> Path:
    """Write video.png to the folder `out` and return its path.

    A row for each video: its first frame with the given mask, then the middle and the last counted frame, each with the
    true and with the propagated objects.
    """
    rows = []
    for e in result.examples:
        tiles = [Tile(_coloured(e.pictures[0], e.truths[0]), f"{e.name}: given")]
        for when, picture, truth, predicted in zip(
            ("middle", "end"), e.pictures[1:], e.truths[1:], e.predictions[1:], strict=False
        ):
            tiles += [
                Tile(_coloured(picture, truth), f"{when}, true"),
                Tile(_coloured(picture, predicted), f"{when}, propagated"),
            ]
        rows.append(tiles)
    path = out / "video.png"
    files.write_bytes(path, picture_grid.draw(rows, side=180))
    return path


def _coloured(picture: NDArray[np.uint8], mask: Mask) -> Image.Image:
    found = picture.astype(np.float32)
    for number in np.unique(mask).tolist():
        if number not in (0, VOID):
            own = mask == number
            found[own] = (1 - OPACITY) * found[own] + OPACITY * np.array(colour(number))
    return Image.fromarray(found.round().astype(np.uint8))
