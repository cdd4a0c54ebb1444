"""Running the cells of a sweep, on this machine one after the other or as a Slurm array, and the state of each cell.

A cell is an ordinary run with its run dir under <out>/cells. It is finished when training has finished and, if the
sweep evaluates, its last checkpoint has a knn.json; a finished cell is never run again. When a cell fails, the reason
is recorded in <out>/failed, and the sweep continues with the next cell.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from esvit_scale import config as configs
from esvit_scale import files
from esvit_scale.checkpoint import step_folders
from esvit_scale.data.remote import place
from esvit_scale.errors import Diverged, UserError
from esvit_scale.scaling import subset
from esvit_scale.scaling.cells import Cell, evaluated_steps
from esvit_scale.scaling.sweep_file import Sweep
from esvit_scale.train.row_file import read_rows
from esvit_scale.train.run_records import is_running, read_summary

INTERRUPTED = 130
LAST_LINES = 20  # lines at the end of a failed cell's log in which the reason is searched


class CellState(NamedTuple):
    """The state of a cell: a word, its last step, and details such as the reason of a failure."""

    word: str  # refused, waiting, started, trained, finished, failed
    step: int
    reason: str = ""


def state(cell: Cell, sweep: Sweep) -> CellState:
    """Return the state of a cell, read from its run dir and its Slurm records."""
    if cell.problems:
        return CellState("refused", 0, cell.problems[0])
    rows, summary = read_rows(cell.path / "metrics.jsonl"), read_summary(cell.path)
    step = rows[-1]["step"] if rows else 0
    if summary.get("finished"):
        if sweep.evaluate is None or _evaluated(cell):
            return CellState("finished", cell.steps)
        word = "trained"
    else:
        word = "started" if rows else "waiting"
    if is_running(cell.path):  # another job may have been refused because of that, which is no failure of the cell
        return CellState(word if rows else "started", step)
    failure = _failure_path(cell, sweep)
    if failure.exists():
        return CellState("failed", step, failure.read_text().strip())
    if reason := _failed_job(cell):
        return CellState("failed", step, reason)
    return CellState(word, step)


def _failed_job(cell: Cell) -> str:
    """Return how the cell's last Slurm job failed, as slurm/job.sh recorded it.

    The text is empty if the job did not fail or a later one has started.
    """
    records = cell.path / "slurm"
    ended, started = (
        [line.split("\t") for line in path.read_text().splitlines()] if (path := records / name).is_file() else []
        for name in ("ended.tsv", "starts.tsv")
    )
    if not ended or ended[-1][2] == "0" or (started and started[-1][0] > ended[-1][0]):
        return ""
    return f"exit code {ended[-1][2]} (job {ended[-1][1]}; {records / ended[-1][1]})"


def prepare(cell: Cell, sweep: Sweep, source: Path) -> None:
    """Create the shard set of a cell that trains on only some of the images in `source`."""
    if Path(cell.config.data.train) == subset.path_of(sweep, cell.unique_images):
        subset.make(sweep, cell.unique_images, source)


def branch(cell: Cell) -> None:
    """Create the run dir of a cell that continues its parent: copy the parent's checkpoint at its branch point.

    Do nothing if the cell has checkpoints already.

    Raises:
        UserError: the parent has no checkpoint at that step yet.
    """
    checkpoints = cell.path / "checkpoints"
    if cell.parent is None or step_folders.has_checkpoints(cell.path):
        return
    step = f"step-{cell.parent.branch_step:08d}"
    origin = cell.parent.path / "checkpoints" / step
    if not origin.is_dir():
        raise UserError(f"{cell.name} continues {cell.parent.name}, which has no {step} yet; run that cell first")
    shutil.rmtree(checkpoints, ignore_errors=True)
    with files.new_folder(checkpoints / step) as tmp:  # the run has begun once this folder is in place
        shutil.copytree(origin, tmp, dirs_exist_ok=True)
        files.write_text(cell.path / "config.yaml", configs.dump(cell.config))
    files.write_text(checkpoints / "latest", f"{step}\n")


def submit_local(sweep_file: Path, sweep: Sweep, found: list[Cell]) -> int:
    """Run the unfinished cells on this machine, cheapest first, each in its own process; return the exit code.

    Ctrl-C and SIGTERM stop the sweep after the running cell has saved; the same command continues it.
    """
    todo = [c for c in found if state(c, sweep).word not in ("finished", "refused")]
    for number, cell in enumerate(sorted(todo, key=lambda c: c.flops), 1):
        print(f"[{number}/{len(todo)}] {cell.name}: {cell.steps} steps, {cell.path}", flush=True)
        code = _run_apart(sweep_file, sweep, cell)
        if code == INTERRUPTED or (cell.path / "requeue").exists():
            print("stopped and saved; the same command continues", flush=True)
            return code
    print(status_table(found, sweep))
    return 1 if any(state(c, sweep).word == "failed" for c in found) else 0


def _run_apart(sweep_file: Path, sweep: Sweep, cell: Cell) -> int:
    log = sweep.folder / "logs" / f"{cell.name}.log"
    for folder in (log.parent, _failure_path(cell, sweep).parent):
        folder.mkdir(parents=True, exist_ok=True)
    _failure_path(cell, sweep).unlink(missing_ok=True)
    command = [sys.executable, "-m", "esvit_scale", "sweep", "run-cell", str(sweep_file), str(cell.index)]
    with log.open("ab") as file, subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT) as process:
        before = signal.signal(signal.SIGTERM, lambda number, _: process.send_signal(number))
        try:
            code = process.wait()
        except KeyboardInterrupt:  # the terminal sent it to the cell as well: it saves and ends by itself
            process.wait()
            return INTERRUPTED
        finally:
            signal.signal(signal.SIGTERM, before)
    if code not in (0, INTERRUPTED):
        note_failure(cell, sweep, _reason(log, code))
        print(f"    failed: {_reason(log, code)}", flush=True)
    return code


def note_failure(cell: Cell, sweep: Sweep, reason: str) -> None:
    """Record why a cell failed, for `sweep status`."""
    path = _failure_path(cell, sweep)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, reason + "\n")


def forget_failure(cell: Cell, sweep: Sweep) -> None:
    """Remove the record of a cell's failure."""
    _failure_path(cell, sweep).unlink(missing_ok=True)


