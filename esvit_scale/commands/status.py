"""The `status` command: how far a run is, on this machine or under Slurm."""

import argparse
import json
from pathlib import Path
from typing import Any

from esvit_scale.commands.parser import command, print_lines
from esvit_scale.errors import UserError

RUNS = Path("runs")


def add(commands: Any) -> None:
    """Declare `status`."""
    summary = "show how far a run is: state, step, images/s, ETA, last k-NN, restarts, warnings"
    status = command(commands, "status", _status, summary)
    status.add_argument(
        "path", type=Path, nargs="?", metavar="RUN", help="run dir (default: a line for each run in runs/)"
    )
    status.add_argument("--json", action="store_true", help="print JSON instead of lines")


def _status(options: argparse.Namespace) -> int:
    from esvit_scale import run_status

    runs = run_status.runs_in(RUNS)
    if not options.path and not runs:
        raise UserError(f"{RUNS}/: holds no run; name one: esvit-scale status RUN")
    found = [run_status.status(options.path)] if options.path else [run_status.status_or_reason(run) for run in runs]
    if options.json:
        listed = [one._asdict() for one in found]
        print_lines([json.dumps(listed[0] if options.path else listed, indent=2)])
    else:
        print_lines(run_status.status_lines(found[0]) if options.path else run_status.table(found))
    return 0
