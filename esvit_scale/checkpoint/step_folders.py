"""Finding, verifying and removing a run's step folders (checkpoints), and choosing the one to resume from.

checkpoints/step-00000100/ holds tensors (storage.py) and state.json (state_file.py). The text file checkpoints/latest
names the newest folder. Users may edit it to resume from another; if it is missing or damaged, the newest undamaged
folder is used.
"""

import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from esvit_scale import files
from esvit_scale.checkpoint import safetensors_file, state_file, storage, zoo
from esvit_scale.config import Config
from esvit_scale.errors import RestartCanHelp, UserError, is_machine_fault
from esvit_scale.parallel import collectives

log = logging.getLogger("esvit_scale")

RETRY_DELAYS = (1, 3, 6)  # seconds between attempts to read a file: network storage often recovers
LATEST, BEST = "latest", "best"  # files that name a step folder
_STEP = re.compile(r"step-(\d{8,})")
_held: list[Path] = []  # step folders that `prune` leaves, because this process reads them
_pruning = threading.Lock()


def step_of(folder: Path) -> int | None:
    """Return the step number in the name of a step folder; None for a folder with another name."""
    found = _STEP.fullmatch(folder.name)
    return int(found[1]) if found else None


def list_step_folders(run: Path) -> list[Path]:
    """Return the step folders of a run in ascending order of their steps; ignore everything else in checkpoints/.

    Raises:
        UserError: checkpoints/ is not a folder, or is a dangling link.
    """
    checkpoints = run / "checkpoints"
    if not os.path.lexists(checkpoints):
        return []
    if not checkpoints.is_dir():
        what = "a link that leads nowhere" if checkpoints.is_symlink() else "not a folder"
        raise UserError(f"{checkpoints}: is {what}; repair it, or move it away to start from step 0")
    found = {step: path for path in checkpoints.iterdir() if (step := step_of(path)) is not None and path.is_dir()}
    return [found[step] for step in sorted(found)]


def has_checkpoints(run: Path) -> bool:
    """Return whether a run has any step folder, even a damaged one."""
    return bool(list_step_folders(run))


def latest(run: Path) -> Path | None:
    """Return the step folder that a resume tries first; None if the run has none."""
    return next(iter(candidates(run)), None)


def candidates(run: Path) -> list[Path]:
    """Return a run's step folders in the order in which a resume tries them.

    The order, newest first within each group, is:

    1. folders that were finished after `latest` was written: the process died, or the disk was full, before it could
       update `latest`;
    2. the folder that checkpoints/latest names, since a user may have made it name an older checkpoint to resume from;
    3. folders of earlier steps than that one;
    4. the other folders of later steps.

    Without a usable `latest`, log a warning and return all folders, newest first.
    """
    found = list_step_folders(run)
    if not found:
        return []
    pointer = run / "checkpoints" / "latest"
    named, problem = _read_pointer(pointer, found)
    if named is None:
        log.warning(
            "%s: %s; resuming does not need it: trying the newest of %d checkpoints", pointer, problem, len(found)
        )
        return found[::-1]
    at = found.index(named)
    newer = found[at + 1 :]
    unnamed = [folder for folder in newer if _finished_at(folder) > pointer.stat().st_mtime_ns]
    return [*unnamed[::-1], *found[at::-1], *(folder for folder in newer[::-1] if folder not in unnamed)]


def newest_valid(run: Path) -> Path | None:
    """Return the first of a run's `candidates` whose files are all undamaged; None if the run has no checkpoints.

    Damaged folders are logged and skipped. All ranks call it and get the same result.

    Raises:
        UserError: all checkpoints are damaged.
        RestartCanHelp: no undamaged checkpoint was found, and at least one could not be read because the storage
            failed.
    """
    tried = collectives.run_on_rank0_and_broadcast(lambda: candidates(run))
    first, machine = "", False
    for folder in tried:
        found, unreadable = _problems_on_all_ranks(folder)
        if not found:
            return folder
        first, machine = first or f"{folder.name}: {found[0]}", machine or unreadable
        if collectives.rank() == 0:
            log.warning("%s is damaged (%s); trying another checkpoint", folder, "; ".join(found[:3]))
    if machine:
        raise RestartCanHelp(
            f"{run / 'checkpoints'}: no checkpoint could be read ({first}); check the storage, then start again"
        )
    if tried:
        raise UserError(
            f"{run / 'checkpoints'}: every checkpoint is damaged ({len(tried)} tried; {first}); "
            "copy an undamaged one back, or move the folder away to start from step 0"
        )
    return None


