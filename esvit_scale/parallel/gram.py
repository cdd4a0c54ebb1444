"""The Gram teacher: the trunk of an earlier teacher, to whose region features the student is anchored (objective/gram.py).

It is a copy of the EMA teacher's trunk after `objective.gram_start` steps, and a new one every `objective.gram_every`
steps from there on. Which teacher it is thus follows from the step alone. It lies where the EMA does: its fp32 values on
the partitions that each rank owns, and working weights in training precision (at ZeRO 3 partitioned, too). A copy needs
no communication at ZeRO 3 and 0, and one all-gather of the trunk's groups at ZeRO 1 and 2.
"""

from collections.abc import Callable

import torch
from torch import nn

from esvit_scale import ranges
from esvit_scale.parallel.buffers import cast_buffers_to_fp32, persistent_buffers
from esvit_scale.parallel.ema import Teacher
from esvit_scale.parallel.zero import Layout


class GramTeacher:
    """The Gram teacher's network, its schedule, and its fp32 values on this rank.

    Attributes:
        network: the module or engine whose forward gives the region features, in training precision; it is in evaluation
            mode, so that batch norms use the running statistics of the earlier teacher.
        module: the module inside `network`.
        partitions: the student's partitions of parameters that the network has, those of the trunk.
        values: for each of `partitions`, the fp32 values of that interval [length].
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher,
        layout: Layout,
        build: Callable[[], nn.Module],
        start: int,
        every: int,
    ) -> None:
        """Create the Gram teacher as a copy of the teacher, which must be a copy of the student.

        Args:
            student: the module inside the student's engine.
            layout: the student's layout at the run's ZeRO stage.
            build: makes a module that has some of the student's parameters, under their names.
            start, every: `objective.gram_start` and `objective.gram_every`.
        """
        self._student, self._layout, self._teacher = student, layout, teacher
        self._start, self._every = start, every
        self.network, self.module, self.partitions, self.values, self._sync = layout.make_teacher(build)
        self.network.eval()
        cast_buffers_to_fp32(self.module)
        self._sync_frozen()
        self.refresh()

    def begin_after(self, steps: int) -> None:
        """Count the steps of the schedule from this step of the run on, the first of a training stage."""
        self._start += steps

    def is_on(self, step: int) -> bool:
        """Return whether the step after `step` steps is anchored, so that checkpoints hold the Gram teacher."""
        return step >= self._start

    def refresh_if_due(self, step: int) -> None:
        """Copy the teacher if it is time for it after `step` steps; all ranks call it after every step."""
        if step >= self._start and (step - self._start) % self._every == 0:
            self.refresh()

    @ranges.named("Gram teacher refresh")
    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the teacher's trunk. All ranks call it."""
        of_teacher = {p.name: values for p, values in zip(self._layout.partitions, self._teacher.values, strict=True)}
        for p, values in zip(self.partitions, self.values, strict=True):
            values.copy_(of_teacher[p.name])
        buffers = persistent_buffers(self._teacher.module)
        for name, buffer in persistent_buffers(self.module).items():
            buffer.copy_(buffers[name])
        self._sync()

    def sync_after_restore(self) -> None:
        """Copy `values` and the student's frozen parameters into the weights that the forward uses, on all ranks, after a
        checkpoint was read into `values` and the student."""
        self._sync_frozen()
        self._sync()

    @torch.no_grad()
    def _sync_frozen(self) -> None:
        own = {p.name: p for p in self._layout.frozen(self.module)}
        for p in self._layout.frozen(self._student):
            if p.name in own:
                own[p.name].values.copy_(p.values)
