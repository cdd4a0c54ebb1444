"""The watchdog, which ends a job in which a rank hangs. Without it, collectives would wait for ever.

Every rank watches its own progress. When a deadline passes, the first rank that notices asks all others where they are.
A rank that hangs in Python (in a read, say) still answers, from its watchdog's thread. A rank that was stopped, or
whose node is gone, does not answer, and is reported as such. One of the ranks that answered writes one line about all
ranks. Then each rank writes the stacks of all its threads beside its log and ends with exit code 75, and the launcher
ends the job.
"""

import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from esvit_scale.errors import RestartCanHelp
from esvit_scale.parallel import hang_reports
from esvit_scale.parallel.world import World

START_S = 600.0  # the shortest deadline before the first step is done: compiling, reading a checkpoint
TELL_S = 10.0  # how long a report may take; it can hang as well, on a dead file system or a stopped host
_PACKAGE = str(Path(__file__).resolve().parents[1])
_COMMUNICATION = ("/torch/distributed/", "/deepspeed/")


class Watchdog:
    """A thread that ends the process with exit code 75 when there was no progress for `seconds`.

    Create it on the main thread. Only time in which the watchdog itself ran counts, so that a job that was suspended
    (`scontrol suspend`, SIGSTOP) for hours goes on.
    """

    def __init__(self, world: World, seconds: float, run: Path) -> None:
        """Set up the watchdog of a rank; it starts on entering.

        Args:
            seconds: time without progress after which it ends the process.
            run: the run dir. The stacks of a hang are written to its folder ranks/, under Slurm beside the ranks' logs.
        """
        self._rank, self._seconds = world.rank, seconds
        self._logs = Path(os.environ.get("ESVIT_RANK_LOGS") or run / "ranks")
        self._main = threading.main_thread().ident
        self._step: int | None = None
        self._has_trained = False  # a step was done since the first `beat`, which gives the step at the start
        self._granted_s = 0.0  # deadline that `grant` set, until the next progress
        self._period = min(1.0, seconds / 4)
        self._still_s = 0.0  # seconds without progress in which this process ran
        self._stop, self._alarm = threading.Event(), threading.Event()
        self._exchanged = False
        self._reports = hang_reports.HangReports(world.rank, world.size) if world.size > 1 else None
        self._listener: threading.Thread | None = None
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._still_s = 0.0
        self._thread.start()
        if self._reports is not None:
            self._listener = _start(self._listen, "watchdog-listener")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        if (
            self._listener is not None
        ):  # a thread that is inside the store when the interpreter ends can abort the process
            self._listener.join(TELL_S)

    def beat(self, step: int) -> None:
        """Note progress: `step` steps are done."""
        self._has_trained = self._has_trained or (self._step is not None and step > self._step)
        self._step = step
        self.progress()

    def progress(self) -> None:
        """Note progress other than a step: a part of the start, or of a long copy, is done."""
        self._still_s, self._granted_s = 0.0, 0.0

    def grant(self, seconds: float) -> None:
        """Allow at least `seconds` until the next progress, to wait for another process."""
        self.progress()
        self._granted_s = seconds

    def _watch(self) -> None:
        seen = time.monotonic()
        while not self._stop.wait(self._period):
            now = time.monotonic()
            self._still_s += min(now - seen, 2 * self._period)  # a longer pause means that the process was stopped
            seen = now
            if self._still_s > self.deadline() or self._alarm.is_set():
                traces = _start(lambda: _leave_traces(self._logs, self._rank), "watchdog-traces")
                _start(self._tell, "watchdog-report").join(self._grace() + TELL_S)
                traces.join(TELL_S / 5)
                os._exit(RestartCanHelp.exit_code)

    def _listen(self) -> None:
        """Wait for another rank's alarm. An error of the store ends only this thread."""
        assert self._reports is not None
        while not self._has_joined():
            if self._stop.wait(self._grace() / 4):
                return
        with suppress(RuntimeError):
            while not self._stop.wait(self._grace() / 4):
                if self._reports.alarm_is_raised():
                    self._alarm.set()
                    return

    def _has_joined(self) -> bool:
        """Connect to the store through which ranks report, unless connected; return whether this rank is connected."""
        assert self._reports is not None
        with suppress(RuntimeError):  # the store may be busy with a thousand ranks
            if not self._reports.is_joined:
                self._reports.join()
        return self._reports.is_joined

    def deadline(self) -> float:
        """Return how many seconds without progress are allowed at present."""
        least = 0.0 if self._has_trained else START_S
        return max(self._seconds, least, self._granted_s)

    def _grace(self) -> float:
        """Return the seconds within which a rank that is alive answers an alarm."""
        return min(20.0, max(3.0, self._seconds / 10))

    def _tell(self) -> None:
        report = self._report()
        after = "since the start" if self._step is None else f"after step {self._step}"
        say(f"rank {self._rank}: no progress for {self._still_s:.0f} s {after}; it is at {report['place']}")
        if self._reports is None:
            say(
                f"ending the job; the same command continues from the last checkpoint; stacks of all threads: {self._logs}"
            )
            return
        _start(lambda: self._exchange(report), "watchdog-exchange").join(self._grace() + TELL_S / 2)
        if not self._exchanged:  # the store does not answer, so this rank reports what it knows itself
            store = f"the store on {os.environ.get('MASTER_ADDR', 'an unknown node')} could not be asked"
            self._say_summary(f"{summary({self._rank: report}, {})}; {store} where the other ranks are")

    def _exchange(self, report: dict[str, Any]) -> None:
        """Exchange reports with the other ranks, and print the summary on one of them."""
        assert self._reports is not None
        try:
            if not self._has_joined():
                return
            collects = self._reports.give(report)
            self._reports.raise_alarm()
            if not collects:
                self._exchanged = True
                self._reports.close(self._grace() + TELL_S / 4)
                return
            found, silent, writer = self._reports.collect(self._grace())
            self._exchanged = True
            if self._rank == writer:
                self._say_summary(summary(found, silent))
                self._reports.close_after_writing(len(found) - 1, TELL_S / 4)
            else:
                self._reports.close(TELL_S / 4)
        except RuntimeError:
            return

    def _say_summary(self, text: str) -> None:
        advice = "ending the job; the same command continues from the last checkpoint"
        say(f"{text}; {advice}; stacks of all threads: {self._logs}")

    def _report(self) -> dict[str, Any]:
        waits, place = _where(self._main)
        return {"node": socket.gethostname(), "step": self._step, "waits": waits, "place": place}


