"""Display of progress on stderr: on a terminal a bar with rate and time left, elsewhere a line every ten seconds."""

import sys
import time
from types import TracebackType

from tqdm import tqdm

EVERY = 10.0  # seconds between plain lines


def say(line: str) -> None:
    """Print one line on stderr, above the bar if there is one."""
    tqdm.write(line, file=sys.stderr)


class Progress:
    """A display of how much of a total is done: `with Progress(total, "images") as progress: progress.to(done)`.

    Args:
        name: what is being done, shown first on every line and bar.
        keep: leave the finished bar on the terminal.
    """

    def __init__(self, total: int, unit: str, name: str = "", keep: bool = True) -> None:
        tqdm.monitor_interval = 0  # no thread: processes are forked while the bar is there
        self._total, self._unit, self._name = total, unit, name
        self._start = self._last = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(
                desc=name or None, total=total, unit=f" {unit}", smoothing=0.05, file=sys.stderr, leave=keep
            )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()

    def to(self, done: int) -> None:
        """Show that `done` of the total are done; a plain line appears only when the last one is old enough."""
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
            return
        now = time.monotonic()
        if now - self._last >= EVERY:
            self._last, rate = now, done / (now - self._start)
            left = f"{max(0, self._total - done) / rate:.0f} s left" if rate else "time left unknown"
            name = f"{self._name}: " if self._name else ""
            say(f"{name}{done}/{self._total} {self._unit}, {rate:.3g} {self._unit}/s, {left}")
