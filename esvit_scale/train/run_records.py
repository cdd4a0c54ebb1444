"""Readers of a run dir's small JSON files: summary.json, environment.json and lock.json.

Nothing here imports torch, which takes seconds, so that `esvit-scale status` and the first lines of `pretrain` come at
once.
"""

import json
import logging
import math
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

log = logging.getLogger("esvit_scale")

STALE_S = 60  # a lock whose heartbeat is older has no living holder


class LockRecord(NamedTuple):
    """The content of lock.json. `age_s` is None when the heartbeat is unreadable or in the future."""

    host: str
    pid: int
    slurm_job: str
    pid_namespace: str
    token: str
    started: str
    age_s: float | None

    def in_words(self) -> str:
        """Return a description of the lock's holder for messages: process, host, Slurm job and age of the heartbeat."""
        job = f", Slurm job {self.slurm_job}" if self.slurm_job else ""
        age = "a heartbeat in the future" if self.age_s is None else f"heartbeat {self.age_s:.0f} s ago"
        return f"process {self.pid} on {self.host}{job} ({age})"


def read_summary(path: Path, warn: bool = True) -> dict[str, Any]:
    """Return the content of summary.json; empty if it is missing or damaged (the end of the run writes it again)."""
    return _read_json(path / "summary.json", warn)


def read_environment(path: Path) -> dict[str, Any]:
    """Return the content of environment.json, of the last start; empty if it is missing or damaged."""
    return _read_json(path / "environment.json")


def starts_of(environment: dict[str, Any]) -> int:
    """Return how often a run was started, given its environment.json: 0 if there is none, and 1 if it does not say,
    because an older version wrote it or it is damaged."""
    found = environment.get("starts")
    return found if type(found) is int else min(len(environment), 1)


def latest_checkpoint(run: Path) -> Path | None:
    """Return the step folder that checkpoints/latest of a run dir names; None if it names none that exists.

    Nothing in the folder is read; resolve it with step_folders.py before use.
    """
    checkpoints = run / "checkpoints"
    with suppress(OSError, ValueError):
        name = (checkpoints / "latest").read_text().strip()
        if re.fullmatch(r"step-\d+", name) and (checkpoints / name).is_dir():
            return checkpoints / name
    return None


def is_running(run: Path) -> bool:
    """Return whether a process holds the lock of a run dir and wrote a heartbeat in the last minute."""
    try:
        record = parse_lock((run / "lock.json").read_bytes())
    except OSError:
        return False
    return record is not None and record.age_s is not None and record.age_s < STALE_S


def parse_lock(content: bytes) -> LockRecord | None:
    """Return the record in the content of lock.json, or None when it is damaged."""
    try:
        found = json.loads(content)
        pid, beat = int(found["pid"]), float(found["heartbeat"])
        words = [str(found.get(key, "")) for key in ("host", "slurm_job", "pid_namespace", "token", "started")]
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return None
    age = time.time() - beat
    known = math.isfinite(age) and age >= -STALE_S
    host, job, namespace, token, started = words
    return LockRecord(host, pid, job, namespace, token, started, max(age, 0.0) if known else None)


def _read_json(path: Path, warn: bool = True) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        if warn:
            log.warning("%s: cannot be read: %s; continuing without it", path, " ".join(str(error).split()))
        return {}
    return content if isinstance(content, dict) else {}
