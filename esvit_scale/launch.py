"""Slurm from Python: fills the shipped batch scripts, submits them, and says how far a job's run is.

The scripts in slurm/ are the launchers; nothing here starts a rank. `submit` writes a copy of one into the folder that
the job keeps its records in, with the #SBATCH lines that were asked for, so that what ran can be read later.
"""

import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

from esvit_scale import config as configs
from esvit_scale import files
from esvit_scale.data import manifest
from esvit_scale.errors import UserError, nearest
from esvit_scale.resources import shipped_folder
from esvit_scale.train.metrics import read_rows

ANSWER_S = 30  # Slurm's commands hang when its controller is away


@dataclass(frozen=True)
class Resources:
    """What a job asks Slurm for; None leaves the script's own line."""

    nodes: int | None = None
    gpus_per_node: int | None = None
    tasks_per_node: int | None = None  # ranks; None: one a GPU
    cpus_per_task: int | None = None
    time: str | None = None
    partition: str | None = None
    signal_lead: int | None = None  # seconds before the time limit at which the job is told to save
    array: str | None = None
    after: str | None = None  # job id that must end well first
    more: tuple[str, ...] = ()  # further options of sbatch, `--account=…`

    def header(self) -> dict[str, str | None]:
        """Option → value of the #SBATCH lines to write; None takes a line away."""
        tasks = self.tasks_per_node or (self.gpus_per_node or None)
        lines = {
            "nodes": _text(self.nodes),
            "ntasks-per-node": _text(tasks if tasks is not None else (1 if self.gpus_per_node == 0 else None)),
            "gpus-per-node": _text(self.gpus_per_node),
            "cpus-per-task": _text(self.cpus_per_task),
            "time": self.time,
            "partition": self.partition,
            "signal": f"B:USR1@{self.signal_lead}" if self.signal_lead else None,
            "array": self.array,
            "dependency": f"afterok:{self.after}" if self.after else None,
            "kill-on-invalid-dep": "yes" if self.after else None,  # else it would wait for ever on a failed job
        }
        header: dict[str, str | None] = {name: value for name, value in lines.items() if value is not None}
        if self.gpus_per_node == 0:
            header["gpus-per-node"] = None
        return header


@dataclass(frozen=True)
class Job:
    """A filled script and how it is submitted."""

    script: Path
    text: str
    arguments: tuple[str, ...]
    options: tuple[str, ...] = ()

    @property
    def command(self) -> list[str]:
        return ["sbatch", "--parsable", *self.options, str(self.script), *self.arguments]


def prepare(
    name: str,
    arguments: list[str],
    records: Path,
    resources: Resources,
    site: Path | None = None,
    saved_as: str | None = None,
) -> Job:
    """The shipped script `name`.sbatch, filled, to be saved as `saved_as`.sbatch; nothing is written yet.

    Args:
        arguments: of the script.
        records: folder that will hold the filled script and the job's console; made when needed.
        site: an env.sh to use instead of the shipped one.

    Raises:
        UserError: an option of sbatch that is none, or a site file that is not there.
    """
    for option in resources.more:
        if not option.startswith("-"):
            raise UserError(f"--sbatch {option}: options of sbatch begin with --, for example --sbatch=--account=NAME")
    if site is not None and not site.is_file():
        raise UserError(f"--env {site}: no such file; the one to copy is {shipped_folder('slurm') / 'env.sh'}")
    folder = shipped_folder("slurm").resolve()
    records = records.absolute()
    saved_as = saved_as or name
    console = "%A_%a.out" if resources.array else "%j.out"
    header = {**resources.header(), "output": str(records / f"{saved_as}-{console}")}
    exports = {"ESVIT_SLURM": str(folder)}
    if site is not None:
        exports["ESVIT_ENV"] = str(site.absolute())
    lines = [f"export {key}={shlex.quote(value)}" for key, value in exports.items()]
    # The Python that submits has everything the job needs, unless the site's file names another.
    lines.append(f"export ESVIT_PYTHON=${{ESVIT_PYTHON:-{shlex.quote(sys.executable)}}}")
    text = fill((folder / f"{name}.sbatch").read_text(), header, lines)
    return Job(records / f"{saved_as}.sbatch", text, tuple(arguments), resources.more)


