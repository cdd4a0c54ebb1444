"""The `slurm` commands: submit the shipped batch scripts and show how far their runs are."""

import argparse
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esvit_scale.commands import option_types
from esvit_scale.commands.parser import add_overrides, command, count, group, positive
from esvit_scale.errors import UserError

if TYPE_CHECKING:
    from esvit_scale.config import Config
    from esvit_scale.launch import Resources


def add(commands: Any) -> None:
    """Declare `slurm` and its subcommands."""
    slurm = group(commands, "slurm", "submit jobs, and show how far a run is")
    _add_submit(slurm)
    status = command(slurm, "status", _status, "show state, step, images/s, ETA and restarts of a run")
    status.add_argument("path", type=Path, metavar="RUN", help="run dir")
    status.add_argument("--json", action="store_true", help="print JSON instead of lines")
    preflight = command(
        slurm, "preflight", _preflight, "check every node of a job (the batch scripts run it under srun)"
    )
    preflight.add_argument(
        "--shared", type=Path, required=True, metavar="DIR", help="folder on a file system that all nodes share"
    )
    run_dir = command(slurm, "run-dir", _run_dir, "print the run dir of a config (the batch scripts use it)")
    run_dir.add_argument(
        "--cell",
        type=count,
        metavar="INDEX",
        help="index of a cell; CONFIG is then a sweep file (default: CONFIG is a run)",
    )
    run_dir.add_argument("config", metavar="CONFIG", help="name of a preset, or a YAML file")
    add_overrides(run_dir, "config values to change")


def _add_submit(slurm: Any) -> None:
    summary = "fill a shipped batch script, submit it and print the job id"
    submit = group(slurm, "submit", summary)
    pretrain = command(submit, "pretrain", _submit_pretrain, "submit a run that requeues itself until it is finished")
    pretrain.add_argument("config", metavar="CONFIG", help="name of a preset, or a YAML file")
    add_overrides(pretrain, "config values to change")

    finetune = command(
        submit, "finetune", _submit_finetune, "submit a fine-tuning that requeues itself until it is finished"
    )
    finetune.add_argument("config", metavar="CONFIG", help="name of a preset, or a YAML file")
    add_overrides(finetune, "config values to change")

    shards = command(submit, "shards", _submit_shards, "write one shard set with many jobs, then merge their parts")
    shards.add_argument("source", metavar="SRC", help="images, as for `shards create`")
    shards.add_argument("destination", type=option_types.local_folder, metavar="DST", help="folder of the shard set")
    shards.add_argument(
        "--parts", type=positive, default=16, metavar="N", help="number of jobs that write (default: 16)"
    )
    _add_option(shards, "`shards create`, for example --option=--short-side=512")

    evaluate = command(submit, "evaluate", _submit_evaluate, "submit k-NN, then linear probes")
    for name, metavar, text in (
        ("--checkpoint", "C", "weights to evaluate, as for `evaluate knn`"),
        ("--train", "T", "labelled training set: shards or class folders"),
        ("--test", "V", "labelled test set: shards or class folders"),
        ("--out", "DIR", "folder for the results"),
    ):
        evaluate.add_argument(name, required=True, metavar=metavar, help=text)
    _add_option(evaluate, "both evaluations, for example --option=--batch=256")

    sweep = command(submit, "sweep", submit_sweep, "submit the unfinished cells of a sweep, one array element each")
    sweep.add_argument(
        "sweep", type=Path, metavar="SWEEP.yaml", help="YAML file that describes the sweep (docs/scaling.md)"
    )
    for parser in (pretrain, finetune, shards, evaluate, sweep):
        add_resources(parser, gpus=parser is not shards)


def _add_option(parser: argparse.ArgumentParser, of: str) -> None:
    parser.add_argument(
        "--option", action="append", default=[], metavar="OPTION", help=f"option to pass to {of}; repeatable"
    )


