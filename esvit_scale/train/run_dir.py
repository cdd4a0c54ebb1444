"""The run dir: its checks before a start, its config.yaml, environment.json and summary.json.

The same config resumes the run, another config is an error that lists the differences, and a finished run is left as it
is. Rank 0 calls this module and broadcasts the result (`collectives.run_on_rank0_and_broadcast`).
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
from esvit_scale.checkpoint import state_file, step_folders
from esvit_scale.config import Config
from esvit_scale.errors import UserError
from esvit_scale.machine import processor, usable_cpus
from esvit_scale.run_keys import LENGTH_KEYS, MAY_DIFFER
from esvit_scale.run_stages import key_of
from esvit_scale.train.run_records import read_environment, read_summary, starts_of

log = logging.getLogger("esvit_scale")

# The paths of the data may change, too, if the checkpoint records the identity of the data, which is then compared.
DATA_KEYS = ("data.train", "data.mix")


def open_run(config: Config) -> tuple[Path, bool]:
    """Check the run dir of a config, and remove its requeue marker.

    Returns:
        The path, which may not exist yet, and whether its run is finished and the config does not continue it.

    Raises:
        UserError: the folder holds the run of another config, or is no run dir.
    """
    path = config.run_path
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: is a file; set run_dir or name to a folder that may be created")
    goes_on = False
    if (path / "config.yaml").exists():
        goes_on = _check_same(path, config)
    elif path.is_dir() and any(not _is_ours_before_config(entry.name) for entry in path.iterdir()):
        if _matches_checkpoint(path, config, "is missing"):
            return path, False
        raise UserError(
            f"{path}: exists but is no run dir, because it has no config.yaml; set name or run_dir to a new folder"
        )
    (path / "requeue").unlink(missing_ok=True)
    return path, bool(read_summary(path).get("finished")) and not goes_on


def _is_ours_before_config(name: str) -> bool:
    """Return whether a start may leave a file of this name before it writes config.yaml."""
    written_whole = ("lock.json", "attention.json", "prototype_loss.json", "mirror.json")  # through a partial file
    made = (*written_whole, "log.txt", "ranks", "shards", "slurm", "requeue")
    partial = tuple(f".{name}." for name in (*written_whole, "config.yaml", "environment.json"))
    return name in made or name.startswith(partial)


def record_start(path: Path, config: Config, step: int = 0) -> Config | None:
    """Write the resolved config and the environment of this start, at step `step`. Call it while holding the lock.

    When the run goes on longer than it was planned, also add a line to lengthened.jsonl.

    Returns:
        The config of the shorter run; None when the run has the length that it had.
    """
    shorter = _shorter_config(path, config)
    summary = read_summary(path)
    if summary.get("finished"):  # before config.yaml, so that no start in between takes the longer run for finished
        files.write_json(path / "summary.json", summary | {"finished": False})
    if shorter is not None:
        ends = [c.of_stages[-1].train for c in (shorter, config)]
        lengths: list[dict[str, int]] = [{"steps": c.steps} if c.steps else {"epochs": c.epochs} for c in ends]
        if config.stages:
            lengths = [
                {"stages": len(c.of_stages), **length} for c, length in zip((shorter, config), lengths, strict=True)
            ]
        with (path / "lengthened.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "from": lengths[0], "to": lengths[1]}) + "\n")
    files.write_text(path / "config.yaml", configs.dump(config))
    starts = starts_of(read_environment(path))
    files.write_json(path / "environment.json", {**_environment(), "starts": starts + 1})
    return shorter


def _shorter_config(path: Path, config: Config) -> Config | None:
    """Return the config in the run dir, if the given one makes the run longer."""
    try:
        saved = _load_whole(path / "config.yaml")
    except (OSError, UserError):
        return None
    return saved if is_longer(saved, config) else None


def is_longer(saved: Config, config: Config) -> bool:
    """Return whether `config` makes the run of the config `saved` longer: more epochs, or more steps where it counts
    steps, of its last training stage, or further stages."""
    olds, news = saved.of_stages, config.of_stages
    last = len(olds) - 1
    if len(news) < len(olds) or any(_length(olds[n]) != _length(news[n]) for n in range(last)):
        return False
    return _is_longer(olds[last], news[last]) or (len(news) > len(olds) and _length(olds[last]) == _length(news[last]))


def _length(config: Config) -> tuple[int, int | None]:
    return config.train.epochs, config.train.steps


def _is_longer(saved: Config, config: Config) -> bool:
    old, new = saved.train, config.train
    if old.steps is None and new.steps is None:
        return new.epochs > old.epochs
    return old.steps is not None and new.steps is not None and new.steps > old.steps and new.epochs >= old.epochs


def _may_wait_longer(path: Path, saved: Config, config: Config) -> bool:
    """Return whether the run in a run dir ended early, and `config` has more patience than its config `saved`."""
    summary, before, now = read_summary(path), saved.train.patience, config.train.patience
    step, total = summary.get("step"), summary.get("total_steps")
    ended_early = isinstance(step, int) and isinstance(total, int) and step < total
    return ended_early and before is not None and (now is None or now > before)


def _check_same(path: Path, config: Config) -> bool:
    """Raise UserError when the run dir holds a run of another config; return whether `config` continues a finished run:
    it makes the run longer, or has more patience than one that ended early."""
    try:
        saved_config = _load_whole(path / "config.yaml")
        matter = _differences(saved_config, config)
    except UserError as error:
        if _matches_checkpoint(path, config, "is damaged"):
            return False
        raise UserError(
            f"{error}; a run cannot resume without its config: restore the file, or set name= or run_dir= to start a new run"
        ) from None
    longer = is_longer(saved_config, config)
    goes_on = longer or _may_wait_longer(path, saved_config, config)
    others = [d for d in matter if not (longer and key_of(d) in (*LENGTH_KEYS, "stages"))]
    if others and all(key_of(difference) in DATA_KEYS for difference in others):
        saved = _saved_state(path)
        if saved is not None and "data" in saved:
            return goes_on  # the same data may lie elsewhere: its identity is compared when it is open
    if others:
        lengths = (
            "; a run can be made longer, not shorter: raise train.steps if the run counts steps, else train.epochs"
        )
        hint = lengths if _names(others) <= {*LENGTH_KEYS} else ""
        raise UserError(
            f"{path}: holds a run of another config ({'; '.join(matter)}); set name= or run_dir= to start a new run{hint}"
        )
    return goes_on


def _names(differences: list[str]) -> set[str]:
    return {key_of(difference) for difference in differences}


def _load_whole(path: Path) -> Config:
    """Load the config.yaml of a run dir.

    Raises:
        UserError: not a config, or incomplete: every section is always written.
    """
    missing = {"data", "model", "objective", "optim", "train"} - yaml_text.read(path).keys()
    if missing:
        raise UserError(f"{path}: is incomplete, it has no section {', '.join(sorted(missing))}")
    return configs.load(path)


def _differences(saved: Config, config: Config) -> list[str]:
    """Return the differences between two configs that can change results, each as `key: saved → given`."""
    found = configs.differences(saved, config)
    return [d for d in found if not any(f"{key_of(d)}.".startswith(f"{key}.") for key in MAY_DIFFER)]


def _matches_checkpoint(path: Path, config: Config, problem: str) -> bool:
    """Return whether the run's checkpoint was made with this config; used when config.yaml is missing or damaged."""
    saved = _saved_state(path)
    if saved is None:
        return False
    try:
        of_checkpoint = configs.validate(saved["config"], where=str(path))
        if all(_differences(of_checkpoint, stage) for stage in config.of_stages):
            return False
    except UserError:
        return False
    log.warning(
        "%s: %s; the checkpoint was made with this config, so it is written again", path / "config.yaml", problem
    )
    return True


def _saved_state(path: Path) -> dict[str, Any] | None:
    """Return the first state.json that can be read, of the checkpoints in the order in which a resume tries them; else
    None."""
    for folder in step_folders.candidates(path):
        try:
            return state_file.read_state(folder)
        except UserError:
            continue
    return None


def _environment() -> dict[str, Any]:
    import torch  # the header reads this module before torch is loaded

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
        "processor": processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpus": usable_cpus(),
        "world_size": int(os.environ.get("WORLD_SIZE", 1)),
        "packages": packages,
        "slurm": slurm,
    }
