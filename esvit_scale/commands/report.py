"""The `report` command: one HTML file about one run or several."""

import argparse
from pathlib import Path
from typing import Any

from esvit_scale.commands.parser import command


def add(commands: Any) -> None:
    """Declare `report`."""
    report = command(
        commands, "report", _report, "write one self-contained HTML file about a run, or about several side by side"
    )
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run dir")
    report.add_argument(
        "--out",
        type=Path,
        metavar="F.html",
        help="file to write (default: report.html in RUN; for several runs, in the folder that holds the first)",
    )


def _report(options: argparse.Namespace) -> int:
    from esvit_scale.report import html

    print(html.write_report(options.runs, options.out))
    return 0
