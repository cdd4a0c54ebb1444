"""The optional record of a run at Weights & Biases (`train.wandb`), beside metrics.jsonl and TensorBoard."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from esvit_scale import files
from esvit_scale.config import Config
from esvit_scale.errors import UserError

log = logging.getLogger("esvit_scale")

ID_FILE = "wandb-id"  # in the run dir; a resumed run continues the record of this id


def package() -> Any:
    """Return the module wandb, which takes a second to import; None where it is not installed."""
    try:
        import wandb
    except ImportError:
        return None
    return wandb


def require(config: Config) -> None:
    """Raise UserError when the config asks for W&B and it is not installed."""
    if config.train.wandb and package() is None:
        raise UserError(
            "train.wandb: needs the package wandb: pip install 'esvit-scale[wandb]', or leave train.wandb out"
        )


class Wandb:
    """A writer of rows to a W&B run. Rows that it cannot take are missing there, and training goes on.

    W&B's own variables count, for example WANDB_MODE=offline, which writes to the folder wandb/ of the run dir alone.
    """

    def __init__(self, run: Path, config: Config) -> None:
        self._run: Any = None
        wandb = package()
        try:
            self._run = wandb.init(
                project=config.train.wandb,
                name=config.name,
                id=_id(run),
                resume="allow",
                dir=str(run),
                config=config.model_dump(mode="json"),
                settings=wandb.Settings(silent=True, console="off"),
            )
            self._run.define_metric("step")
            # Not W&B's own step, which cannot go back: a resume repeats the rows after its checkpoint.
            self._run.define_metric("*", step_metric="step")
        except Exception as error:  # W&B raises many kinds; none of them is worth a run
            self._fail(error)

    def add(self, row: dict[str, Any]) -> None:
        """Write one row."""
        if self._run is None:
            return
        try:
            self._run.log({key: value for key, value in row.items() if key != "time"})
        except Exception as error:
            self._fail(error)

    def close(self) -> None:
        """Write what is buffered and close the record; a later start continues it."""
        if self._run is not None:
            try:
                self._run.finish()
            except Exception as error:
                self._fail(error)
        self._run = None

    def _fail(self, error: Exception) -> None:
        text = " ".join(str(error).split()) or type(error).__name__
        log.warning("train.wandb: W&B failed: %s; training goes on without it, metrics.jsonl holds every row", text)
        self._run = None


def _id(run: Path) -> str:
    """Return the id of the run's record, which is made at its first start and then read from the run dir."""
    path = run / ID_FILE
    if not path.exists():
        told = json.dumps([str(run.resolve()), (run / "config.yaml").stat().st_mtime_ns])
        files.write_text(path, hashlib.blake2b(told.encode(), digest_size=8).hexdigest() + "\n")
    return path.read_text().strip()
