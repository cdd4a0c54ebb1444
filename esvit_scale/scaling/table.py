"""Reading of measurements from a CSV file: named columns of numbers above 0; errors name the wrong cell in one line."""

import csv
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from esvit_scale.errors import UserError, nearest
from esvit_scale.scaling.forms import Array

SAME_BUDGET = 1.25  # sorted by cost, neighbours within this factor belong to the same budget


@dataclass(frozen=True)
class Columns:
    """The roles of a CSV's columns: inputs, measured y, cost, and grouping into runs."""

    inputs: tuple[str, ...]  # (x,) or (N, D)
    y: str
    compute: str | None = None  # FLOPs; None: x itself with one input; with two the column flops, or 6·N·D
    group: str | None = (
        None  # rows with equal values here are of one run; None: the column cell, or each row its own run
    )


@dataclass(frozen=True)
class Measurements:
    """The measurements of a CSV as arrays, one entry per row."""

    x: Array  # [n, inputs]
    y: Array  # [n]
    compute: Array  # [n]
    groups: NDArray[np.int64]  # [n] 0 … G−1

    def take(self, rows: NDArray[np.bool_]) -> "Measurements":
        """Select rows by a boolean mask [n]."""
        return Measurements(self.x[rows], self.y[rows], self.compute[rows], self.groups[rows])


def read(path: Path, columns: Columns) -> tuple[Measurements, Columns]:
    """Read a CSV; return the measurements, and `columns` with the defaults filled in by the columns that were used.

    Raises:
        UserError: there is no such file or column, a value is not a number above 0, or there are fewer than 4 rows.
    """
    names, rows = _rows(path)
    if columns.compute is None and len(columns.inputs) == 2 and "flops" in names:
        columns = replace(columns, compute="flops")
    if columns.group is None and "cell" in names:
        columns = replace(columns, group="cell")
    x = np.stack([_numbers(path, names, rows, name) for name in columns.inputs], axis=1)
    y = _numbers(path, names, rows, columns.y)
    if columns.compute is not None:
        compute = _numbers(path, names, rows, columns.compute)
    else:
        compute = x[:, 0] if len(columns.inputs) == 1 else 6 * x[:, 0] * x[:, 1]
    if columns.group is None:
        groups = np.arange(len(rows))
    else:
        at = _position(path, names, columns.group)
        groups = np.unique([row[at] for row in rows], return_inverse=True)[1]
    if len(rows) < 4:
        raise UserError(f"{path}: {len(rows)} rows; a fit needs at least 4")
    return Measurements(x, y, compute, groups), columns


def best_of_each_budget(data: Measurements) -> Measurements:
    """Keep only the point with the smallest y of each budget.

    Points sorted by cost belong to the same budget as long as each costs at most 1.25 times its predecessor.
    """
    order = np.argsort(data.compute, kind="stable")
    edges = np.flatnonzero(np.diff(np.log(data.compute[order])) > np.log(SAME_BUDGET)) + 1
    best = np.array([rows[np.argmin(data.y[rows])] for rows in np.split(order, edges)])
    chosen = Measurements(data.x[best], data.y[best], data.compute[best], data.groups[best])
    return replace(chosen, groups=np.unique(chosen.groups, return_inverse=True)[1])


def _rows(path: Path) -> tuple[list[str], list[list[str]]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = [[cell.strip() for cell in row] for row in csv.reader(file)]
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error):
        raise UserError(f"{path}: not a CSV file") from None
    lines = [row for row in lines if any(row)]
    if not lines:
        raise UserError(f"{path}: empty; the first line must name the columns")
    names, rows = lines[0], lines[1:]
    for number, row in enumerate(rows, 2):
        if len(row) != len(names):
            raise UserError(f"{path}, row {number}: {len(row)} values for {len(names)} columns")
    return names, rows


def _position(path: Path, names: list[str], name: str) -> int:
    if name not in names:
        near = nearest(name, names)
        raise UserError(f"{path}: no column {name!r}{near}; there are {', '.join(names[:20])}")
    return names.index(name)


def _numbers(path: Path, names: list[str], rows: list[list[str]], name: str) -> Array:
    at, values = _position(path, names, name), []
    for number, row in enumerate(rows, 2):
        try:
            value = float(row[at])
        except ValueError:
            what = f"{row[at]!r} is not a number" if row[at] else "empty"
            raise UserError(
                f"{path}, row {number}, column {name}: {what}; leave out rows that were not measured"
            ) from None
        if not math.isfinite(value):
            raise UserError(f"{path}, row {number}, column {name}: {row[at]}; leave out rows that were not measured")
        if value <= 0:
            raise UserError(f"{path}, row {number}, column {name}: {row[at]}; a power law needs values above 0")
        values.append(value)
    return np.array(values)
