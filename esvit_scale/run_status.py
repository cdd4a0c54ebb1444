"""`esvit-scale status`: the progress of a run, on this machine or under Slurm, from its run dir and from Slurm."""

from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from esvit_scale import slurm_status
from esvit_scale.errors import UserError, in_words, nearest
from esvit_scale.train.guard import BELOW
from esvit_scale.train.log_format import read_warnings
from esvit_scale.train.row_file import read_rows
from esvit_scale.train.run_records import read_environment, starts_of

UNREADABLE = "UNREADABLE"  # state of a run whose files cannot be read


class RunStatus(NamedTuple):
    """State and progress of a run; rates and k-NN come from the last rows of metrics.jsonl that have them."""

    run: str
    state: str
    reason: str
    job: str = ""  # "" where no Slurm job worked on the run
    step: int = 0
    total_steps: int | None = None
    images_per_s: float | None = None
    eta_s: float | None = None  # of training; None where it is not known or the run is finished
    knn_top1: float | None = None  # fraction
    knn_step: int | None = None
    guard_below: int = 0  # measurements in a row below what train.guard tolerates, up to the last
    starts: int = 1
    failures: int = 0
    warnings: int = 0  # number of warnings in log.txt
    last_warning: str = ""
    console: str = ""  # file with the job's output


def status(run: Path) -> RunStatus:
    """Return state and progress of the run in a run dir.

    Raises:
        UserError: there is no run in this folder.
    """
    if not is_run(run):
        known = [path.name for path in runs_in(run.parent)]
        raise UserError(f"{run}: holds no run{nearest(run.name, known)}")
    if (run / "slurm" / "starts.tsv").exists():
        of_job: dict[str, Any] = slurm_status.status(run)._asdict()
    else:
        of_job = _of_files(run)
    rows = read_rows(run / "metrics.jsonl")
    last: dict[str, Any] = next((row for row in reversed(rows) if "knn_top1" in row), {})
    guarded: dict[str, Any] = next((row for row in reversed(rows) if BELOW in row), {})
    warnings = read_warnings(run / "log.txt")
    return RunStatus(
        run=str(run),
        knn_top1=last.get("knn_top1"),
        knn_step=last.get("step"),
        guard_below=guarded.get(BELOW, 0),
        warnings=len(warnings),
        last_warning=warnings[-1] if warnings else "",
        **of_job,
    )


def status_or_reason(run: Path) -> RunStatus:
    """Return state and progress of a run; where its files cannot be read, the state is UNREADABLE, with the reason."""
    try:
        return status(run)
    except (UserError, OSError) as error:
        reason = in_words(error) if isinstance(error, OSError) else "; ".join(str(error).splitlines())
        return RunStatus(str(run), UNREADABLE, reason)


def status_lines(found: RunStatus) -> list[str]:
    """Return the lines that `status RUN` prints."""
    restarts = f"{found.starts - 1}" + (f", {found.failures} after a failure" if found.failures else "")
    rows = [
        ("run", found.run),
        ("state", found.state + (f" ({found.reason})" if found.reason else "")),
        ("job", found.job),
        ("step", _steps(found)),
        ("images/s", "" if found.images_per_s is None else f"{found.images_per_s:.1f}"),
        ("ETA", f"{timedelta(seconds=round(found.eta_s))} of training" if found.eta_s else ""),
        ("k-NN", _knn(found, f" at step {found.knn_step}")),
        ("guard", f"{found.guard_below} measurements in a row worse than at the start" if found.guard_below else ""),
        ("restarts", restarts),
        ("warnings", f"{found.warnings}; the last: {found.last_warning}" if found.warnings else "0"),
        ("console", found.console),
    ]
    return [f"{name:<10}{value}" for name, value in rows if value]


def table(found: list[RunStatus]) -> list[str]:
    """Return the lines that `status` prints without RUN: one for each run."""
    width = max(len(one.run) for one in found) + 2
    lines = [f"{'run':<{width}}{'state':<24}{'step':>16}{'images/s':>10}{'k-NN':>9}{'warnings':>10}"]
    for one in found:
        if one.state == UNREADABLE:
            lines.append(f"{one.run:<{width}}{one.state}: {one.reason}")
            continue
        rate = "" if one.images_per_s is None else f"{one.images_per_s:.1f}"
        lines.append(f"{one.run:<{width}}{one.state:<24}{_steps(one):>16}{rate:>10}{_knn(one):>9}{one.warnings:>10}")
    return lines


def runs_in(folder: Path) -> list[Path]:
    """Return the run dirs in a folder, those that were written to last first."""
    runs = [path for path in folder.glob("*") if is_run(path)]
    return sorted(
        runs,
        key=lambda run: (run / "config.yaml").stat().st_mtime if (run / "config.yaml").exists() else 0,
        reverse=True,
    )


def is_run(path: Path) -> bool:
    """Return whether a folder is a run dir: it holds the config of a run, or Slurm's record of a start."""
    return (path / "config.yaml").is_file() or (path / "slurm" / "starts.tsv").is_file()


def _of_files(run: Path) -> dict[str, Any]:
    """Return the fields of a run without Slurm jobs that slurm_status gives for one with them."""
    progress = slurm_status.progress(run)
    state = slurm_status.state_by_files(run)
    starts = max(1, starts_of(read_environment(run)))
    return {**progress, "state": state, "reason": "", "job": "", "starts": starts, "failures": 0, "console": ""}


def _steps(found: RunStatus) -> str:
    return f"{found.step}" + (f" of {found.total_steps}" if found.total_steps else "")


def _knn(found: RunStatus, where: str = "") -> str:
    return "" if found.knn_top1 is None else f"{100 * found.knn_top1:.1f} %{where}"