def resolve(checkpoint: Path) -> Path:
    """Return the step folder that `checkpoint` (a run dir or step folder) stands for.

    For a run dir it is the first of the `candidates` whose state.json is undamaged. Any other folder is returned as it
    is.

    Raises:
        UserError: the path does not exist or is a file, or the run dir has no checkpoint yet, or only damaged ones.
    """
    if not checkpoint.exists():
        raise UserError(f"{checkpoint}: no such checkpoint; give a run dir or one of its step folders")
    if checkpoint.is_file():
        raise UserError(
            f"{checkpoint}: neither a run dir, a step folder nor a {safetensors_file.SUFFIX} file; for an official checkpoint: "
            f"esvit-scale convert {checkpoint} {checkpoint.stem}{safetensors_file.SUFFIX} --from esvit --to safetensors"
        )
    if not (checkpoint / "checkpoints").is_dir():
        return checkpoint
    found = candidates(checkpoint)
    if not found:
        raise UserError(f"{checkpoint}: has no checkpoint yet; the first is written after train.checkpoint_every steps")
    for folder in found:
        try:
            state_file.read_state(folder)
        except UserError as error:
            log.warning("%s; trying another checkpoint", error)
        else:
            return folder
    raise UserError(f"{checkpoint}: every checkpoint is damaged ({len(found)} tried)")


def write_latest(folder: Path) -> None:
    """Write the name of `folder` into checkpoints/latest.

    If that fails, log a warning and remove `latest`, so that it does not name an older folder.
    """
    pointer = folder.parent / "latest"
    try:
        if pointer.is_dir() and not pointer.is_symlink():
            pointer.rename(pointer.with_name("latest.was-a-folder"))
        files.write_text(pointer, folder.name + "\n")
    except OSError as error:
        log.warning(
            "%s: could not be written: %s; a resume finds the newest checkpoint without it", pointer, error.strerror
        )
        try:
            pointer.unlink()
        except OSError:
            log.warning("%s: could not be removed either", pointer)


def write_best(folder: Path) -> None:
    """Write the name of `folder` into checkpoints/best; if that fails, log a warning."""
    try:
        files.write_text(folder.parent / BEST, folder.name + "\n")
    except OSError as error:
        log.warning("%s: could not be written: %s", folder.parent / BEST, error.strerror or error)


def best(run: Path) -> Path | None:
    """Return the step folder that checkpoints/best names; None if there is none."""
    return _read_pointer(run / "checkpoints" / BEST, list_step_folders(run))[0]


