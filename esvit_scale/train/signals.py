"""Signals that ask a run to save and end, and flags that the ranks exchange in every step.

No torch here: the handlers must be installed before the heavy imports, or a signal in the first seconds kills the run.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import IntFlag
from pathlib import Path
from types import FrameType


class Flag(IntFlag):
    """Flags that a rank sends to the others in a step, with its gradients' norms (parallel/gradients.py). A flag that one
    rank sets counts for all. What happens after that, such as a signal during the optimizer's step, is sent in the next
    step."""

    REQUEUE = 1  # SIGUSR1 or SIGTERM came: save, and ask to be started again
    INTERRUPT = 2  # ctrl-C came: save and end
    BAD_SAMPLES = 4  # images of the batch were replaced
    SAVE_NOW = 8  # train.checkpoint_minutes have passed
    LOSS_NOT_FINITE = 16  # the loss was not finite, and therefore the step was skipped
    TAKEN_OVER = 32  # another process holds the run's lock
    BAD_LABELS = 64  # an image of the batch has no label, or one out of range


STOP = Flag.REQUEUE | Flag.INTERRUPT

_request = Flag(0)
_is_working = False  # whether the ranks work together, so that one that left at once would keep the others waiting
_kept = ""  # what the run has on disk if it ends at once, in words; "" before `begin_work`


def install() -> None:
    """Let SIGUSR1 and SIGTERM ask for a checkpoint and a requeue, and ctrl-C for a checkpoint and the end. A second
    ctrl-C ends the process at once, as does the first one before `begin_work` and after `end_work`."""
    signal.signal(signal.SIGUSR1, _on_requeue)
    signal.signal(signal.SIGTERM, _on_requeue)
    signal.signal(signal.SIGINT, _on_interrupt)


def begin_work() -> None:
    """Let ctrl-C end the run after a step from now on, with a checkpoint, because the ranks begin to work together."""
    global _is_working, _kept
    _is_working, _kept = True, "nothing was trained in this start, and checkpoints are as they were"


def end_work() -> None:
    """Let ctrl-C end the process at once again, because training is over; what follows has no steps."""
    global _is_working
    _is_working = False


def set_kept(checkpoint: Path | None) -> None:
    """Note the newest complete checkpoint, or that there is none, for `kept` and the message at ctrl-C."""
    global _kept
    there = f"kept: {checkpoint}; the same command goes on from there"
    _kept = "no checkpoint was written yet" if checkpoint is None else there


def kept() -> str:
    """Return what a run has on disk if it ends at once, in words; "" before `begin_work`."""
    return _kept


def request() -> Flag:
    """Return the flag that signals have set on this rank so far: REQUEUE, INTERRUPT or none.

    Ranks get signals at different steps, so they must combine these flags before they act.
    """
    return _request


def _on_requeue(number: int, frame: FrameType | None) -> None:
    global _request
    if not _request:
        _request = Flag.REQUEUE


def _on_interrupt(number: int, frame: FrameType | None) -> None:
    global _request
    if _request == Flag.INTERRUPT or not _is_working:
        raise KeyboardInterrupt
    _request = Flag.INTERRUPT
    if (os.environ.get("RANK") or "0") == "0":
        # Straight to the file: the handler may have interrupted a print.
        text = f"\nctrl-C: the run saves after this step and ends; ctrl-C again ends it at once ({kept()})\n"
        with suppress(OSError):
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, text.encode())


@contextmanager
def installed() -> Iterator[None]:
    """Install the handlers for a block, and put back what was there before; without effect outside the main thread."""
    global _request, _is_working, _kept
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)}
    install()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _request, _is_working, _kept = Flag(0), False, ""
