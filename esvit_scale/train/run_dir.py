"""The run directory: one writer, one config, and everything a run leaves.

The same config resumes, another config is an error with the differences, a finished run is left alone. One process
(rank 0) calls this module; the others are told the outcome (`collectives.on_rank_0`).
"""

import json
import os
import platform
import socket
import threading
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from esvit_scale import config as config_module
from esvit_scale import files
from esvit_scale.config import Config
from esvit_scale.errors import UserError
from esvit_scale.parallel import collectives

HEARTBEAT_S = 10
STALE_S = 60
# What may change between two starts of one run without changing its results.
MAY_DIFFER = (
    "run_dir",
    "data.stage",
    "data.workers",
    "data.held_out",
    "train.ds_config",
    "train.activation_checkpointing",
    "train.compile",
    "train.log_every",
    "train.checkpoint_every",
    "train.checkpoint_minutes",
    "train.keep_checkpoints",
    "train.keep_every",
    "train.hang_minutes",
    "train.knn_every",
    "train.skips_before_rollback",
    "train.rollbacks",
)


def open_run(config: Config) -> "tuple[Path, bool]":
    """The run dir of a config, checked but not yet created; and whether its run is finished already.

    Raises:
        UserError: another config's run, or not a run dir at all.
    """
    path = config.run_path
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: is a file; set run_dir or name to a folder that may be created")
    if (path / "config.yaml").exists():
        _check_same(path, config)
    elif path.is_dir() and any(entry.name not in _OURS_BEFORE_CONFIG for entry in path.iterdir()):
        raise UserError(f"{path}: exists but is no run dir (no config.yaml); set name or run_dir to a new one")
    (path / "requeue").unlink(missing_ok=True)
    return path, bool(read_summary(path).get("finished"))


_OURS_BEFORE_CONFIG = ("lock.json", "log.txt", "shards", "slurm")


def record_start(path: Path, config: Config) -> None:
    """The resolved config and the environment of this start. Call it while holding the lock."""
    files.write_text(path / "config.yaml", config_module.dump(config))
    files.write_json(path / "environment.json", _environment())


def read_summary(path: Path) -> dict[str, Any]:
    summary = path / "summary.json"
    return json.loads(summary.read_text()) if summary.exists() else {}


def _check_same(path: Path, config: Config) -> None:
    differences = config_module.differences(config_module.load(path / "config.yaml"), config)
    matter = [d for d in differences if d.split(":")[0] not in MAY_DIFFER]
    if matter:
        raise UserError(
            f"{path}: holds a run of another config ({'; '.join(matter)}); give this one another name= or run_dir="
        )


def _environment() -> dict[str, Any]:
    packages = {}
    for package in ("esvit-scale", "torch", "torchvision", "timm", "deepspeed", "fairscale", "webdataset", "numpy"):
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            packages[package] = "absent"
    slurm = {k: v for k, v in os.environ.items() if k.startswith("SLURM_") and "TOKEN" not in k}
    return {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "world_size": int(os.environ.get("WORLD_SIZE", 1)),
        "packages": packages,
        "slurm": slurm,
    }


class Lock:
    """One writer per run dir: a file with host, pid, Slurm job and a heartbeat.

    Taken over from the same Slurm job (a requeue), from a dead process of this host, and when the heartbeat is older
    than 60 s.

    All ranks enter and leave it together; rank 0 holds it. A run dir that nothing was written to is gone afterwards.

    Raises:
        UserError: somebody else is writing (on entering).
    """

    def __init__(self, run: Path) -> None:
        self._path = run / "lock.json"
        self._stop = threading.Event()
        self._me = {"host": socket.gethostname(), "pid": os.getpid(), "slurm_job": os.environ.get("SLURM_JOB_ID", "")}
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> "Lock":
        collectives.on_rank_0(self._acquire)
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread.is_alive():
            self._stop.set()
            self._thread.join()
            if self.held():
                self._path.unlink(missing_ok=True)
            with suppress(OSError):  # not empty: the run began
                self._path.parent.rmdir()

    def _acquire(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        holder = self._read()
        if holder and not self._may_take_over(holder):
            age = time.time() - holder["heartbeat"]
            job = f", Slurm job {holder['slurm_job']}" if holder["slurm_job"] else ""
            raise UserError(
                f"{self._path.parent}: in use by process {holder['pid']} on {holder['host']}{job} (heartbeat {age:.0f} s ago); "
                f"stop that run, or wait until its heartbeat is {STALE_S} s old"
            )
        self._write()
        self._thread.start()

    def held(self) -> bool:
        """False when another process took the run over: this one must not write any more."""
        holder = self._read()
        return holder is not None and all(holder[k] == v for k, v in self._me.items())

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            if self.held():
                self._write()

    def _write(self) -> None:
        files.write_json(self._path, {**self._me, "heartbeat": time.time()})

    def _read(self) -> dict[str, Any] | None:
        try:
            return json.loads(self._path.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return None

    def _may_take_over(self, holder: dict[str, Any]) -> bool:
        if self._me["slurm_job"] and holder["slurm_job"] == self._me["slurm_job"]:
            return True
        if holder["host"] == self._me["host"] and not _alive(holder["pid"]):
            return True
        return time.time() - holder["heartbeat"] > STALE_S


def _alive(pid: int) -> bool:
    """A zombie answers signal 0 as well, but writes no more."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state != "Z"
    except FileNotFoundError:
        return False