def add_resources(parser: argparse.ArgumentParser, gpus: bool) -> None:
    """Add the options for a job's resources; those for nodes and GPUs only with `gpus`."""
    asked = parser.add_argument_group("resources (default: as in the shipped batch script)")
    if gpus:
        asked.add_argument("--nodes", type=positive, metavar="N", help="number of nodes")
        asked.add_argument("--gpus-per-node", type=count, metavar="G", help="GPUs on a node; 0: run on the CPU")
        asked.add_argument(
            "--tasks-per-node", type=positive, metavar="N", help="ranks on a node (default: one for each GPU)"
        )
    asked.add_argument("--cpus-per-task", type=positive, metavar="N", help="CPU cores of a rank")
    asked.add_argument(
        "--time", metavar="TIME", help="time limit as sbatch takes it: 30 (minutes), 12:00:00, 2-00:00:00"
    )
    asked.add_argument("--partition", metavar="NAME", help="partition of the cluster")
    asked.add_argument(
        "--signal-lead", type=positive, metavar="S", help="seconds before the time limit at which the job saves"
    )
    asked.add_argument(
        "--after", metavar="JOB", help="id of a job that must succeed first; if it fails, this one never starts"
    )
    asked.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="further option of sbatch, for example --sbatch=--account=NAME; repeatable",
    )
    asked.add_argument("--env", type=Path, metavar="FILE", help="your copy of slurm/env.sh")
    asked.add_argument("--dry-run", action="store_true", help="print the script and the command without submitting")


def given_resources(o: argparse.Namespace) -> str:
    """Return the first option for a job's resources that the command line has; "" if it has none."""
    names = ("nodes", "gpus_per_node", "tasks_per_node", "cpus_per_task", "time", "partition", "signal_lead", "after")
    given = [n for n in (*names, "sbatch", "env", "dry_run") if getattr(o, n) not in (None, [], False)]
    return f"--{given[0].replace('_', '-')}" if given else ""


def _submit_pretrain(o: argparse.Namespace) -> int:
    from esvit_scale import config as configs

    config = configs.resolve(o.config, o.overrides)
    configs.require_training_data(config)
    return _submit_run(o, "pretrain", config)


def _submit_finetune(o: argparse.Namespace) -> int:
    from esvit_scale.train import finetuning

    return _submit_run(o, "finetune", finetuning.resolve(o.config, o.overrides))


def _submit_run(o: argparse.Namespace, name: str, config: "Config") -> int:
    from esvit_scale import launch

    with redirect_stdout(sys.stderr):  # the check imports DeepSpeed, whose log keeps the stdout of that moment
        _check_pretrain(config, launch.ranks(name, _resources(o, None, None)), data=not o.dry_run)
    return _submit(o, name, [o.config, *o.overrides], config.run_path / "slurm")


def _check_pretrain(config: "Config", ranks: int, data: bool) -> None:
    """Check a run's config before its job is submitted, so that mistakes do not first show after hours in the queue.

    Args:
        data: also look at the shards (a dry run does not need them).

    Raises:
        UserError: the batch does not divide over the ranks, the DeepSpeed file does not fit, or the data is missing.
    """
    from esvit_scale.checkpoint import carried
    from esvit_scale.data import loader, stream
    from esvit_scale.parallel import ds_config

    carried.check(config.of_stages)
    for stage in config.of_stages:
        loader.check_division(stage, ranks)
        ds_config.fill(stage, ranks)
        if data:
            stream.steps_per_epoch(stage, stream.open_data(stage))


def _check_there(o: argparse.Namespace, *paths: str) -> None:
    """Raise UserError if one of `paths` does not exist; do nothing in a dry run."""
    for path in paths:
        if not o.dry_run and "://" not in path and not Path(path).expanduser().exists():
            raise UserError(f"{path}: no such file or folder")


def _submit_shards(o: argparse.Namespace) -> int:
    records = o.destination.with_name(o.destination.name + "-slurm")
    from esvit_scale import launch

    _check_there(o, o.source)
    arguments = [str(o.parts), o.source, str(o.destination), *o.option]
    writing = _job_id(o, "shards", arguments, records, array=f"1-{o.parts}")
    try:
        _job_id(o, "shards", ["merge", str(o.destination)], records, after=writing, saved_as="merge")
    except UserError:
        launch.cancel(writing)
        raise
    return 0


