"""The progress of a run on the console: on a terminal a bar and a line of figures below it, elsewhere a line per row.

log.txt has the line of every row in both cases.
"""

import logging
import os
import sys
import threading
import time
from contextlib import nullcontext
from typing import Any

from tqdm import tqdm

from esvit_scale.train import accuracies

log = logging.getLogger("esvit_scale")

FIRST_STEPS = 3  # steps after the first, which is slower, over which the duration of the run is estimated
FIRST_SECONDS = 2.0  # … and at least this long
WAITING = "waiting for the first step …"
UNKNOWN_SIZE = {"ncols": 100, "nrows": 20}  # of a terminal that does not tell its own, as under `script`
ONLY_IN_FILE = {"only_in_file": True}  # `extra` of log records that the console does not show


class ConsoleHandler(logging.StreamHandler[Any]):
    """The console's log handler: it writes above the bar, if there is one, and leaves out ONLY_IN_FILE records."""

    def __init__(self) -> None:
        super().__init__()
        self.addFilter(lambda record: not getattr(record, "only_in_file", False))

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        with tqdm.external_write_mode(self.stream) if self.stream.isatty() else nullcontext():
            super().emit(record)


class Console:
    """The progress display of rank 0."""

    def __init__(self, total_steps: int, step: int, knn: float | None = None, from_weights: bool = False) -> None:
        """
        Args:
            total_steps: number of steps of the run.
            step: number of steps that are done.
            knn: the k-NN accuracy that was measured last; None if none was.
            from_weights: whether the run starts from weights, and not from an untrained trunk.
        """
        self._total, self._start, self._began = total_steps, step, time.monotonic()
        self._first_done: tuple[int, float] | None = None  # the first step of this start, and when it was done
        self._has_estimated = False
        self._knn = "" if knn is None else _knn_text(knn)
        self._at_step_0 = "with the weights at the start" if from_weights else "with the untrained trunk"
        self._bar = self._figures = None
        if sys.stderr.isatty():
            tqdm.monitor_interval = 0  # no thread: loader processes are forked while the bar is there
            tqdm.set_lock(threading.RLock())  # and no lock that they share: one that is killed would keep it
            width: dict[str, Any] = {"dynamic_ncols": True} if _columns() else UNKNOWN_SIZE
            self._bar = tqdm(total=total_steps, initial=step, unit="step", smoothing=0.05, **width)
            self._figures = tqdm(total=0, position=1, bar_format="{desc}", leave=False, **width)
            self._figures.set_description_str(WAITING)

    def advance(self, step: int) -> None:
        """Note that `step` steps are done."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            if self._figures is not None and self._figures.desc == WAITING:
                self._figures.set_description_str("the loss follows with the first logged step …")
        if not self._has_estimated:
            self._estimate(step)

    def row(self, row: dict[str, Any]) -> None:
        """Show a row of metrics.jsonl: its k-NN accuracy in a line of its own, and its loss and rates."""
        if "knn_top1" in row:
            self._knn = _knn_text(row["knn_top1"])
            pixels = row.get("knn_top1_pixels")
            note = "" if row["step"] else f" {self._at_step_0}"
            note += f"; {100 * pixels:.1f} % with raw pixels" if pixels is not None else ""
            if self._bar is not None or "loss" not in row:  # elsewhere, the line of the row has it
                log.info("step %d/%d · %s on held-out images%s", row["step"], self._total, self._knn, note)
        if "top1" in row:
            self._knn = f"top-1 {100 * row['top1']:.1f} %"
            log.info("step %d/%d · %s on held-out images", row["step"], self._total, accuracies.in_words(row))
        if "neighbours_kept" in row:
            self._knn = f"rank {row['held_out_rank']:.1f} · {100 * row['neighbours_kept']:.0f} % of neighbours kept"
            if self._bar is not None or "loss" not in row:
                log.info("step %d/%d · %s on held-out images", row["step"], self._total, self._knn)
        if "loss" not in row:
            return
        text = figures(row, self._knn)
        if self._figures is not None:
            self._figures.set_description_str(text)
        done = row["step"] - self._start
        left = (time.monotonic() - self._began) / max(1, done) * (self._total - row["step"])
        extra = ONLY_IN_FILE if self._bar is not None else None
        log.info("step %d/%d · %s · ETA %s", row["step"], self._total, text, duration(left), extra=extra)

    def close(self) -> None:
        """Leave the bar as it is, and remove the line of figures."""
        for bar in (self._figures, self._bar):
            if bar is not None:
                bar.close()

    def _estimate(self, step: int) -> None:
        """Log how long the rest of the run will take, once the first steps have shown it."""
        now = time.monotonic()
        if self._first_done is None:
            self._first_done = (step, now)
            return
        steps, seconds = step - self._first_done[0], now - self._first_done[1]
        if steps < FIRST_STEPS or seconds < FIRST_SECONDS:
            return
        self._has_estimated = True
        left = seconds / steps * (self._total - step)
        if left < FIRST_SECONDS:
            return
        end = time.strftime("%a %d %b %H:%M", time.localtime(time.time() + left))
        log.info(
            "%.3g s a step: %s for the %d steps left, until about %s",
            seconds / steps,
            duration(left),
            self._total - step,
            end,
        )


def _knn_text(accuracy: float) -> str:
    return f"k-NN {100 * accuracy:.1f} %"


def _columns() -> int:
    """Return the width of the terminal; 0 if it does not tell."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError):
        return 0


def figures(row: dict[str, Any], knn: str = "") -> str:
    """Return the figures of a row as text: loss and its parts, images/s, the wait for data, and the last k-NN."""
    parts = [f"{part} {row[f'loss_{part}']:.4f}" for part in ("view", "region") if f"loss_{part}" in row]
    shown = [
        f"loss {row['loss']:.4f}" + (f" ({', '.join(parts)})" if parts else ""),
        f"{row['images_per_s']:.1f} images/s",
    ]
    if "data_wait_s" in row and row.get("step_s"):
        shown.append(f"data wait {row['data_wait_s'] / row['step_s']:.0%}")
    return " · ".join([*shown, knn] if knn else shown)


def duration(seconds: float) -> str:
    """Return a time in hours, minutes and seconds, such as 1:02:03."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}"
