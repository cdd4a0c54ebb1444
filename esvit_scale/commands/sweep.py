"""The `sweep` commands: plan and run a sweep, fit a scaling law to its results, and predict larger runs."""

import argparse
from pathlib import Path
from typing import Any

from esvit_scale.commands import slurm
from esvit_scale.commands.parser import command, count, group, positive
from esvit_scale.errors import UserError


def add(commands: Any) -> None:
    """Declare `sweep` and its subcommands."""
    sweep = group(commands, "sweep", "scaling laws: plan a sweep, run it, fit a law, predict the next size")
    _add_running(sweep)
    fit = command(sweep, "fit", _fit, "fit a law with intervals to a CSV of measurements; writes fit.json")
    fit.add_argument(
        "table", type=Path, metavar="CSV", help="measurements: runs.csv of `sweep collect`, or any other CSV"
    )
    fit.add_argument(
        "--x", metavar="COL", help="column of the one input, for example flops; goes with --y (default: none)"
    )
    fit.add_argument("--y", metavar="COL", help="column that falls with --x, for example knn_error (default: none)")
    fit.add_argument("--n", metavar="COL", help="column of parameters; goes with --d and --loss (default: none)")
    fit.add_argument("--d", metavar="COL", help="column of data, for example images_seen (default: none)")
    fit.add_argument("--loss", metavar="COL", help="column that falls with --n and --d (default: none)")
    fit.add_argument(
        "--compute",
        metavar="COL",
        help="column of FLOPs (default: the column of --x; with --n and --d: the column flops, else 6·N·D)",
    )
    fit.add_argument(
        "--group",
        metavar="COL",
        help="column that is equal in rows of one run, which are resampled together (default: cell)",
    )
    fit.add_argument("--best", action="store_true", help="fit only the best row of each budget (the frontier)")
    fit.add_argument(
        "--form",
        default="auto",
        metavar="FORM",
        help="power, power_constant, two_power, chinchilla or auto (default: auto)",
    )
    fit.add_argument(
        "--resamples", type=positive, default=1000, metavar="R", help="number of bootstrap resamples (default: 1000)"
    )
    fit.add_argument("--seed", type=count, default=0, metavar="N", help="random seed of the bootstrap (default: 0)")
    fit.add_argument(
        "--predict",
        type=_above_zero,
        nargs="+",
        default=[],
        metavar="FLOPS",
        help="budgets, in FLOPs, to predict at (default: none)",
    )
    fit.add_argument(
        "--predict-run",
        type=_above_zero,
        nargs=2,
        action="append",
        default=[],
        metavar=("N", "D"),
        help="one run to predict, with the interval of its measurement; may be repeated; goes with --n (default: none)",
    )
    fit.add_argument(
        "--force", action="store_true", help="allow predictions beyond 10 times the largest measured compute"
    )
    fit.add_argument("--out", type=Path, metavar="DIR", help="folder for fit.json (default: the folder of the CSV)")

    report = command(sweep, "report", _report, "draw a fit as figures (PNG, SVG) and one HTML page")
    report.add_argument("fit", type=Path, metavar="FIT", help="fit.json, or the folder that holds it")
    report.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for the page and figures (default: the folder of fit.json)"
    )
    report.add_argument(
        "--tflops", type=_above_zero, metavar="T", help="TFLOP/s of one GPU, to price the next size (default: no price)"
    )
    report.add_argument(
        "--mfu",
        type=_above_zero,
        default=0.35,
        metavar="F",
        help="fraction of --tflops that training reaches (default: 0.35)",
    )


def _add_running(sweep: Any) -> None:
    def one(name: str, run: Any, summary: str) -> argparse.ArgumentParser:
        parser = command(sweep, name, run, summary)
        parser.add_argument("sweep", type=Path, metavar="SWEEP.yaml", help="sweep file")
        return parser

    plan = one(
        "plan",
        _plan,
        "show the cells (sizes × budgets × seeds), their cost and what fits; refuse those that make no sense",
    )
    plan.add_argument("--json", action="store_true", help="print JSON instead of a table")
    power = one("power", _power, "say before a sweep how well it will know the exponent of its law")
    power.add_argument(
        "--error",
        type=_above_zero,
        nargs=2,
        required=True,
        metavar=("CHEAP", "DEAR"),
        help="error in percent expected at the smallest and at the largest budget",
    )
    power.add_argument(
        "--test-images", type=positive, metavar="N", help="test images (default: those of evaluate.test, a shard set)"
    )
    power.add_argument(
        "--seed-spread",
        type=_above_zero,
        default=0.3,
        metavar="P",
        help="standard deviation of the error between seeds in points (default: 0.3)",
    )
    submit = one("submit", _submit, "run the unfinished cells, as a Slurm array or on this machine")
    submit.add_argument("--local", action="store_true", help="run on this machine, one cell after the other")
    slurm.add_resources(submit, gpus=True)
    status = one("status", _status, "show how far each cell is, and why cells failed")
    status.add_argument("--json", action="store_true", help="print JSON instead of a table")
    collect = one("collect", _collect, "write the results of the finished cells to runs.csv")
    collect.add_argument(
        "--out", type=Path, metavar="CSV", help="file to write (default: runs.csv in the sweep's folder)"
    )
    cell = one("run-cell", _run_cell, "train and evaluate one cell (an array task runs it)")
    cell.add_argument("index", type=count, metavar="INDEX", help="index of the cell, as `sweep plan` shows it")