def follow_pointer(checkpoint: Path) -> Path:
    """Return the step folder that a path to checkpoints/best or checkpoints/latest names, or the shipped folder of
    `zoo:NAME`; any other path as it is.

    Raises:
        UserError: the file names no step folder that is there, or the zoo has no backbone of this name.
    """
    checkpoint = zoo.located(checkpoint)
    if checkpoint.name not in (BEST, LATEST) or not checkpoint.is_file():
        return checkpoint
    named, problem = _read_pointer(checkpoint, list_step_folders(checkpoint.absolute().parent.parent))
    if named is None:
        raise UserError(f"{checkpoint}: {problem}; give a run dir or one of its step folders")
    return named


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep `prune` from removing a step folder during the block; a later call removes it."""
    with _pruning:
        _held.append(folder)
    try:
        yield
    finally:
        with _pruning:
            _held.remove(folder)


def prune(newest: Path, config: Config) -> None:
    """Remove checkpoints before `newest`, except the last `train.keep_checkpoints`, multiples of `train.keep_every`, the
    one that checkpoints/best names, and those that are `held`.

    Checkpoints of later steps than `newest` are not removed: the run was resumed from an older checkpoint and will
    write those steps again. A checkpoint that cannot be removed is only logged, since it costs no more than disk space.
    """
    keep_every, last = config.train.keep_every, step_of(newest) or 0
    kept = (newest, best(newest.parent.parent))
    folders = [(step_of(folder) or 0, folder) for folder in list_step_folders(newest.parent.parent)]
    for step, old in [(step, folder) for step, folder in folders if step <= last][: -config.train.keep_checkpoints]:
        if old in kept or (keep_every and step % keep_every == 0):
            continue
        removed = old.with_name(f".{old.name}.removed.partial")  # readers must not see it half removed
        try:
            shutil.rmtree(removed, ignore_errors=True)
            with _pruning:
                if old in _held:
                    continue
                old.rename(removed)
            shutil.rmtree(removed)
        except OSError as error:
            left = old if old.exists() else removed
            log.warning("%s: could not be removed: %s; training goes on", left, error.strerror or error)


def remove_unfinished(run: Path) -> None:
    """Remove the unfinished folders in checkpoints/ and the temporary files in the run dir that interrupted saves left.

    Call it on rank 0 while holding the run's lock, so that no other process is saving this run.
    """
    checkpoints = run / "checkpoints"
    saves = sorted(checkpoints.glob(".*.partial")) if checkpoints.is_dir() else []
    ours = ["config.yaml", "environment.json", "summary.json", "metrics.jsonl", "quarantine.jsonl", "requeue"]
    ours += ["mirror.json"]
    left = [*saves, *(path for name in ours for path in run.glob(f".{name}.*.partial"))]
    for path in left:
        try:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        except OSError as error:
            log.warning("%s: left by an interrupted save, could not be removed: %s", path, error.strerror or error)
    if saves:
        log.info("%s: removed %d unfinished saves of interrupted processes", checkpoints, len(saves))


def _read_pointer(pointer: Path, found: list[Path]) -> tuple[Path | None, str]:
    """Return the folder among `found` that the file `pointer` (`latest`) names, and ""; or None and what is wrong."""
    try:
        text = pointer.read_bytes()[:200].decode("ascii", "replace").strip()
    except FileNotFoundError:
        return None, "is missing"
    except OSError as error:
        return None, f"cannot be read ({error.strerror})"
    named = next((folder for folder in found if folder.name == text), None)
    if named is not None:
        return named, ""
    is_name = _STEP.fullmatch(text) is not None
    return None, f"names {text}, which is not there" if is_name else "does not name a checkpoint"


def _finished_at(folder: Path) -> int:
    """Return the modification time of a step folder's state.json in ns; 0 if it cannot be read."""
    try:
        return (folder / state_file.STATE).stat().st_mtime_ns
    except OSError:
        return 0


def _problems_on_all_ranks(folder: Path) -> tuple[list[str], bool]:
    """Return the problems of a step folder, one line each, and whether one of them is a failure of the storage.

    All ranks call it and get the same result; every rank verifies its share of the files.
    """
    recorded, found, machine = collectives.run_on_rank0_and_broadcast(lambda: _recorded_files(folder))
    for name in sorted(recorded)[collectives.rank() :: collectives.world_size()]:
        lines, fault = _with_retries(lambda name=name: storage.file_problems(folder / Path(name).name, recorded[name]))  # type: ignore[misc]
        found, machine = found + lines, machine or fault
    answers = collectives.gather_objects((found, machine))
    return list(dict.fromkeys(line for lines, _ in answers for line in lines)), any(fault for _, fault in answers)


def _recorded_files(folder: Path) -> tuple[dict[str, Any], list[str], bool]:
    """Return the files that state.json records, the problems of state.json itself, and whether the storage failed."""
    recorded: dict[str, Any] = {}

    def look() -> list[str]:
        try:
            state = state_file.read_state(folder)
        except UserError as error:
            return [str(error).removeprefix(f"{folder}{os.sep}")]
        if state["cursor"]["step"] != step_of(folder):
            return [f"{state_file.STATE} is of step {state['cursor']['step']}"]
        recorded.update(state["files"])
        return [] if recorded else [f"{state_file.STATE} records no files"]

    lines, fault = _with_retries(look)
    return recorded, lines, fault


def _with_retries(look: Callable[[], list[str]]) -> tuple[list[str], bool]:
    """Return the list that `look` returns, and whether the storage failed even after retries (RETRY_DELAYS).

    If `look` still raises OSError in the end, the list holds only that error's message.
    """
    for delay in (*RETRY_DELAYS, None):
        try:
            return look(), False
        except OSError as error:
            if delay is None or not is_machine_fault(error):
                return [f"{Path(error.filename or '').name}: {error.strerror or error}"], is_machine_fault(error)
            time.sleep(delay)
    raise AssertionError
