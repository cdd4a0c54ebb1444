"""The figure of a depth evaluation: images, their depth, and the predicted depth."""

from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

from esvit_scale import files
from esvit_scale.data.depth_maps import Depth
from esvit_scale.evaluate.depth import DepthResult
from esvit_scale.report import picture_grid
from esvit_scale.report.picture_grid import Tile

COLOURS = "viridis"  # of matplotlib; dark is near


def write(result: DepthResult, out: Path) -> Path:
    """Write depth.png to the folder `out` and return its path: both maps in the colours of the image's true range."""
    rows = []
    for e in result.examples:
        known = e.truth > 0
        near, far = (float(x) for x in np.percentile(e.truth[known], [2, 98])) if known.any() else (0.0, 1.0)
        rows.append(
            [
                Tile(Image.fromarray(e.picture), e.key.rpartition("/")[2]),
                Tile(_coloured(e.truth, near, far), f"depth, {near:.1f} to {far:.1f} m"),
                Tile(_coloured(e.predicted, near, far), "predicted"),
            ]
        )
    path = out / "depth.png"
    files.write_bytes(path, picture_grid.draw(rows, side=200))
    return path


def _coloured(depth: Depth, near: float, far: float) -> Image.Image:
    """Return a map in colours from `near` to `far`; pixels without depth are transparent."""
    share = (depth - near) / max(far - near, 1e-6)
    colours = (matplotlib.colormaps[COLOURS](share.clip(0, 1)) * 255).round().astype(np.uint8)
    colours[..., 3] = np.where(depth > 0, 255, 0)
    return Image.fromarray(colours)
