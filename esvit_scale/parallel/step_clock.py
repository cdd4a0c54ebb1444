"""How long a rank computes before it must wait for the others: what tells a slow rank, whose steps all take equally long.

Measured from the beginning of a step to the end of the student's forward in its first micro-batch: augmentation, the
teacher's forward, the student's forward. Up to there ZeRO 0 to 2 exchange nothing. ZeRO 3 gathers the parameters of every
layer, and a fast rank waits for a slow one there, so the time inside these gathers is taken off: they happen between a
layer's first and last forward hook. The backward is left out, because the reductions of gradients run beside it.

Objectives and trunks that talk over ranks inside the forward (SimCLR, SwAV, Sinkhorn centring, batch norm) make all ranks
wait for each other inside the forward, so a slow rank stands out less. On a GPU the times are those of its queue, by events (not measured: no machine
with several GPUs was at hand).
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


class StepClock:
    """Times the steps in which `begin` was called."""

    def __init__(
        self, device: torch.device | None = None, networks: Sequence[nn.Module] = (), zero_stage: int = 0
    ) -> None:
        """`networks`: student and teacher, after DeepSpeed has put its hooks on them."""
        self._cuda = device is not None and device.type == "cuda"
        self._running = False
        self._marks: list[Any] = []  # begin, (gather begins, gather ends) …, end
        if zero_stage == 3:
            for network in networks:
                for layer in network.modules():
                    layer.register_forward_pre_hook(self._mark, prepend=True)
                    layer.register_forward_pre_hook(self._mark)

    def begin(self) -> None:
        self._marks, self._running = [self._now()], True

    def end(self) -> None:
        """The student's forward is done; nothing when the clock does not run."""
        if self._running:
            self._marks.append(self._now())
            self._running = False

    def take(self) -> float:
        """Seconds of the last step that was timed; 0.0 when there is none."""
        marks, self._marks, self._running = self._marks, [], False
        if len(marks) < 2:
            return 0.0
        gathers = sum(self._between(a, b) for a, b in zip(marks[1:-1:2], marks[2:-1:2], strict=True))
        return max(0.0, self._between(marks[0], marks[-1]) - gathers)

    def _mark(self, *_: Any) -> None:
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
