"""Slurm from Python: fills the shipped batch scripts, submits them, and says how far a job's run is.

The scripts in slurm/ are the launchers; nothing here starts a rank. `submit` writes a copy of one into the folder that
the job keeps its records in, with the #SBATCH lines that were asked for, so that what ran can be read later.
"""

import math
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

from esvit_scale import config as configs
from esvit_scale import files
from esvit_scale.data import mix
from esvit_scale.errors import UserError, nearest
from esvit_scale.resources import shipped_folder
from esvit_scale.train.lock import is_running
from esvit_scale.train.row_file import read_rows
from esvit_scale.train.run_dir import read_summary

SHORT_OPTIONS = {"N": "nodes", "n": "ntasks", "t": "time"}  # of sbatch
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
            "nodes": self.nodes,
            "ntasks-per-node": tasks if tasks is not None else (1 if self.gpus_per_node == 0 else None),
            "gpus-per-node": self.gpus_per_node,
            "cpus-per-task": self.cpus_per_task,
            "time": self.time,
            "partition": self.partition,
            "signal": f"B:USR1@{self.signal_lead}" if self.signal_lead else None,
            "array": self.array,
            "dependency": f"afterok:{self.after}" if self.after else None,
            "kill-on-invalid-dep": "yes" if self.after else None,  # else it would wait for ever on a failed job
        }
        header: dict[str, str | None] = {name: str(value) for name, value in lines.items() if value is not None}
        if self.gpus_per_node == 0:
            header["gpus-per-node"] = None
        return header


def seconds_of_time(text: str) -> int | None:
    """A time limit as sbatch reads it (`30`, `30:00`, `12:00:00`, `2-00`, `2-00:00:00`), in seconds; None without limit.

    Raises:
        UserError: it is none of these.
    """
    if text.upper() in ("UNLIMITED", "INFINITE", "0"):
        return None
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if found is None:
        raise UserError(f"--time {text}: not a time limit; write minutes, 12:00:00 or 2-00:00:00")
    days, first, second, third = (int(part) if part is not None else None for part in found.groups())
    assert first is not None
    if days is None and third is None:
        return 60 * first + (second or 0)
    return 86400 * (days or 0) + 3600 * first + 60 * (second or 0) + (third or 0)


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
    header = {**resources.header(), "output": _output(records / saved_as, console)}
    exports = {"ESVIT_SLURM": str(folder)}
    if site is not None:
        exports["ESVIT_ENV"] = str(site.absolute())
    lines = [f"export {key}={shlex.quote(value)}" for key, value in exports.items()]
    # The Python that submits has everything the job needs, unless the site's file names another.
    lines.append(f"export ESVIT_PYTHON=${{ESVIT_PYTHON:-{shlex.quote(sys.executable)}}}")
    shipped = (folder / f"{name}.sbatch").read_text()
    if (lead := _lead_that_fits(shipped, resources)) is not None:
        header["signal"] = f"B:USR1@{lead}"
    text = fill(shipped, header, lines)
    return Job(records / f"{saved_as}.sbatch", text, tuple(arguments), resources.more)


def ranks(name: str, resources: Resources) -> int:
    """Return how many ranks the job of a shipped script will have.

    Raises:
        UserError: an option in `resources.more` that decides it is not one number (`--nodes=2-4`).
    """
    shipped = directives((shipped_folder("slurm") / f"{name}.sbatch").read_text())
    asked = {option: value for option, value in resources.header().items() if value is not None}
    given = shipped | asked | options_of(resources.more)
    counts = ("ntasks",) if "ntasks" in given else ("nodes", "ntasks-per-node")
    for option in counts:
        if not (given[option].isdecimal() and int(given[option])):
            raise UserError(f"--sbatch=--{option}={given[option]}: give one number, which the batch must divide over")
    return math.prod(int(given[option]) for option in counts)


def options_of(more: Sequence[str]) -> dict[str, str]:
    """Return option → value of sbatch's own arguments (`--nodes=4`, `-N4`), which outweigh the script's #SBATCH lines."""
    found = {}
    for option in more:
        name, _, value = option[2:].partition("=") if option.startswith("--") else (option[1:2], "", option[2:])
        found[SHORT_OPTIONS.get(name, name)] = value.strip()
    return found


