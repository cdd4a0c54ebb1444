"""What the outside asks of a running job: remembered here, answered by the loop at its next step.

No torch here: the handlers must stand before the heavy imports, or a signal in the first seconds kills the run.
"""

import signal
from types import FrameType
from typing import Literal

Request = Literal["none", "requeue", "interrupt"]

_request: Request = "none"


def install() -> None:
    """USR1 and TERM ask for a checkpoint and a requeue, ctrl-C for a checkpoint; a second ctrl-C stops at once."""
    signal.signal(signal.SIGUSR1, _on_requeue)
    signal.signal(signal.SIGTERM, _on_requeue)
    signal.signal(signal.SIGINT, _on_interrupt)


def request() -> Request:
    """What this rank was asked so far; ranks see signals at different steps, so agree on it before acting."""
    return _request


def clear() -> None:
    global _request
    _request = "none"


def _on_requeue(number: int, frame: FrameType | None) -> None:
    global _request
    if _request == "none":
        _request = "requeue"


def _on_interrupt(number: int, frame: FrameType | None) -> None:
    global _request
    if _request == "interrupt":
        raise KeyboardInterrupt
    _request = "interrupt"