def fill(script: str, header: Mapping[str, str | None], lines: list[str]) -> str:
    """A batch script with other #SBATCH values, and `lines` after the last of them.

    A value None takes the line away; an option that the script lacks is added.
    """
    before, block, after = _split(script)
    rest = dict(header)
    kept = []
    for line in block:
        option = line.removeprefix("#SBATCH --").partition("=")[0]
        if option not in rest:
            kept.append(line)
        elif (value := rest.pop(option)) is not None:
            kept.append(f"#SBATCH --{option}={value}")
    kept += [f"#SBATCH --{option}={value}" for option, value in rest.items() if value is not None]
    return "\n".join([*before, *kept, *lines, *after]) + "\n"


def _split(script: str) -> tuple[list[str], list[str], list[str]]:
    lines = script.splitlines()
    numbers = [i for i, line in enumerate(lines) if line.startswith("#SBATCH ")]
    first, last = numbers[0], numbers[-1] + 1
    return lines[:first], lines[first:last], lines[last:]


def submit(job: Job) -> str:
    """Writes the filled script and gives it to sbatch; returns the job id.

    Raises:
        UserError: no sbatch here, or what it says against the job.
    """
    job.script.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(job.script, job.text)
    try:
        done = subprocess.run(job.command, capture_output=True, text=True, timeout=ANSWER_S)
    except FileNotFoundError:
        raise UserError("sbatch: not found; submit on a login node of the cluster (--dry-run shows the job)") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"sbatch: no answer in {ANSWER_S} s; is Slurm's controller up? (scontrol ping)") from None
    if done.returncode:
        raise UserError(f"sbatch: {' '.join((done.stderr or done.stdout).split())}")
    return done.stdout.strip().partition(";")[0]


def show(job: Job) -> str:
    """What `--dry-run` prints: the script, and the command that would submit it."""
    return f"# {job.script}\n{job.text}\n# {shlex.join(job.command)}"


class Status(NamedTuple):
    """How far a run under Slurm is. Rates are the last logged row's."""

    state: str  # Slurm's own word while it knows the job, else what the run dir shows
    reason: str
    job: str
    starts: int  # by all its jobs together
    failures: int
    step: int
    total_steps: int | None
    images_per_s: float | None
    eta_s: float | None
    console: str


def status(run: Path) -> Status:
    """Of a run dir that a job works on, or worked on.

    Raises:
        UserError: no such folder, or one that no job has started.
    """
    starts = _records(run, "starts.tsv")
    if not starts:
        known = [path.parent.parent.name for path in run.parent.glob("*/slurm/starts.tsv")]
        raise UserError(f"{run}: no job has started here{nearest(run.name, known)}")
    job = starts[-1][1]
    fields = job_fields(job)
    rows = read_rows(run / "metrics.jsonl")
    row = rows[-1] if rows else {}
    total, step = _total_steps(run), row.get("step", 0)
    left = None if total is None or "step_s" not in row else (total - step) * row["step_s"]
    return Status(
        state=fields.get("JobState") or _state_by_files(run),
        reason="" if fields.get("Reason") in (None, "None") else fields["Reason"],
        job=job,
        starts=len(starts),
        failures=len(_records(run, "failures.tsv")),
        step=step,
        total_steps=total,
        images_per_s=row.get("images_per_s"),
        eta_s=left,
        console=fields.get("StdOut", ""),
    )


def status_lines(found: Status) -> list[str]:
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
    """What Slurm says of a job (`JobState`, `Reason`, …); empty when it no longer knows the job, or is not here."""
    command = ["scontrol", "show", "job", "-o", job]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_S)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    lines = done.stdout.splitlines()
    return dict(re.findall(r"(\w+)=(\S*)", lines[0])) if lines and not done.returncode else {}


def _state_by_files(run: Path) -> str:
    summary = run / "summary.json"
    if summary.exists() and json.loads(summary.read_text()).get("finished"):
        return "FINISHED"
    if (run / "requeue").exists():
        return "SAVED, WAITING TO GO ON"
    lock = run / "lock.json"
    try:
        beat = json.loads(lock.read_text())["heartbeat"]
    except (OSError, ValueError, KeyError):
        return "STOPPED"
    return "RUNNING" if time.time() - beat < 60 else "STOPPED"


def _total_steps(run: Path) -> int | None:
    """None while the run has not written its config, or its shards are out of reach from here."""
    path = run / "config.yaml"
    if not path.exists():
        return None
    config = configs.load(path)
    if config.train.steps:
        return config.train.steps
    try:
        return config.train.epochs * (manifest.load(Path(config.data.train)).samples // config.train.global_batch)
    except UserError:
        return None


def _records(run: Path, name: str) -> list[list[str]]:
    path = run / "slurm" / name
    return [line.split("\t") for line in path.read_text().splitlines()] if path.exists() else []


def _text(number: int | None) -> str | None:
    return None if number is None else str(number)