def _submit_evaluate(o: argparse.Namespace) -> int:
    _check_there(o, o.checkpoint, o.train, o.test)
    arguments = [part for name in ("checkpoint", "train", "test", "out") for part in (f"--{name}", getattr(o, name))]
    return _submit(o, "evaluate", [*arguments, *o.option], Path(o.out) / "slurm")


def submit_sweep(o: argparse.Namespace) -> int:
    """Submit the unfinished cells of a sweep, one array element each; return 0.

    Raises:
        UserError: cells continue each other (`horizon: branches`), all are refused, or the job cannot be submitted.
    """
    from esvit_scale.commands.sweep import _cells
    from esvit_scale.scaling import runner

    sweep, found = _cells(o.sweep)
    if sweep.horizon == "branches":
        raise UserError(
            "horizon: branches: runs wait for each other, which array jobs cannot do; use `sweep submit --local`"
        )
    states = {cell.index: runner.state(cell, sweep).word for cell in found}
    todo = [index for index, word in states.items() if word not in ("finished", "refused")]
    if not todo and "finished" not in states.values():
        raise UserError(f"{o.sweep}: every cell is refused; `sweep plan` shows why")
    if not todo:  # not on stdout, where a job id is expected
        print(f"{o.sweep}: nothing to submit: every cell is finished or refused", file=sys.stderr)
        return 0
    if not o.dry_run:
        runner.source_of(sweep)
    try:
        return _submit(o, "sweep", [str(o.sweep)], sweep.folder / "slurm", array=runner.ranges(todo))
    except UserError as error:
        raise UserError(f"{error}; `sweep submit --local` runs the cells on this machine") from None


def _submit(o: argparse.Namespace, name: str, arguments: list[str], records: Path, array: str | None = None) -> int:
    _job_id(o, name, arguments, records, array)
    return 0


def _job_id(
    o: argparse.Namespace,
    name: str,
    arguments: list[str],
    records: Path,
    array: str | None = None,
    after: str | None = None,
    saved_as: str | None = None,
) -> str:
    """Submit one job, print its id and return it.

    A dry run only prints the script and the command, and returns "JOB" in place of an id.
    """
    from esvit_scale import launch

    job = launch.prepare(name, arguments, records, _resources(o, array, after), o.env, saved_as or name)
    if o.dry_run:
        print(launch.show(job))
        return "JOB"
    number = launch.submit(job)
    print(number)
    return number


def _resources(o: argparse.Namespace, array: str | None, after: str | None) -> "Resources":
    from esvit_scale.launch import Resources

    return Resources(
        nodes=getattr(o, "nodes", None),
        gpus_per_node=getattr(o, "gpus_per_node", None),
        tasks_per_node=getattr(o, "tasks_per_node", None),
        cpus_per_task=o.cpus_per_task,
        time=o.time,
        partition=o.partition,
        signal_lead=o.signal_lead,
        array=array,
        after=after or o.after,
        more=tuple(o.sbatch),
    )


def _status(o: argparse.Namespace) -> int:
    import json

    from esvit_scale import slurm_status

    found = slurm_status.status(o.path)
    print(json.dumps(found._asdict(), indent=2) if o.json else "\n".join(slurm_status.status_lines(found)))
    return 0


def _preflight(o: argparse.Namespace) -> int:
    from esvit_scale import preflight

    return preflight.run(o.shared)


def _run_dir(o: argparse.Namespace) -> int:
    if o.cell is not None:
        from esvit_scale.commands.sweep import _cells

        _, found = _cells(Path(o.config))
        if o.cell >= len(found):
            raise UserError(f"{o.config}: there is no cell {o.cell}; the last is {len(found) - 1}")
        print(found[o.cell].path)
        return 0
    from esvit_scale import config as configs

    config = configs.resolve(o.config, o.overrides)
    configs.require_training_data(config)
    print(config.run_path)
    return 0
