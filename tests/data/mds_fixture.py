"""The MDS data set in tests/data/mds: written once by mosaicml-streaming 0.13.0 with this file.

python -m tests.data.mds_fixture DIR
"""

import base64
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

NAMES = ("wide", "tall")


def rows() -> list[dict[str, Any]]:
    """Seven tiny pictures with numbers and texts beside them."""
    made = []
    for i in range(7):
        pixels = np.arange(8 * 6 * 3, dtype=np.uint8).reshape(6, 8, 3) * (i + 1)
        image = Image.fromarray(pixels if i % 2 == 0 else pixels.transpose(1, 0, 2).copy())
        made.append(
            {
                "picture": image,
                "pixels": image,
                "kind": NAMES[i % 2],
                "number": i % 3,
                "score": float(i),
                "words": f"no. {i}",
            }
        )
    return made


def unpack(folder: Path) -> Path:
    """Write the files that the library wrote into a new folder, and return it."""
    folder.mkdir(parents=True)
    for name, text in json.loads(Path(__file__).with_name("mds_written.json").read_text()).items():
        (folder / name).write_bytes(base64.b64decode(text))
    return folder


COLUMNS = {"picture": "png", "pixels": "pil", "kind": "str", "number": "int", "score": "float32", "words": "str"}


def write(folder: Path, **more: Any) -> None:
    """Write the rows with the real library."""
    writer = importlib.import_module("streaming.base.format.mds.writer")
    with writer.MDSWriter(out=str(folder), columns=COLUMNS, size_limit=2000, progress_bar=False, **more) as out:
        for row in rows():
            out.write(row)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