def _lead_that_fits(shipped: str, resources: Resources) -> int | None:
    """Seconds before the time limit to save at when the script's own lead is too long for the limit; None: it fits.

    Raises:
        UserError: the lead that was asked for is as long as the limit: the job would requeue itself at once, for ever.
    """
    given, more = directives(shipped), options_of(resources.more)
    limit = seconds_of_time(more.get("time") or resources.time or given["time"])
    asked = int(found[1]) if (found := re.search(r"@(\d+)", more.get("signal", ""))) else resources.signal_lead
    lead = asked or int(given["signal"].partition("@")[2])
    if limit is None or 2 * lead <= limit:
        return None
    if asked is None:
        return max(1, limit // 2)
    if lead < limit:
        return None
    raise UserError(
        f"--signal-lead {lead}: as long as the time limit ({limit} s), so the job would save and requeue itself at once, for "
        f"ever; at most half of it: {limit // 2}"
    )


def directives(script: str) -> dict[str, str]:
    """Option → value of a batch script's #SBATCH lines."""
    return dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", script, re.MULTILINE))


def _output(stem: Path, console: str) -> str:
    """The value of #SBATCH --output, whose path may hold spaces, quotes, # or %."""
    text = str(stem).replace("%", "%%") + f"-{console}"
    if text == shlex.quote(text):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


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
    """Write the filled script and give it to sbatch; return the job id. A refusal leaves the disk as it was.

    Raises:
        UserError: no sbatch here, or what it says against the job.
    """
    before = job.script.read_text() if job.script.is_file() else None
    made = [folder for folder in (job.script.parent, *job.script.parent.parents) if not folder.exists()]
    job.script.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(job.script, job.text)
    try:
        return _sbatch(job)
    except UserError:
        if before is None:
            job.script.unlink()
        else:
            files.write_text(job.script, before)
        for folder in made:
            with suppress(OSError):  # somebody else's file is in it by now
                folder.rmdir()
        raise


def _sbatch(job: Job) -> str:
    try:
        done = subprocess.run(job.command, capture_output=True, text=True, timeout=ANSWER_S)
    except FileNotFoundError:
        raise UserError("sbatch: not found; submit on a login node of the cluster (--dry-run shows the job)") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"sbatch: no answer in {ANSWER_S} s; is Slurm's controller up? (scontrol ping)") from None
    if done.returncode:
        raise UserError(f"sbatch: {' '.join((done.stderr or done.stdout).split())}")
    return done.stdout.strip().partition(";")[0]


def cancel(job: str) -> None:
    """Take a job out of the queue again; nothing when that fails."""
    with suppress(OSError, subprocess.TimeoutExpired):
        subprocess.run(["scancel", job], capture_output=True, timeout=ANSWER_S)


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
    job, fields, state = _job_that_matters(run, [start[1] for start in starts])
    rows = read_rows(run / "metrics.jsonl")
    row = rows[-1] if rows else {}
    total, step = _total_steps(run), row.get("step", 0)
    left = None if total is None or "step_s" not in row else (total - step) * row["step_s"]
    return Status(
        state=state,
        reason="" if fields.get("Reason") in (None, "None") else fields["Reason"],
        job=job,
        starts=max(1, sum(start[1] not in _refused(run) for start in starts)),
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
    if not lines or done.returncode:
        return {}
    return dict(re.findall(r"(?:^| )([\w/:]+)=(.*?)(?= [\w/:]+=|$)", lines[0]))  # paths may hold spaces


GOING_ON = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "CONFIGURING", "PENDING", "REQUEUED", "REQUEUE_HOLD")
LAST_JOBS = 5  # of a run, that Slurm is asked about


def _job_that_matters(run: Path, started: list[str]) -> tuple[str, dict[str, str], str]:
    """The job that works on a run, or did: not one that was refused because the run was in use, or finished.

    Returns:
        its id, what Slurm says of it, and the state to show.
    """
    jobs = list(dict.fromkeys(reversed(started)))[:LAST_JOBS]
    said = {job: job_fields(job) for job in jobs}
    refused = _refused(run)
    for job in jobs:
        if (state := said[job].get("JobState", "")) in GOING_ON:
            return job, said[job], state
    by_files = _state_by_files(run)
    worked = [job for job in jobs if job not in refused] or jobs
    if by_files == "FINISHED":
        done = [job for job in jobs if said[job].get("JobState") == "COMPLETED"]
        job = (done or worked)[0]
        return job, said[job] if done else {}, "COMPLETED" if done else by_files
    job = worked[0]
    return job, said[job], said[job].get("JobState") or by_files


def _refused(run: Path) -> set[str]:
    """Jobs that ended with the user's mistake: they did not work on the run."""
    return {job for _, job, code in _records(run, "ended.tsv") if code == "2"}


def _state_by_files(run: Path) -> str:
    if read_summary(run).get("finished"):
        return "FINISHED"
    if (run / "requeue").exists():
        return "SAVED, WAITING TO GO ON"
    return "RUNNING" if is_running(run) else "STOPPED"


def _total_steps(run: Path) -> int | None:
    """None while the run has not written its config, or its shards are out of reach from here."""
    path = run / "config.yaml"
    if not path.exists():
        return None
    config = configs.load(path)
    if config.train.steps:
        return config.train.steps
    try:
        return config.train.epochs * (mix.epoch_samples(config.data) // config.train.global_batch)
    except UserError:
        return None


def _records(run: Path, name: str) -> list[list[str]]:
    path = run / "slurm" / name
    return [line.split("\t") for line in path.read_text().splitlines()] if path.exists() else []
