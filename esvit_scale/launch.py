"""Submission of Slurm jobs: fills in the shipped batch scripts and passes them to sbatch.

The scripts in slurm/ launch the ranks; this module starts none. `submit` writes a copy of a script, with the #SBATCH
lines of this job, to the folder of the job's records, so that one can read later what ran.
"""

import math
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from esvit_scale import files
from esvit_scale.errors import UserError
from esvit_scale.resources import shipped_folder

SHORT_OPTIONS = {"N": "nodes", "n": "ntasks", "t": "time"}  # sbatch's short options → long names
ANSWER_S = 30  # timeout of Slurm's commands in seconds; they hang when the controller is down


@dataclass(frozen=True)
class Resources:
    """What a job asks Slurm for; None keeps the value in the script."""

    nodes: int | None = None
    gpus_per_node: int | None = None
    tasks_per_node: int | None = None  # ranks; None: one per GPU
    cpus_per_task: int | None = None
    time: str | None = None
    partition: str | None = None
    signal_lead: int | None = None  # seconds before the time limit at which the job is told to save
    array: str | None = None
    after: str | None = None  # id of a job that must succeed before this one starts
    more: tuple[str, ...] = ()  # further sbatch options, such as `--account=…`

    def header(self) -> dict[str, str | None]:
        """Return the #SBATCH lines to set, as option → value; the value None removes the script's line."""
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
            "kill-on-invalid-dep": "yes" if self.after else None,  # otherwise it would wait forever if that job fails
        }
        header: dict[str, str | None] = {name: str(value) for name, value in lines.items() if value is not None}
        if self.gpus_per_node == 0:
            header["gpus-per-node"] = None
        return header


def seconds_of_time(text: str) -> int | None:
    """Convert a time limit in sbatch's notation (`30`, `30:00`, `12:00:00`, `2-00`, `2-00:00:00`) to seconds; None: no
    limit.

    Raises:
        UserError: the text is none of these.
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
    """A filled-in batch script, and the arguments and options with which sbatch submits it."""

    script: Path
    text: str
    arguments: tuple[str, ...]
    options: tuple[str, ...] = ()

    @property
    def command(self) -> list[str]:
        """Return the sbatch command that submits the job."""
        return ["sbatch", "--parsable", *self.options, str(self.script), *self.arguments]


def prepare(
    name: str,
    arguments: list[str],
    records: Path,
    resources: Resources,
    site: Path | None = None,
    saved_as: str | None = None,
) -> Job:
    """Fill in the shipped script `name`.sbatch and return it as a Job; write nothing yet.

    Args:
        arguments: arguments of the script.
        records: folder for the filled-in script and the job's console output; `submit` creates it.
        site: an env.sh to use instead of the shipped one.

    Raises:
        UserError: an option of sbatch that is not one, or a site file that does not exist.
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
            raise UserError(
                f"--sbatch=--{option}={given[option]}: give one number, because the batch must divide over the ranks"
            )
    return math.prod(int(given[option]) for option in counts)


def options_of(more: Sequence[str]) -> dict[str, str]:
    """Parse sbatch's command-line options (`--nodes=4`, `-N4`), which override #SBATCH lines, to option → value."""
    found = {}
    for option in more:
        name, _, value = option[2:].partition("=") if option.startswith("--") else (option[1:2], "", option[2:])
        found[SHORT_OPTIONS.get(name, name)] = value.strip()
    return found


def _lead_that_fits(shipped: str, resources: Resources) -> int | None:
    """Return a shorter signal lead (seconds before the time limit at which the job saves) if the script's own is more
    than half the limit; None to keep the lead.

    Raises:
        UserError: the user asked for a lead as long as the limit; the job would requeue itself at once, forever.
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
    """Parse a batch script's #SBATCH lines to a dict of option → value."""
    return dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", script, re.MULTILINE))


def _output(stem: Path, console: str) -> str:
    """Return the value of #SBATCH --output, `stem`-`console`, escaped: the path may hold spaces, quotes, # or %."""
    text = str(stem).replace("%", "%%") + f"-{console}"
    if text == shlex.quote(text):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def fill(script: str, header: Mapping[str, str | None], lines: list[str]) -> str:
    """Return a batch script with the #SBATCH options of `header` set, and `lines` inserted after the last #SBATCH line.

    The value None removes an option's line; an option that the script lacks is added.
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
    """Write the filled-in script and submit it with sbatch; return the job id.

    If sbatch refuses the job, restore the files on disk as they were.

    Raises:
        UserError: sbatch is missing or refuses the job.
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
            with suppress(OSError):  # another process may have put a file into it by now
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
    """Cancel a queued job; a failure to do so is ignored."""
    with suppress(OSError, subprocess.TimeoutExpired):
        subprocess.run(["scancel", job], capture_output=True, timeout=ANSWER_S)


def show(job: Job) -> str:
    """Return the text that `--dry-run` prints: the script, and the command that would submit it."""
    return f"# {job.script}\n{job.text}\n# {shlex.join(job.command)}"
