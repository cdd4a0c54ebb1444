"""A clock for the time that a rank computes before it waits for the others. This time shows which rank is slow; the
time of whole steps does not, because collectives make it equal on all ranks.

The clock runs from the beginning of a step to the end of the student's forward in the first micro-batch: augmentation,
the teacher's forward, the student's forward. At ZeRO 0 to 2, ranks exchange nothing in this time. At ZeRO 3 they gather
every layer's parameters, where a fast rank waits for a slow one; the time in these gathers is subtracted. The backward
is left out, because gradients are reduced at the same time.

Objectives and trunks that communicate inside the forward (SimCLR, SwAV, Sinkhorn centring, batch norm) make all ranks
wait for each other there, so that a slow rank stands out less. On a GPU, CUDA events measure the time on its stream
(not tried with several GPUs: no such machine was available).
"""

import time
from typing import Any

import torch


class StepClock:
    """A stopwatch for the compute time of a step; steps in which `begin` is not called are not timed."""

    def __init__(self, device: torch.device | None = None) -> None:
        self._cuda = device is not None and device.type == "cuda"
        self._running = False
        self._marks: list[Any] = []  # begin, (gather begins, gather ends) …, end

    def begin(self) -> None:
        """Start the clock, at the beginning of a step."""
        self._marks, self._running = [self._now()], True

    def end(self) -> None:
        """Stop the clock, if it runs; called after the student's forward."""
        if self._running:
            self._marks.append(self._now())
            self._running = False

    def take(self) -> float:
        """Return, and forget, the seconds that the last timed step computed, without gathers; 0.0 if there is none."""
        marks, self._marks, self._running = self._marks, [], False
        if len(marks) < 2:
            return 0.0
        gathers = sum(self._between(a, b) for a, b in zip(marks[1:-1:2], marks[2:-1:2], strict=True))
        return max(0.0, self._between(marks[0], marks[-1]) - gathers)

    def mark(self, *_: Any) -> None:
        """Note the time, if the clock runs. `Layout.hook_gathers` calls this before and after every gather."""
        if self._running:
            self._marks.append(self._now())

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, a: Any, b: Any) -> float:
        if not self._cuda:
            return float(b - a)
        b.synchronize()
        return float(a.elapsed_time(b)) / 1000
