"""Finds a rank that hangs: nothing else does, because collectives wait for ever and a waiting job looks alive.

Every rank watches its own progress. When a deadline passes, each says where it stands, so that the log tells the rank
that hangs (in a read, say) from those that wait for it (in a collective); then it ends its process, and the launcher
the job.
"""

import os
import sys
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType

from esvit_scale.errors import RestartCanHelp

_PACKAGE = str(Path(__file__).resolve().parents[1])


class Watchdog:
    """Ends the process with exit code 75 when `beat` was not called for `seconds`. Made on the main thread."""

    def __init__(self, rank: int, seconds: float) -> None:
        self._rank, self._seconds = rank, seconds
        self._main = threading.main_thread().ident
        self._step, self._beaten = 0, time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Watchdog":
        self._beaten = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()

    def beat(self, step: int) -> None:
        """Progress was made."""
        self._step, self._beaten = step, time.monotonic()

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self._seconds / 4)):
            if time.monotonic() - self._beaten > self._seconds:
                where = _innermost_of_ours(sys._current_frames().get(self._main or 0))
                print(
                    f"rank {self._rank}: no progress for {self._seconds:.0f} s after step {self._step}; it stands at {where}; "
                    "ending the job, the same command goes on from the last checkpoint",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(RestartCanHelp.exit_code)


def _innermost_of_ours(frame: FrameType | None) -> str:
    """`data/stream.py:120 in batches (via threading.py:320 in wait)`: our deepest frame, and what it called."""
    deepest = frame
    while frame is not None and not frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    return " < ".join(_place(f) for f in dict.fromkeys((frame, deepest)) if f is not None) or "an unknown place"


def _place(frame: FrameType) -> str:
    name = frame.f_code.co_filename
    short = name.removeprefix(_PACKAGE + os.sep) if name.startswith(_PACKAGE) else Path(name).name
    return f"{short}:{frame.f_lineno} in {frame.f_code.co_name}"
