"""Reading published scores of transfer from a CSV file, one score in a line.

    model,dataset,setting,score,source
    CLIP ViT-B/32,pets,zero-shot,87.0,ELEVATER table 8
    EsViT Swin-T,mean of 18,full,80.99,EsViT table 4

`dataset` is a name in the list of data sets, or `mean of N`. `source` is optional. Such scores are other people's
measurements, of another protocol: they are shown, marked as published, and never enter a mean of ours.
"""

import csv
import math
import re
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from esvit_scale.errors import UserError, nearest

REQUIRED = ("model", "dataset", "setting", "score")
COLUMNS = (*REQUIRED, "source")
FULL, ZERO_SHOT = "full", "zero-shot"
MEAN = re.compile(r"mean of \d+")


class PublishedScore(NamedTuple):
    """A score in percent that somebody published."""

    model: str
    dataset: str  # a name in the list, or "mean of N"
    setting: str  # "full", "zero-shot" or "N-shot"
    score: float
    source: str = ""


def read(path: Path, datasets: Collection[str]) -> list[PublishedScore]:
    """Return the scores in a CSV file, in its order.

    Args:
        datasets: the names in the list of data sets.

    Raises:
        UserError: the file cannot be read, a column or data set is unknown, a setting or score is malformed, or a score
            is given twice. The message names the line and the nearest right value.
    """
    try:
        lines = list(csv.reader(path.read_text(encoding="utf-8-sig").splitlines()))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error):
        raise UserError(f"{path}: not a CSV file in UTF-8") from None
    header = [cell.strip() for cell in lines[0]] if lines else []
    for name in header:
        if name not in COLUMNS:
            raise UserError(f"{path}: line 1: unknown column {name!r}{nearest(name, COLUMNS)}")
    missing = [name for name in REQUIRED if name not in header]
    if missing:
        raise UserError(f"{path}: line 1: missing {', '.join(missing)}; expected the header {','.join(COLUMNS)}")
    found: dict[tuple[str, str, str], PublishedScore] = {}
    for number, line in enumerate(lines[1:], 2):
        if not line:
            continue
        if len(line) != len(header):
            raise UserError(f"{path}: line {number}: {len(line)} cells, the header has {len(header)}")
        row = _row(f"{path}: line {number}", dict(zip(header, map(str.strip, line), strict=True)), datasets)
        if row[:3] in found:
            raise UserError(
                f"{path}: line {number}: {', '.join(row[:3])} is given a second time; remove one of the lines"
            )
        found[row[:3]] = row
    return list(found.values())


def _row(where: str, cells: dict[str, str], datasets: Collection[str]) -> PublishedScore:
    dataset, setting = cells["dataset"], cells["setting"]
    if not cells["model"]:
        raise UserError(f"{where}: model is empty")
    if dataset not in datasets and not MEAN.fullmatch(dataset):
        raise UserError(f"{where}: {dataset!r} is no data set of the list{nearest(dataset, [*datasets, 'mean of N'])}")
    if setting not in (FULL, ZERO_SHOT) and not re.fullmatch(r"[1-9]\d*-shot", setting):
        raise UserError(
            f"{where}: unknown setting {setting!r}{nearest(setting, (FULL, ZERO_SHOT, '5-shot', '20-shot', '50-shot'))}"
        )
    try:
        score = float(cells["score"])
    except ValueError:
        score = math.nan
    if not 0 <= score <= 100:
        raise UserError(f"{where}: score {cells['score']!r} is no percentage from 0 to 100, such as 80.99")
    return PublishedScore(cells["model"], dataset, setting, score, cells.get("source", ""))