def _cells(path: Path, measure: bool = False) -> Any:
    """Read a sweep file; return the sweep and its cells.

    The cells have GPU hours if the sweep file gives machine.tflops, or with `measure` the rate of this machine's GPU.
    """
    from esvit_scale import config as configs
    from esvit_scale.commands.plan import speed_of
    from esvit_scale.scaling import cells, sweep_file

    sweep = sweep_file.read(path)
    base, tflops = configs.resolve(sweep.base, list(sweep.overrides)), sweep.machine.tflops
    speed = speed_of(base, tflops, sweep.machine.mfu) if tflops or measure else None
    return sweep, cells.cells(sweep, str(path), speed)


def _plan(options: argparse.Namespace) -> int:
    import json

    from esvit_scale.scaling import cells

    sweep, found = _cells(options.sweep, measure=True)
    print(json.dumps(cells.as_json(found), indent=2) if options.json else cells.table(found, sweep))
    if all(cell.problems for cell in found):
        raise UserError(f"{options.sweep}: every cell is refused")
    return 0


def _power(options: argparse.Namespace) -> int:
    from esvit_scale.data import manifest as manifests
    from esvit_scale.scaling import power, sweep_file

    sweep, images = sweep_file.read(options.sweep), options.test_images
    if images is None:
        if sweep.evaluate is None or not manifests.is_shard_set(Path(sweep.evaluate.test)):
            raise UserError(
                f"{options.sweep}: evaluate.test is no shard set; say how many images there are: --test-images N"
            )
        images = manifests.load(Path(sweep.evaluate.test)).samples
    errors = (options.error[0], options.error[1])
    found = power.power(sweep.budgets, errors, images, len(sweep.seeds), options.seed_spread)
    print("\n".join(power.lines(found, len(set(sweep.budgets)), errors)))
    return 0


def _submit(options: argparse.Namespace) -> int:
    from esvit_scale.scaling import runner

    if not options.local:
        return slurm.submit_sweep(options)
    if given := slurm.given_resources(options):
        raise UserError(f"{given}: is for a Slurm job; leave it out with --local, or leave out --local")
    sweep, found = _cells(options.sweep)
    if all(cell.problems for cell in found):
        raise UserError(f"{options.sweep}: every cell is refused; `sweep plan` shows why")
    return runner.submit_local(options.sweep, sweep, found)


def _status(options: argparse.Namespace) -> int:
    import json

    from esvit_scale.scaling import runner

    sweep, found = _cells(options.sweep)
    print(json.dumps(runner.as_json(found, sweep), indent=2) if options.json else runner.status_table(found, sweep))
    return 0


def _collect(options: argparse.Namespace) -> int:
    from esvit_scale.scaling import collect

    sweep, found = _cells(options.sweep)
    out = options.out or sweep.folder / "runs.csv"
    rows = collect.collect(found, sweep, out)
    print(f"{out}: {len(rows)} of {len(found)} cells")
    return 0


def _run_cell(options: argparse.Namespace) -> int:
    from esvit_scale.train import signals

    signals.install()  # first: importing the rest takes seconds
    from esvit_scale.scaling import runner

    sweep, found = _cells(options.sweep)
    if options.index >= len(found):
        raise UserError(f"{options.sweep}: there is no cell {options.index}; the last is {len(found) - 1}")
    return runner.run_cell(found[options.index], sweep, runner.source_of(sweep))


def _fit(options: argparse.Namespace) -> int:
    from esvit_scale.scaling import fit, table

    o = options
    if (o.x and o.y) and not (o.n or o.d or o.loss):
        columns = table.Columns((o.x,), o.y, o.compute, o.group)
    elif (o.n and o.d and o.loss) and not (o.x or o.y):
        columns = table.Columns((o.n, o.d), o.loss, o.compute, o.group)
    else:
        raise UserError("sweep fit: give either --x COL --y COL, or --n COL --d COL --loss COL")
    how = fit.Options(o.form, o.resamples, o.seed, tuple(o.predict), o.force, o.best, tuple(map(tuple, o.predict_run)))
    out = o.out or o.table.parent
    print("\n".join(fit.summary(fit.run(o.table, columns, out, how))))
    print(out / "fit.json")
    return 0


def _report(options: argparse.Namespace) -> int:
    from esvit_scale.scaling import page

    print(page.write(options.fit, options.out, options.tflops, options.mfu))
    return 0


def _above_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value
