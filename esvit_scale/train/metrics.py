"""What a run says while it trains: metrics.jsonl, TensorBoard, log.txt and one line on the console.

Rows of metrics.jsonl are one object per logged step. On resume the file is cut at the cursor, so that an interrupted
run's file equals an undisturbed one's (time and rate fields apart).
"""

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from esvit_scale import files

log = logging.getLogger("esvit_scale")

# Fields that differ between two runs of the same config: everything measured by a clock.
TIME_FIELDS = frozenset(
    {"images_per_s", "mfu", "data_wait_s", "worker_images_per_s", "worker_images_per_s_min", "step_s", "time"}
)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The complete rows of a .jsonl file; a last line cut off by a crash is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def cut(path: Path, last_step: int) -> None:
    """Drops the rows after `last_step`: a resumed run writes them again (but not what a roll-back left behind)."""
    if path.exists():
        rows = [row for row in read_rows(path) if row["step"] <= last_step or row.get("rolled_back")]
        files.write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


class Journal:
    """The open files of rank 0; every other rank has none and its calls do nothing."""

    def __init__(self, run: Path, total_steps: int, step: int, active: bool) -> None:
        self._active = active
        self.bad = 0  # samples replaced since the run began
        if active:
            self._run, self._total = run, total_steps
            self._open(step)

    def _open(self, step: int) -> None:
        cut(self._run / "metrics.jsonl", step)
        cut(self._run / "quarantine.jsonl", step)
        self.bad = sum(not row.get("used") for row in read_rows(self._run / "quarantine.jsonl"))
        self._metrics = (self._run / "metrics.jsonl").open("a")
        self._quarantine = (self._run / "quarantine.jsonl").open("a")
        self._board = _tensorboard(self._run / "tensorboard", step)
        self._console = _Console(self._total, step)

    def rewind(self, step: int) -> None:
        """The run went back to `step`: its curves go on from there; what was quarantined since then stays."""
        if not self._active:
            return
        self.close()
        path = self._run / "quarantine.jsonl"
        rows = [row | {"rolled_back": True} if row["step"] > step else row for row in read_rows(path)]
        files.write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        self._open(step)

    def not_finite(self, step: int, keys: list[str]) -> None:
        """A skipped step names its samples; they are not excluded."""
        if not self._active:
            return
        for key in keys:
            _append(self._quarantine, {"step": step, "key": key, "reason": "gradients were not finite at this step"})
        log.warning(
            "step %d: gradients were not finite; the step was skipped, nothing moved (its %d samples: quarantine.jsonl)",
            *(step, len(keys)),
        )

    def row(self, row: dict[str, Any]) -> None:
        """One logged step: numbers only."""
        if not self._active:
            return
        _append(self._metrics, row)
        for key, value in row.items():
            if self._board is not None and key not in ("step", "time"):
                self._board.add_scalar(key, value, row["step"])
        self._console.row(row)

    def bad_samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        if not self._active:
            return
        for sample in samples:
            _append(self._quarantine, {"step": step, **sample})
            self.bad += not sample.get("used")
            if "left_out" in sample:
                log.warning("step %d: %s: %s", step, sample["shard"], sample["reason"])
                continue
            what = "a slow sample" if sample.get("used") else "replaced a bad sample"
            log.warning("step %d: %s: %s in %s: %s", step, what, sample["key"], sample["shard"], sample["reason"])

    def advance(self, step: int) -> None:
        if self._active:
            self._console.advance(step)

    def close(self) -> None:
        if not self._active:
            return
        self._metrics.close()
        self._quarantine.close()
        if self._board is not None:
            self._board.close()
        self._console.close()


class _Console:
    """A progress bar on a terminal, plain lines in a log file."""

    def __init__(self, total_steps: int, step: int) -> None:
        self._total, self._start, self._began = total_steps, step, time.monotonic()
        terminal = sys.stderr.isatty()
        self._bar = tqdm(total=total_steps, initial=step, unit="step", dynamic_ncols=True) if terminal else None

    def advance(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def row(self, row: dict[str, Any]) -> None:
        parts = [f"loss {row['loss']:.4f}"]
        parts += [f"{part} {row[f'loss_{part}']:.4f}" for part in ("view", "region") if f"loss_{part}" in row]
        parts += [f"{row['images_per_s']:.1f} images/s"]
        if self._bar is not None:
            self._bar.set_postfix_str(" · ".join(parts))
            return
        done = row["step"] - self._start
        left = (time.monotonic() - self._began) / max(1, done) * (self._total - row["step"])
        log.info("step %d/%d · %s · ETA %s", row["step"], self._total, " · ".join(parts), _duration(left))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _duration(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}"


def _append(file: TextIO, row: dict[str, Any]) -> None:
    file.write(json.dumps(row) + "\n")
    file.flush()


def _tensorboard(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        log.info("TensorBoard is not installed: no tensorboard/ (pip install 'esvit-scale[tracking]')")
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)


def start_logging(run: Path, active: bool) -> None:
    """log.txt and the console on rank 0; warnings on the console from the others."""
    log.handlers.clear()
    log.propagate = False
    log.setLevel(logging.INFO if active else logging.WARNING)
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if active:
        handlers.append(logging.FileHandler(run / "log.txt", delay=True))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        log.addHandler(handler)
