"""Reading the YAML list of data sets for `evaluate transfer`, and CSV label files for images with several labels."""

import csv
import math
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor

from esvit_scale.data.decode import EXTENSIONS
from esvit_scale.errors import UserError, nearest
from esvit_scale.evaluate.metrics import METRICS

SHIPPED = ("elevater",)
PATHS = ("train", "test", "val", "labels")
NAMED_VALUES = {"true": 1.0, "yes": 1.0, "false": 0.0, "no": 0.0} | dict.fromkeys(
    ("", "nan", "na", "n/a", "null"), math.nan
)


class Dataset(NamedTuple):
    """An entry of the list for `evaluate transfer`: a data set's folders or shard sets, its metric and label file."""

    name: str
    train: Path
    test: Path
    metric: str  # a key of METRICS
    val: Path | None = None  # set on which the penalty is selected; None holds out a part of train
    labels: Path | None = None  # CSV file, for metrics of images with several labels
    prompts: tuple[str, ...] = ()  # texts with {} in the place of a class's name, for zero-shot; empty: the usual one


def read_list(source: Path, root: Path | None = None) -> list[Dataset]:
    """Read a list of data sets from a YAML file, or a shipped list by its name.

    Relative paths in the list refer to `root` if it is given, else to the `root` in the list, else to the list's
    folder.

    Raises:
        UserError: the list does not exist, or an entry is malformed; the message says which one and what is expected.
    """
    content = _load(source)
    where = str(source)
    _reject_unknown_keys(where, content, ("root", "datasets"))
    own = content.get("root")
    base = Path(root or own or source.parent)
    if root is None and own and not base.is_absolute():
        base = source.parent / base
    if source.name in SHIPPED and not source.exists() and not (root or own):
        raise UserError(f"{source}: its paths are relative; name the folder of the data sets with --root DIR")
    entries = content.get("datasets")
    if not isinstance(entries, dict) or not entries:
        raise UserError(f"{where}: datasets: expected NAME: {{train: …, test: …, metric: …}} for each data set")
    return [_dataset(f"{where}: {name}", str(name), entry, base) for name, entry in entries.items()]


def read_labels(path: Path) -> tuple[tuple[str, ...], dict[str, list[float]]]:
    """Read a CSV label file with the header `image,CLASS,CLASS,…` and one line per image.

    Return the names of the classes, and for each image a row of 1 (present), 0 (absent) or NaN (unknown). An image is
    named by its path in the folder or its key in the shards, with or without the extension; the result has no
    extensions.

    Raises:
        UserError: the file cannot be read, a cell is not 1, 0 or empty, a line has another length than the header, or
            an image is named twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None
    header, *lines = list(csv.reader(text.splitlines())) or [[]]
    if len(header) < 2:
        raise UserError(f"{path}: line 1: expected the header image,CLASS,CLASS,…")
    rows: dict[str, list[float]] = {}
    for number, line in enumerate(lines, 2):
        if not line:
            continue
        if len(line) != len(header):
            raise UserError(f"{path}: line {number}: {len(line)} cells, the header has {len(header)}")
        values = [_parse_cell(cell) for cell in line[1:]]
        wrong = next((cell for cell, value in zip(line[1:], values, strict=True) if value is None), None)
        if wrong is not None:
            hint = " (0 means absent; leave the cell empty if unknown)" if wrong.strip() in ("-1", "-1.0") else ""
            raise UserError(f"{path}: line {number}: {wrong!r} is not 1, 0 or empty{hint}")
        key = without_extension(line[0].strip())
        if key in rows:
            raise UserError(f"{path}: line {number}: {line[0]} is named a second time; remove one of the lines")
        rows[key] = [value for value in values if value is not None]
    return tuple(name.strip() for name in header[1:]), rows


def _parse_cell(cell: str) -> float | None:
    """Parse a cell of a label file: return 1, 0 or NaN (unknown), or None for a cell that is none of these.

    Besides 1, 0 and the empty cell, floats and booleans as pandas writes them, and yes and no, are accepted.
    """
    text = cell.strip().lower()
    if text in NAMED_VALUES:
        return NAMED_VALUES[text]
    try:
        value = float(text)
    except ValueError:
        return None
    return value if value in (0.0, 1.0) else None


def targets_of(keys: list[str], rows: dict[str, list[float]], labels: Path, source: Path) -> Tensor:
    """Look up the labels of N images and return them as targets: float32 [N, K] with 1, 0 and NaN (unknown).

    Args:
        keys: keys of the images.
        rows: rows of the label file, from `read_labels`.
        labels, source: the label file and the data set, for messages.

    Raises:
        UserError: an image has no line in the label file.
    """
    names = [without_extension(key) for key in keys]
    missing = [key for key, name in zip(keys, names, strict=True) if name not in rows]
    if missing:
        raise UserError(f"{labels}: no line for {len(missing)} of {len(keys)} images of {source} (first: {missing[0]})")
    return torch.tensor([rows[name] for name in names])


def without_extension(name: str) -> str:
    """Return a file name without its extension if that is the extension of an image format, else unchanged."""
    stem, dot, ext = name.rpartition(".")
    return stem if dot and ext.lower() in EXTENSIONS else name


def _load(source: Path) -> dict[str, Any]:
    if source.name in SHIPPED and not source.exists():
        text = (resources.files("esvit_scale") / "evaluate" / f"{source.name}.yaml").read_text(encoding="utf-8")
    else:
        try:
            text = source.read_text(encoding="utf-8")
        except OSError as error:
            hint = nearest(str(source), SHIPPED)
            raise UserError(
                f"{source}: {error.strerror}; expected a YAML file or the name of a shipped list{hint}"
            ) from None
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{source}: expected the keys root and datasets")
    return content


def _dataset(where: str, name: str, entry: Any, base: Path) -> Dataset:
    if not isinstance(entry, dict):
        raise UserError(f"{where}: expected {{train: …, test: …, metric: …}}, got {entry!r}")
    if "/" in name or name.startswith("."):
        raise UserError(f"{where}: the name becomes the name of a file; use letters, digits, - and _")
    _reject_unknown_keys(where, entry, (*PATHS, "metric", "prompts"))
    missing = [key for key in ("train", "test", "metric") if not entry.get(key)]
    if missing:
        raise UserError(f"{where}: missing {' and '.join(missing)}")
    metric = str(entry["metric"])
    if metric not in METRICS:
        raise UserError(f"{where}: unknown metric {metric!r}{nearest(metric, METRICS)}")
    if METRICS[metric].multi_label != bool(entry.get("labels")):
        what = "needs labels: FILE.csv" if METRICS[metric].multi_label else "takes its labels from the class folders"
        raise UserError(f"{where}: the metric {metric} {what}")
    paths = {key: base / str(entry[key]) for key in PATHS if entry.get(key)}
    prompts = entry.get("prompts", [])
    wrong = [p for p in prompts if not isinstance(p, str) or "{}" not in p] if isinstance(prompts, list) else [prompts]
    if wrong:
        raise UserError(
            f'{where}: prompts: expected a list of texts with {{}}, such as ["a photo of a {{}}."], got {wrong[0]!r}'
        )
    return Dataset(name, metric=metric, prompts=tuple(prompts), **paths)


def _reject_unknown_keys(where: str, entry: dict[str, Any], known: tuple[str, ...]) -> None:
    for key in entry:
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}{nearest(str(key), known)}")
