"""The figure of a copy detection evaluation: copies, and the images that are nearest to them."""

from pathlib import Path

from esvit_scale import files
from esvit_scale.evaluate.copies import CopyResult
from esvit_scale.report import picture_grid
from esvit_scale.report.evaluation_figures import BAD, GOOD
from esvit_scale.report.picture_grid import Tile


def write(result: CopyResult, out: Path) -> Path:
    """Write copies.png to the folder `out` and return its path: the original is framed in green, other images in red."""
    rows = [
        [
            Tile(e.picture, f"copy of {e.key.rpartition('/')[2]}"),
            *(Tile(picture, key.rpartition("/")[2], GOOD if right else BAD) for key, picture, right in e.nearest),
        ]
        for e in result.examples
    ]
    path = out / "copies.png"
    files.write_bytes(path, picture_grid.draw(rows))
    return path
