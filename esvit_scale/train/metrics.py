"""The records that a run writes during training: metrics.jsonl, quarantine.jsonl, TensorBoard, log.txt and the console.

metrics.jsonl has one JSON object per logged step. A resume removes the rows after its checkpoint, so that an
interrupted run leaves the same file as an undisturbed one, except for TIME_FIELDS.
"""

import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from esvit_scale import files
from esvit_scale.config import Config
from esvit_scale.errors import in_words
from esvit_scale.train import learning, row_file, tracking
from esvit_scale.train.console import Console, ConsoleHandler
from esvit_scale.train.log_format import FileFormatter
from esvit_scale.train.row_file import RowFile, read_rows

log = logging.getLogger("esvit_scale")

RETRY_S = 60  # seconds after which writing TensorBoard's files is tried again

# Fields that differ between two runs of the same config, because a clock measured them.
TIME_FIELDS = frozenset(
    {"images_per_s", "mfu", "data_wait_s", "worker_images_per_s", "worker_images_per_s_min", "step_s", "time"}
    | {"compute_s_max", "compute_s_median", "slowest_node", "save_s", "mirror_lag_steps", "peak_memory_gib"}
)


def cut(path: Path, last_step: int) -> None:
    """Remove the rows after `last_step` from a file, because a resumed run writes them again; keep rows of steps that
    were rolled back."""
    row_file.cut(path, lambda row: row["step"] <= last_step or bool(row.get("rolled_back")))


class MetricLogger:
    """The writer of a run's records. On ranks other than 0 (`active=False`) it does nothing.

    `open` and `rewind` change existing files. Call them through `collectives.run_on_rank0_and_broadcast`, so that an
    error of rank 0 is raised on every rank.

    Attributes:
        bad: number of samples that were replaced since the run began.
    """

    def __init__(self, run: Path, total_steps: int, active: bool, config: Config | None = None) -> None:
        """
        Args:
            active: whether this is rank 0.
            config: the run's, for a record at W&B if it asks for one; None: no such record.
        """
        self._active, self._config = active, config
        self._from_weights = config is not None and config.model.init_from is not None
        self.bad = 0
        self._run, self._total = run, total_steps

    def open(self, step: int) -> None:
        """Remove the rows after `step` from the files, and open them.

        Raises:
            UserError: a path is not a file, or must not be read.
            OSError: a file could not be written.
        """
        if not self._active:
            return
        cut(self._run / "metrics.jsonl", step or -1)  # a new start measures step 0 again
        cut(self._run / "quarantine.jsonl", step)
        self.bad = sum(not row.get("used") for row in read_rows(self._run / "quarantine.jsonl"))
        self._metrics = RowFile(self._run / "metrics.jsonl")
        self._quarantine = RowFile(self._run / "quarantine.jsonl")
        self._board = TensorBoard(self._run / "tensorboard", step)
        self._wandb = tracking.Wandb(self._run, self._config) if self._config and self._config.train.wandb else None
        self._console = Console(self._total, step, self._last_knn(), self._from_weights)

    def _last_knn(self) -> float | None:
        """Return the k-NN accuracy that was measured last; None if this start measures none, or on other images."""
        if self._config is None or not self._config.train.knn_every:
            return None
        found = learning.history_of(read_rows(self._run / "metrics.jsonl"))
        is_same = found.held_out in ("", self._config.data.held_out)
        return found.measured[-1][1] if found.measured and is_same else None

    def rewind(self, step: int) -> None:
        """Go back to `step` for a roll-back, but keep the quarantined samples of the steps since then. Raises the same
        errors as `open`."""
        if not self._active:
            return
        self.close()
        path = self._run / "quarantine.jsonl"
        rows = [row | {"rolled_back": True} if row["step"] > step else row for row in read_rows(path)]
        try:
            files.write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        except OSError as error:
            log.warning("%s; the samples of the steps that were rolled back are not recorded", in_words(error))
        self.open(step)

    def not_finite(self, step: int, keys: list[str], what: str) -> None:
        """Record the samples of a skipped step in quarantine.jsonl; training may see them again.

        Args:
            keys: keys of the samples.
            what: "the loss was" or "gradients were", as the beginning of "… not finite".
        """
        if not self._active:
            return
        for key in keys:
            self._quarantine.append({"step": step, "key": key, "reason": f"{what} not finite at this step"})
        log.warning(
            "step %d: %s not finite; the step was skipped and no weight changed (its %d samples: quarantine.jsonl)",
            *(step, what, len(keys)),
        )

    def row(self, row: dict[str, Any]) -> None:
        """Write the row of a logged step."""
        if not self._active:
            return
        self._metrics.append(row)
        self._board.add(row)
        if self._wandb:
            self._wandb.add(row)
        self._console.row(row)

    def bad_samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        """Record samples that were replaced, or were slow to read, and samples that streaming left out."""
        if not self._active:
            return
        for sample in samples:
            self._quarantine.append({"step": step, **sample})
            self.bad += not sample.get("used")
            if "left_out" in sample:
                log.warning("step %d: %s: %s", step, sample["shard"], sample["reason"])
                continue
            what = "a slow sample" if sample.get("used") else "replaced a bad sample"
            what = "left out a bad member of" if sample.get("member") else what
            log.warning("step %d: %s: %s in %s: %s", step, what, sample["key"], sample["shard"], sample["reason"])

    def advance(self, step: int) -> None:
        """Move the progress bar to `step`."""
        if self._active:
            self._console.advance(step)

    def close(self) -> None:
        """Close all files."""
        if not self._active:
            return
        self._metrics.close()
        self._quarantine.close()
        self._board.close()
        if self._wandb:
            self._wandb.close()
        self._console.close()


