"""The teacher: an exponential moving average (EMA) of the student, in fp32, on the partitions that each rank owns.

e ← m·e + (1 − m)·s for every trainable parameter, heads included (as in DINO and EsViT), where s are the student's fp32
values. No communication is needed. The average is in fp32 whatever the precision of training: bf16 would round away an
update of (1 − m) ~ 5e-4 of the distance.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from esvit_scale import ranges
from esvit_scale.parallel.buffers import cast_buffers_to_fp32, persistent_buffers
from esvit_scale.parallel.zero import Layout


class Teacher:
    """The teacher's network and its fp32 values on this rank.

    Attributes:
        network: the module or engine whose forward gives the targets, in training precision.
        module: the module inside `network`.
        values: for each of the student's partitions, the fp32 EMA of that interval [length].
    """

    def __init__(self, student: nn.Module, layout: Layout, build: Callable[[], nn.Module]) -> None:
        """Create the teacher as a copy of the student, whose initial values must have been written before.

        Args:
            student: the module inside the student's engine.
            layout: the student's layout at the run's ZeRO stage.
            build: makes a module of the student's architecture.
        """
        self._student, self._layout = student, layout
        self.network, self.module, _, self.values, self._sync = layout.make_teacher(build)
        self.sync_frozen()
        cast_buffers_to_fp32(self.module)
        self.sync_buffers()
        self.sync_working_weights()

    @ranges.named("teacher update")
    @torch.no_grad()
    def update(self, momentum: float) -> None:
        """Update the EMA with the student's values; call it once per applied optimizer step, on all ranks."""
        # In one pass: e + (1 − m)·(s − e).
        torch._foreach_lerp_(self.values, [partition.master for partition in self._layout.partitions], 1 - momentum)
        self.sync_working_weights()

    @torch.no_grad()
    def sync_frozen(self) -> None:
        """Copy frozen parameters from the student; call it again after a checkpoint was read into the student."""
        own = {p.name: p for p in self._layout.frozen(self.module)}
        for p in self._layout.frozen(self._student):
            own[p.name].values.copy_(p.values)

    @torch.no_grad()
    def sync_buffers(self) -> None:
        """Copy running statistics from the student; call it after every step if the teacher runs no forward."""
        own = persistent_buffers(self.module)
        for name, buffer in persistent_buffers(self._student).items():
            own[name].copy_(buffer)

    @torch.no_grad()
    def sync_working_weights(self) -> None:
        """Copy `values` into the weights that the forward uses; call it, on all ranks, after `values` were written."""
        self._sync()

    @contextmanager
    @torch.no_grad()
    def as_student(self) -> Iterator[None]:
        """Give the teacher's network the student's weights for a while, to evaluate them; all ranks enter and leave it."""
        kept = [values.clone() for values in self.values]
        for values, partition in zip(self.values, self._layout.partitions, strict=True):
            values.copy_(partition.master)
        self.sync_working_weights()
        try:
            yield
        finally:
            for values, old in zip(self.values, kept, strict=True):
                values.copy_(old)
            self.sync_working_weights()
