"""ImageNet's train/ and val/ as a source: with class folders in both, or in Kaggle's layout, where val/ is flat."""

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from esvit_scale.data import left_out
from esvit_scale.data.image_folder import walk
from esvit_scale.data.left_out import NO_PATH, ROWS, LeftOut
from esvit_scale.data.sources.base import Source, count_beside, is_image
from esvit_scale.data.sources.folder import FolderSource
from esvit_scale.data.sources.listing import PathSource
from esvit_scale.errors import UserError

KAGGLE_ANSWERS = "LOC_val_solution.csv"  # ImageId, "wnid x y x y …"


def imagenet_sources(root: Path, label: str | None, classes: Sequence[str] | None) -> dict[str, Source]:
    """Return the sources `train` and `val`, both with train's classes (none with label `none`).

    Files outside train/ and val/ are counted as left out.

    Raises:
        UserError: train/ or val/ is missing, or val/ is flat and no file says its classes.
    """
    base = next((root / part for part in ("Data/CLS-LOC", "") if (root / part / "train").is_dir()), None)
    if base is None or not (base / "val").is_dir():
        raise UserError(
            f"{root}: does not have ImageNet's layout: train/ and val/ (or Data/CLS-LOC/ with both) are needed"
        )
    sources, answers = _splits(root, base, label, classes)
    used = [base / "train", base / "val", *([answers] if answers else [])]
    skip = {path.relative_to(root).as_posix() for path in used}
    count_beside(root, sources["train"].left_out, left_out.BESIDE_SPLITS, skip)
    return sources


def _splits(
    root: Path, base: Path, label: str | None, classes: Sequence[str] | None
) -> tuple[dict[str, Source], Path | None]:
    """Return the sources `train` and `val` below `base`, and the file with the classes of a flat val/ if it is used."""
    if label == "none":
        return {part: FolderSource(base / part, "none") for part in ("train", "val")}, None
    train = FolderSource(base / "train", label, classes)
    if not train.classes:
        raise UserError(f"{base / 'train'}: images lie directly in it; ImageNet has a folder per class there")
    if any(p.is_dir() and not p.name.startswith(".") for p in (base / "val").iterdir()):
        return {"train": train, "val": FolderSource(base / "val", label, train.classes)}, None
    answers = next((p for p in (root / KAGGLE_ANSWERS, base / KAGGLE_ANSWERS) if p.is_file()), None)
    if answers is None:
        raise UserError(
            f"{base / 'val'}: has no class folders, and there is no {KAGGLE_ANSWERS} in {root} with its classes; put that "
            "file there, or sort the images into class folders"
        )
    return {"train": train, "val": _flat(base / "val", answers, train.classes)}, answers


def _flat(val: Path, answers: Path, classes: Sequence[str]) -> PathSource:
    """Return a source of the images in a flat val/ that the file `answers` names; count the others as left out."""
    rows_left = LeftOut()
    files = {path.rpartition(".")[0]: path for path in sorted(walk(val, LeftOut())) if is_image(path)}
    source = PathSource(_answers(answers, files, rows_left), val, classes)
    named = {source.name(i) for i in range(len(source))}
    count_beside(val, source.left_out, f"not named in {KAGGLE_ANSWERS}", named)
    source.left_out.update(rows_left)
    return source


def _answers(path: Path, files: Mapping[str, str], left: LeftOut) -> Iterator[list[str | None]]:
    """Yield [path in val/, class name, None] for each row of the file of answers at `path`.

    Args:
        files: the image files of val/ by their names without extension.
        left: counts rows without a name or class.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        numbered = [(row, number) for number, row in enumerate(csv.reader(file), 1) if row and row[0] != "ImageId"]
    for row, number in sorted(numbered):
        if len(row) < 2 or not row[0]:
            left.add(ROWS, NO_PATH, f"{path.name}: line {number}")
            continue
        yield [files.get(row[0], f"{row[0]}.JPEG"), row[1].split(" ", 1)[0], None]
