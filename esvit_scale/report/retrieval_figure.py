"""The figure of a retrieval evaluation: queries and the images that are nearest to them."""

from pathlib import Path
from typing import Any

from esvit_scale import files
from esvit_scale.report import picture_grid
from esvit_scale.report.evaluation_figures import BAD, GOOD
from esvit_scale.report.picture_grid import Tile
from esvit_scale.report.sample_images import images_by_key


def write(result: dict[str, Any], data: Path, queries: Path | None, out: Path) -> Path:
    """Draw the example queries of a retrieval.json and write retrieval.png to the folder `out`; return its path.

    Each row has a query, then the nearest images, framed in green if they are relevant, else in red.

    Args:
        data, queries: where the images that were searched, and the queries, lie now.
    """
    examples = result["examples"]
    asked = images_by_key(queries or data, {row["key"] for row in examples})
    found = images_by_key(data, {near["key"] for row in examples for near in row["neighbours"]})
    rows = [
        [
            Tile(asked[row["key"]], f"query: {row['class']}"),
            *(Tile(found[n["key"]], n["class"], GOOD if n["right"] else BAD) for n in row["neighbours"]),
        ]
        for row in examples
    ]
    path = out / "retrieval.png"
    files.write_bytes(path, picture_grid.draw(rows))
    return path