def say(text: str) -> None:
    """Print a line to stderr at once."""
    print(text, file=sys.stderr, flush=True)


def summary(found: dict[int, dict[str, Any]], silent: dict[int, str]) -> str:
    """Return one line about all ranks: which wait in which collective, which are elsewhere, and which do not answer.

    Args:
        found: rank → its report.
        silent: rank → node, of the ranks that did not report.
    """
    waiting: dict[str, list[int]] = {}
    parts = []
    for rank, report in sorted(found.items()):
        if report["waits"]:
            waiting.setdefault(f"{report['waits']} ({report['place']})", []).append(rank)
        else:
            parts.append(f"rank {rank} on {report['node']} is in no collective but at {report['place']}")
    lost: dict[str, list[int]] = {}
    for rank, node in sorted(silent.items()):
        lost.setdefault(node, []).append(rank)
    parts += [
        f"{_ranks(ranks)} on {node} {'do' if len(ranks) > 1 else 'does'} not answer: stopped, or the node is gone"
        for node, ranks in lost.items()
    ]
    parts += [f"{_ranks(ranks)} wait{'' if len(ranks) > 1 else 's'} in {what}" for what, ranks in waiting.items()]
    return "hang: " + "; ".join(parts)


def _ranks(ranks: list[int]) -> str:
    """Return ranks in short form: `rank 3`, or `ranks 0-2,5`."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    shown = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"


def _start(work: Callable[[], object], name: str) -> threading.Thread:
    """Run work that may block for ever on a thread, which the caller can `join` with a time limit."""
    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    return thread


def _leave_traces(folder: Path, rank: int) -> None:
    """Write the Python stacks of all threads, and the last collectives, to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"rank-{rank}.stacks.txt").open("w") as file:
        faulthandler.dump_traceback(file, all_threads=True)
    hang_reports.dump_collectives(folder / f"collectives-rank-{rank}")


def _where(thread: int | None) -> tuple[str | None, str]:
    """Return the collective in which a thread waits (else None), and the place in this package that led there."""
    frames = sys._current_frames()
    frame = frames.get(thread or 0)
    if frame is not None and "/torch/autograd/" in frame.f_code.co_filename:
        # On a GPU, hooks of the backward run on autograd's own threads.
        frame = next((f for f in frames.values() if _communicates(f)), frame)
    pending = hang_reports.pending_collective()
    waits = None
    if frame is not None and _communicates(frame):
        waits = pending or _function_of_torch(frame) or frame.f_code.co_name
    elif pending and _on_gpu():
        waits = pending  # the host waits for the device, which waits for the collective
    return waits, _innermost_of_ours(frame)


def _communicates(frame: FrameType) -> bool:
    return any(folder in frame.f_code.co_filename for folder in _COMMUNICATION)


def _function_of_torch(frame: FrameType | None) -> str | None:
    """Return the name of the outermost function of torch.distributed on a stack, which is the one that was called."""
    name = None
    while frame is not None:
        if frame.f_code.co_filename.endswith("/torch/distributed/distributed_c10d.py"):
            name = frame.f_code.co_name
        frame = frame.f_back
    return name


def _on_gpu() -> bool:
    import torch

    return torch.cuda.is_initialized()


def _innermost_of_ours(frame: FrameType | None) -> str:
    """Return this package's deepest frame and the frame it led to, such as
    `data/stream.py:120 in batches < threading.py:320 in wait`."""
    deepest = frame
    while frame is not None and not frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    return " < ".join(_place(f) for f in dict.fromkeys((frame, deepest)) if f is not None) or "an unknown place"


def _place(frame: FrameType) -> str:
    name = frame.f_code.co_filename
    short = name.removeprefix(_PACKAGE + os.sep) if name.startswith(_PACKAGE) else Path(name).name
    return f"{short}:{frame.f_lineno} in {frame.f_code.co_name}"
