"""Reports of runs, to look at."""

import argparse
from pathlib import Path
from typing import Any

from esvit_scale.commands.parser import command


def add(commands: Any) -> None:
    report = command(commands, "report", _report, "one self-contained HTML file a run")
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run dir")


def _report(options: argparse.Namespace) -> int:
    from esvit_scale.report import html

    for run in options.runs:
        print(html.write_report(run))
    return 0
