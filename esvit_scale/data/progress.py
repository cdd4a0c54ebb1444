"""Lines to the user while long work runs: a bar with rate and ETA on a terminal, plain lines elsewhere."""

import sys
import time
from types import TracebackType

from tqdm import tqdm

EVERY = 10.0  # seconds between plain lines


def say(line: str) -> None:
    """One line on stderr, above the bar if there is one."""
    tqdm.write(line, file=sys.stderr)


class Progress:
    """`with Progress(total, "images") as progress: progress.to(done)`."""

    def __init__(self, total: int, unit: str) -> None:
        tqdm.monitor_interval = 0  # no thread: processes are forked while the bar is there
        self._total, self._unit = total, unit
        self._start = self._last = time.monotonic()
        self._bar = tqdm(total=total, unit=f" {unit}", smoothing=0.05, file=sys.stderr) if sys.stderr.isatty() else None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()

    def to(self, done: int) -> None:
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
            return
        now = time.monotonic()
        if now - self._last >= EVERY:
            self._last, rate = now, done / (now - self._start)
            left = f"{(self._total - done) / rate:.0f} s left" if rate else "no end in sight yet"
            say(f"{done}/{self._total} {self._unit}, {rate:.0f}/s, {left}")