def _reason(log: Path, code: int) -> str:
    """Return the error line at the end of a failed cell's log, or its last line if there is none."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()][-LAST_LINES:]
    errors = [line for line in lines if line.startswith("esvit-scale: error: ")]
    said = errors[-1].removeprefix("esvit-scale: error: ") if errors else (lines[-1] if lines else "it printed nothing")
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return f"{said} ({how}; {log})"


def ranges(numbers: Iterable[int]) -> str:
    """Format indices for sbatch's --array option, for example "0-3,7"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def run_cell(cell: Cell, sweep: Sweep, source: Path) -> int:
    """Train or continue a cell and then evaluate it; every rank calls this. Return the exit code of the training."""
    from esvit_scale.parallel import collectives
    from esvit_scale.train import pretraining

    if cell.problems:
        raise UserError(f"{cell.name}: refused: {cell.problems[0]}")
    if int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0) == 0:
        prepare(cell, sweep, source)
        branch(cell)
        forget_failure(cell, sweep)
    try:
        code = pretraining.pretrain(cell.config)
    except (UserError, Diverged) as error:  # the same on every rank
        if collectives.rank() == 0 and not is_running(cell.path):
            note_failure(cell, sweep, str(error))
        raise
    if code or (cell.path / "requeue").exists() or not read_summary(cell.path).get("finished"):
        return code
    if sweep.evaluate is not None and not collectives.run_on_rank0_and_broadcast(lambda: _evaluated(cell)):
        _evaluate(cell, sweep)
    return 0


def _evaluate(cell: Cell, sweep: Sweep) -> None:
    from esvit_scale.evaluate import features, knn, linear

    assert sweep.evaluate is not None
    train, test = Path(sweep.evaluate.train), Path(sweep.evaluate.test)
    ks = (sweep.evaluate.k, *knn.KS)
    loading = features.ExtractionOptions(
        workers=cell.config.data.workers, cache=cell.path / "features", whole=sweep.evaluate.whole
    )
    for step in evaluated_steps(cell, sweep):
        weights = cell.path if step == cell.steps else cell.path / "checkpoints" / f"step-{step:08d}"
        out = results_of(cell, step)
        if sweep.evaluate.linear:
            linear.run_linear(weights, train, test, out, linear.ProbeSettings(protocols=("logistic",)), loading)
        knn.run_knn(weights, train, test, out, loading, ks=ks)  # last, because its file marks the cell as evaluated


def results_of(cell: Cell, step: int) -> Path:
    """Return the folder of the evaluations of a step's checkpoint: the run dir for the last step."""
    return cell.path if step == cell.steps else cell.path / "evaluations" / f"step-{step:08d}"


def _evaluated(cell: Cell) -> bool:
    path = cell.path / "knn.json"
    return path.is_file() and json.loads(path.read_text()).get("step") == cell.steps


def _failure_path(cell: Cell, sweep: Sweep) -> Path:
    return sweep.folder / "failed" / f"{cell.name}.txt"


def status_table(found: list[Cell], sweep: Sweep) -> str:
    """Return the table that `sweep status` prints."""
    states = [state(cell, sweep) for cell in found]
    lines = [
        f"{cell.index:4d} {cell.name:28s} {s.word:9s} {s.step:>7,d}/{cell.steps:,d}"
        + (f"  {s.reason}" if s.reason else "")
        for cell, s in zip(found, states, strict=True)
    ]
    counts = {word: sum(s.word == word for s in states) for word in dict.fromkeys(s.word for s in states)}
    return "\n".join([*lines, ", ".join(f"{count} {word}" for word, count in counts.items())])


def source_of(sweep: Sweep) -> Path:
    """Return the folder of the shard set that the sweep's base config trains on."""
    base = configs.resolve(sweep.base, list(sweep.overrides))
    return place.open_set(base.data.train, base.data).root


def as_json(found: list[Cell], sweep: Sweep) -> list[dict[str, Any]]:
    """Return the state of every cell as plain values, for `sweep status --json`."""
    states = ((cell, state(cell, sweep)) for cell in found)
    return [{"index": c.index, "name": c.name, "steps": c.steps, **s._asdict()} for c, s in states]
