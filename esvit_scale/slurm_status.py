"""`esvit-scale slurm status`: the progress of a run under Slurm, from Slurm and from the records in the run dir."""

import re
import subprocess
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from esvit_scale import config as configs
from esvit_scale.errors import UserError, nearest
from esvit_scale.launch import ANSWER_S
from esvit_scale.train.row_file import read_rows
from esvit_scale.train.run_records import is_running, latest_checkpoint, read_summary

GOING_ON = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "CONFIGURING", "PENDING", "REQUEUED", "REQUEUE_HOLD")
LAST_JOBS = 5  # how many of a run's jobs Slurm is asked about


class Status(NamedTuple):
    """State and progress of a run under Slurm; images_per_s and eta_s come from the last row of metrics.jsonl."""

    state: str  # Slurm's own word while it knows the job, else what the run dir shows
    reason: str
    job: str
    starts: int  # of all the run's jobs together
    failures: int
    step: int
    total_steps: int | None
    images_per_s: float | None
    eta_s: float | None
    console: str


def status(run: Path) -> Status:
    """Return state and progress of the run in a run dir, from its files and from Slurm.

    Raises:
        UserError: there is no such folder, or no job has started in it.
    """
    starts = _records(run, "starts.tsv")
    if not starts:
        known = [path.parent.parent.name for path in run.parent.glob("*/slurm/starts.tsv")]
        raise UserError(f"{run}: no job has started here{nearest(run.name, known)}")
    job, fields, state = _job_that_matters(run, [start[1] for start in starts])
    return Status(
        **progress(run),
        state=state,
        reason="" if fields.get("Reason") in (None, "None") else fields["Reason"],
        job=job,
        starts=max(1, sum(start[1] not in _refused(run) for start in starts)),
        failures=len(_records(run, "failures.tsv")),
        console=fields.get("StdOut", ""),
    )


def progress(run: Path) -> dict[str, Any]:
    """Return the progress of a run by its newest row and checkpoint: step, total_steps, images_per_s and eta_s."""
    rows, saved = read_rows(run / "metrics.jsonl"), latest_checkpoint(run)
    row = rows[-1] if rows else {}
    total = _total_steps(run)
    step = max(row.get("step", 0), int(saved.name.removeprefix("step-")) if saved else 0)  # a stop saves between rows
    is_over = bool(read_summary(run, warn=False).get("finished"))
    left = None if is_over or total is None or "step_s" not in row else (total - step) * row["step_s"]
    return {"step": step, "total_steps": total, "images_per_s": row.get("images_per_s"), "eta_s": left}


def status_lines(found: Status) -> list[str]:
    """Return the lines that `slurm status` prints."""
    step = f"{found.step}" + (f" of {found.total_steps}" if found.total_steps else "")
    rows = [
        ("state", found.state + (f" ({found.reason})" if found.reason else "")),
        ("job", found.job),
        ("step", step),
        ("images/s", "" if found.images_per_s is None else f"{found.images_per_s:.1f}"),
        ("ETA", "" if found.eta_s is None else f"{timedelta(seconds=round(found.eta_s))} of training"),
        ("restarts", f"{found.starts - 1}" + (f", {found.failures} after a failure" if found.failures else "")),
        ("console", found.console),
    ]
    return [f"{name:<10}{value}" for name, value in rows if value]


def job_fields(job: str) -> dict[str, str]:
    """Return the fields of a job that scontrol shows (`JobState`, `Reason`, …).

    The dict is empty if Slurm is not available or no longer knows the job.
    """
    command = ["scontrol", "show", "job", "-o", job]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_S)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    lines = done.stdout.splitlines()
    if not lines or done.returncode:
        return {}
    return dict(re.findall(r"(?:^| )([\w/:]+)=(.*?)(?= [\w/:]+=|$)", lines[0]))  # paths may hold spaces


def _job_that_matters(run: Path, started: list[str]) -> tuple[str, dict[str, str], str]:
    """Choose the job to show: one that is queued or running, else the newest that worked on the run.

    A job that was refused, because the run was in use or finished, has not worked on it.

    Returns:
        The job's id, its fields from Slurm, and the state to show.
    """
    jobs = list(dict.fromkeys(reversed(started)))[:LAST_JOBS]
    said = {job: job_fields(job) for job in jobs}
    refused = _refused(run)
    for job in jobs:
        if (state := said[job].get("JobState", "")) in GOING_ON:
            return job, said[job], state
    by_files = state_by_files(run)
    worked = [job for job in jobs if job not in refused] or jobs
    if by_files == "FINISHED":
        done = [job for job in jobs if said[job].get("JobState") == "COMPLETED"]
        job = (done or worked)[0]
        return job, said[job] if done else {}, "COMPLETED" if done else by_files
    job = worked[0]
    return job, said[job], said[job].get("JobState") or by_files


def _refused(run: Path) -> set[str]:
    """Return the ids of the jobs that ended with exit code 2 (a user's error) and so did not work on the run."""
    return {job for _, job, code in _records(run, "ended.tsv") if code == "2"}


def state_by_files(run: Path) -> str:
    """Return the state of a run that Slurm no longer knows, from its run dir."""
    if read_summary(run).get("finished"):
        return "FINISHED"
    if (run / "requeue").exists():
        return "SAVED, WAITING TO GO ON"
    return "RUNNING" if is_running(run) else "STOPPED"


def _total_steps(run: Path) -> int | None:
    """Return the number of steps of the run; None while it has not written its config, or when its shards cannot be
    read here.
    """
    path = run / "config.yaml"
    if not path.exists():
        return None
    total = 0
    for config in configs.load(path).of_stages:
        if config.train.steps:
            total += config.train.steps
            continue
        from esvit_scale.data import mix  # imports numpy, which takes a while

        try:
            total += config.train.epochs * (mix.epoch_samples(config.data) // config.train.global_batch)
        except UserError:
            return None
    return total


def _records(run: Path, name: str) -> list[list[str]]:
    """Return the tab-separated rows of the file slurm/`name` in the run dir; none if the file does not exist."""
    path = run / "slurm" / name
    return [line.split("\t") for line in path.read_text().splitlines()] if path.exists() else []
