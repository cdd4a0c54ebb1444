"""ImageNet's train/ and val/ as they come: class folders in both, or Kaggle's layout, where val/ is flat."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from esvit_scale.data.sources.base import Source
from esvit_scale.data.sources.folder import FolderSource
from esvit_scale.data.sources.listing import PathSource
from esvit_scale.errors import UserError

KAGGLE_ANSWERS = "LOC_val_solution.csv"  # ImageId, "wnid x y x y …"


def imagenet_sources(root: Path, label: str | None, classes: Sequence[str] | None) -> dict[str, Source]:
    """`train` and `val`, with train's classes in both; without classes with label `none`.

    Raises:
        UserError: train/ or val/ is missing, or val/ is flat and nothing says its classes.
    """
    base = next((root / part for part in ("Data/CLS-LOC", "") if (root / part / "train").is_dir()), None)
    if base is None or not (base / "val").is_dir():
        raise UserError(f"{root}: not ImageNet's layout: train/ and val/ (or Data/CLS-LOC/ with both) are needed")
    if label == "none":
        return {part: FolderSource(base / part, "none") for part in ("train", "val")}
    train = FolderSource(base / "train", label, classes)
    if not train.classes:
        raise UserError(f"{base / 'train'}: images lie directly in it; ImageNet has a folder per class there")
    if any(p.is_dir() and not p.name.startswith(".") for p in (base / "val").iterdir()):
        return {"train": train, "val": FolderSource(base / "val", label, train.classes)}
    answers = next((p for p in (root / KAGGLE_ANSWERS, base / KAGGLE_ANSWERS) if p.is_file()), None)
    if answers is None:
        raise UserError(
            f"{base / 'val'}: flat, and no {KAGGLE_ANSWERS} in {root} says its classes; put that file there, or sort the "
            "images into class folders"
        )
    return {"train": train, "val": PathSource(_answers(answers), base / "val", train.classes)}


def _answers(path: Path) -> Iterator[list[str | None]]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.reader(file) if len(row) >= 2 and row[0] != "ImageId"]
    for image, answer, *_ in sorted(rows):
        yield [f"{image}.JPEG", answer.split(" ", 1)[0], None]
