"""The figure of a segmentation evaluation: images, their masks, and the predictions of every head."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from esvit_scale import files
from esvit_scale.evaluate.segmentation import Example, SegmentationResult
from esvit_scale.report import picture_grid
from esvit_scale.report.picture_grid import Tile

NAMED_CLASSES = 12  # most classes that the legend names
SWATCH = (120, 20)  # pixels
TITLES = {"linear": "linear head", "knn": "k-NN"}


def write(result: SegmentationResult, out: Path) -> Path:
    """Write segmentation.png to the folder `out` and return its path."""
    first = next(iter(result.summary["results"].values()))
    path = out / "segmentation.png"
    files.write_bytes(path, draw(result.examples, [row["class"] for row in first["per_class"]]))
    return path


def draw(examples: Sequence[Example], classes: Sequence[str]) -> bytes:
    """Draw a row for each example: image, mask and predictions; below them the colours of the most frequent classes.

    Ignored pixels are transparent in the mask.
    """
    rows = [
        [
            Tile(Image.fromarray(e.picture), e.key.rpartition("/")[2]),
            Tile(_coloured(e.truth), "mask"),
            *(Tile(_coloured(p), TITLES.get(name, name)) for name, p in e.predictions.items()),
        ]
        for e in examples
    ]
    drawn = np.concatenate([x.ravel() for e in examples for x in (e.truth, *e.predictions.values())])
    present, pixels = np.unique(drawn[drawn >= 0], return_counts=True)
    named = sorted(present[np.argsort(-pixels)][:NAMED_CLASSES].tolist())
    swatches = [Tile(Image.new("RGB", SWATCH, colour(c)), classes[c]) for c in named]
    width = len(rows[0])
    legend = [swatches[i : i + width] for i in range(0, len(swatches), width)]
    return picture_grid.draw([*rows, *legend], side=200, heights=[200] * len(rows) + [40] * len(legend))


def colour(label: int) -> tuple[int, int, int]:
    """Return the colour of a class in PASCAL VOC's palette, in which near numbers differ; class 0 is dark grey."""
    if label == 0:
        return 64, 64, 64
    red = green = blue = 0
    for bit in range(8):
        red |= (label >> 0 & 1) << 7 - bit
        green |= (label >> 1 & 1) << 7 - bit
        blue |= (label >> 2 & 1) << 7 - bit
        label >>= 3
    return red, green, blue


def _coloured(labels: NDArray[np.int32]) -> Image.Image:
    found = np.zeros((*labels.shape, 4), np.uint8)
    for label in np.unique(labels[labels >= 0]).tolist():
        found[labels == label] = (*colour(label), 255)
    return Image.fromarray(found)
