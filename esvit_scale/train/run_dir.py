"""The run directory: one writer, one config, and everything a run leaves.

The same config resumes, another config is an error with the differences, a finished run is left alone. One process
(rank 0) calls this module; the others are told the outcome (`collectives.run_on_rank0_and_broadcast`).
"""

import json
import logging
import os
import platform
import socket
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from esvit_scale import config as configs
from esvit_scale import files, yaml_text
from esvit_scale.checkpoint import step_folders
from esvit_scale.config import Config
from esvit_scale.errors import UserError
from esvit_scale.machine import usable_cpus

log = logging.getLogger("esvit_scale")

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


# The data's path may also change if the checkpoint records the data's identity, which is then compared instead.
DATA_KEYS = ("data.train", "data.mix")


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
    elif path.is_dir() and any(not _is_ours_before_config(entry.name) for entry in path.iterdir()):
        if _matches_checkpoint(path, config, "is missing"):
            return path, False
        raise UserError(f"{path}: exists but is no run dir (no config.yaml); set name or run_dir to a new one")
    (path / "requeue").unlink(missing_ok=True)
    return path, bool(read_summary(path).get("finished"))


def _is_ours_before_config(name: str) -> bool:
    """Whether a start that has not yet written config.yaml may have left this."""
    made = ("lock.json", "log.txt", "ranks", "shards", "slurm", "requeue")
    return name in made or name.startswith((".lock.json.", ".config.yaml.", ".environment.json."))


def record_start(path: Path, config: Config) -> None:
    """The resolved config and the environment of this start. Call it while holding the lock."""
    files.write_text(path / "config.yaml", configs.dump(config))
    files.write_json(path / "environment.json", _environment())


def read_summary(path: Path) -> dict[str, Any]:
    """Return the run's summary.json; empty when there is none, or a damaged one (the next end writes it again)."""
    try:
        summary = json.loads((path / "summary.json").read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        log.warning("%s: cannot be read: %s; going on without it", path / "summary.json", " ".join(str(error).split()))
        return {}
    return summary if isinstance(summary, dict) else {}


def _check_same(path: Path, config: Config) -> None:
    try:
        matter = _differences(_load_whole(path / "config.yaml"), config)
    except UserError as error:
        if _matches_checkpoint(path, config, "is damaged"):
            return
        raise UserError(
            f"{error}; this is the run's record of its config: copy a good one back, or give this run another name= or run_dir="
        ) from None
    if matter and all(difference.split(":")[0] in DATA_KEYS for difference in matter):
        saved = _saved_state(path)
        if saved is not None and "data" in saved:
            return  # the same data may lie elsewhere: its identity is compared when it is open
    if matter:
        raise UserError(
            f"{path}: holds a run of another config ({'; '.join(matter)}); give this one another name= or run_dir="
        )


def _load_whole(path: Path) -> Config:
    """Load the config.yaml of a run dir.

    Raises:
        UserError: not a config, or cut short: every section is always written.
    """
    missing = {"data", "model", "objective", "optim", "train"} - yaml_text.read(path).keys()
    if missing:
        raise UserError(f"{path}: cut short, it lacks {', '.join(sorted(missing))}")
    return configs.load(path)


def _differences(saved: Config, config: Config) -> list[str]:
    """Return what differs and changes results, `key: saved → given` each."""
    return [d for d in configs.differences(saved, config) if d.split(":")[0] not in MAY_DIFFER]


def _matches_checkpoint(path: Path, config: Config, problem: str) -> bool:
    """Whether the run's checkpoint was made with this config, where config.yaml cannot say so."""
    saved = _saved_state(path)
    if saved is None:
        return False
    try:
        if _differences(configs.validate(saved["config"], where=str(path)), config):
            return False
    except UserError:
        return False
    log.warning(
        "%s: %s; the checkpoint was made with this config, so it is written again", path / "config.yaml", problem
    )
    return True


def _saved_state(path: Path) -> dict[str, Any] | None:
    """Return the state.json of the checkpoint that a resume would try first among those with a sound one."""
    for folder in step_folders.candidates(path):
        try:
            return step_folders.read_state(folder)
        except UserError:
            continue
    return None


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
        "cpus": usable_cpus(),
        "world_size": int(os.environ.get("WORLD_SIZE", 1)),
        "packages": packages,
        "slurm": slurm,
    }