class TensorBoard:
    """A writer of rows as TensorBoard scalars. Rows that cannot be written are missing there, and training goes on."""

    def __init__(self, folder: Path, step: int) -> None:
        self._folder = folder
        self._writer: Any = None
        self._retry_at = 0.0
        self._is_failing = False
        try:
            from torch.utils import tensorboard
        except ImportError:
            log.info(
                "TensorBoard is not installed, so there will be no tensorboard/; pip install 'esvit-scale[tracking]' adds it"
            )
            return
        self._make: Callable[[int], Any] = lambda step: tensorboard.SummaryWriter(str(folder), purge_step=step)
        self._open(step + 1)

    def add(self, row: dict[str, Any]) -> None:
        """Write the numbers of one row as scalars at its step."""
        if self._writer is None and self._is_failing and time.monotonic() > self._retry_at:
            self._open(row["step"])
        if self._writer is None:
            return
        try:
            for key, value in row.items():
                if key not in ("step", "time") and not isinstance(value, str):
                    self._writer.add_scalar(key, value, row["step"])
        except OSError as error:  # its writing thread failed and never recovers, so another writer is made later
            self._fail(error)

    def close(self) -> None:
        """Write what is buffered and close the files."""
        if self._writer is not None:
            with suppress(OSError):
                self._writer.close()
            self._writer = None

    def _open(self, step: int) -> None:
        _silence_tensorboard_threads()
        try:
            self._writer = self._make(step)
        except OSError as error:
            self._fail(error)
        else:
            self._is_failing = False

    def _fail(self, error: OSError) -> None:
        if not self._is_failing:
            log.warning(
                "%s: cannot be written: %s; metrics.jsonl holds every row", self._folder, error.strerror or error
            )
        self._is_failing, self._retry_at = True, time.monotonic() + RETRY_S
        self.close()


def _silence_tensorboard_threads() -> None:
    """Keep tracebacks of TensorBoard's writing thread off the console; `TensorBoard.add` gets the same error."""
    default = threading.excepthook
    if getattr(default, "__name__", "") == "_without_tensorboard":
        return

    def _without_tensorboard(told: Any) -> None:
        if not (isinstance(told.exc_value, OSError) and type(told.thread).__module__.startswith("tensorboard")):
            default(told)

    threading.excepthook = _without_tensorboard


class _LogFile(logging.FileHandler):
    """The handler of log.txt. When the file cannot be written, the console says so once and still has every line.

    A start that fails leaves no file: until the run dir has its config.yaml, records below a warning wait in memory.
    """

    _has_said = False

    def __init__(self, run: Path) -> None:
        super().__init__(run / "log.txt", delay=True)
        self._config, self._waiting = run / "config.yaml", list[logging.LogRecord]()

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record and those that waited, or keep it while a start may still fail; FileHandler would make the file."""
        self._waiting.append(record)
        if self.stream is None and record.levelno < logging.WARNING and not self._config.exists():
            return
        waiting, self._waiting = self._waiting, []
        for one in waiting:
            try:
                super().emit(one)
            except OSError:  # the file could not be made
                self.handleError(one)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Say once on the console that the file cannot be written, where FileHandler would print a traceback each time."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._has_said:
            self._has_said = True
            with suppress(OSError):
                print(f"{self.baseFilename}: cannot be written: {error.strerror}", file=sys.stderr)


def start_logging(run: Path, active: bool) -> None:
    """Log to log.txt and the console on rank 0, and only warnings, to the console, on the other ranks."""
    log.handlers.clear()
    log.propagate = False
    log.setLevel(logging.INFO if active else logging.WARNING)
    handlers: list[logging.Handler] = [ConsoleHandler()]
    if active:
        handlers.append(_LogFile(run))
    for handler in handlers:
        plain = logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S")
        handler.setFormatter(FileFormatter() if isinstance(handler, _LogFile) else plain)
        log.addHandler(handler)


@contextmanager
def log_file_errors() -> Iterator[None]:
    """Log an OSError raised in this context instead of passing it on; for writing files that the run can do without."""
    try:
        yield
    except OSError as error:
        log.warning("%s", in_words(error))
