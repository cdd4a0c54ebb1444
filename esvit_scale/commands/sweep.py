"""Scaling laws: plan a sweep, run it, fit, predict."""

import argparse
from pathlib import Path
from typing import Any

from esvit_scale.commands.parser import command, count, group, positive
from esvit_scale.errors import UserError


def add(commands: Any) -> None:
    sweep = group(commands, "sweep", "scaling laws: plan a sweep, run it, fit, predict the next size")
    fit = command(sweep, "fit", _fit, "a CSV of measurements → fit.json: a law with its intervals")
    fit.add_argument("table", type=Path, metavar="CSV", help="measurements: runs.csv of `sweep collect`, or any other")
    fit.add_argument("--x", metavar="COL", help="the one input, for example flops; goes with --y")
    fit.add_argument("--y", metavar="COL", help="what falls with it, for example knn_error")
    fit.add_argument("--n", metavar="COL", help="parameters; goes with --d and --loss")
    fit.add_argument("--d", metavar="COL", help="data, for example images_seen")
    fit.add_argument("--loss", metavar="COL", help="what falls with both")
    fit.add_argument("--compute", metavar="COL", help="FLOPs of a row (default: x; else the column flops, or 6·N·D)")
    fit.add_argument("--group", metavar="COL", help="rows of one run, which are resampled together (default: cell)")
    fit.add_argument("--best", action="store_true", help="fit only the best row of each budget: the frontier")
    fit.add_argument("--form", default="auto", metavar="FORM", help="power, power_constant, two_power or chinchilla")
    fit.add_argument("--resamples", type=positive, default=1000, metavar="R", help="of the bootstrap (default: 1000)")
    fit.add_argument("--seed", type=count, default=0, metavar="N", help="of the bootstrap (default: 0)")
    fit.add_argument(
        "--predict", type=_above_zero, nargs="+", default=[], metavar="FLOPS", help="budgets to predict at"
    )
    fit.add_argument("--force", action="store_true", help="predict beyond 10 times the largest compute measured")
    fit.add_argument("--out", type=Path, metavar="DIR", help="folder for fit.json (default: the table's)")


def _fit(options: argparse.Namespace) -> int:
    from esvit_scale.scaling import fit, table

    o = options
    if (o.x and o.y) and not (o.n or o.d or o.loss):
        columns = table.Columns((o.x,), o.y, o.compute, o.group)
    elif (o.n and o.d and o.loss) and not (o.x or o.y):
        columns = table.Columns((o.n, o.d), o.loss, o.compute, o.group)
    else:
        raise UserError("sweep fit: give --x COL --y COL, or --n COL --d COL --loss COL")
    how = fit.Options(o.form, o.resamples, o.seed, tuple(o.predict), o.force, o.best)
    out = o.out or o.table.parent
    print("\n".join(fit.summary(fit.run(o.table, columns, out, how))))
    print(out / "fit.json")
    return 0


def _above_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value
