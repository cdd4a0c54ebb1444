"""The frozen teacher of a distillation: a network of another architecture than the student's, whose weights never change.

Every rank has it whole, in training precision, at ZeRO 0 to 2. At ZeRO 3 it is an engine of its own, whose weights are
partitioned and gathered layer by layer. Nothing else of it is kept: no fp32 values, no optimizer state, and nothing in
checkpoints, since its weights are read from `objective.teacher` at every start.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from esvit_scale.parallel.buffers import cast_buffers_to_fp32, persistent_buffers
from esvit_scale.parallel.zero import Layout


class FrozenTeacher:
    """The frozen teacher's network.

    Attributes:
        network: the module or engine whose forward gives the targets, in training precision; it is in evaluation mode, so
            that batch norms use their running statistics.
        module: the module inside `network`.
    """

    @torch.no_grad()
    def __init__(self, layout: Layout, build: Callable[[], nn.Module], values: dict[str, Tensor]) -> None:
        """Build the teacher and write its weights.

        Args:
            layout: the student's layout at the run's ZeRO stage.
            build: makes the teacher's module.
            values: fp32 values of all its parameters and running statistics, by name.
        """
        self.network, self.module = layout.make_frozen(build)
        self.network.eval()
        cast_buffers_to_fp32(self.module)
        for f in layout.frozen(self.module):
            f.values.copy_(values[f.name].view(-1)[f.start : f.start + len(f.values)])
        for name, buffer in persistent_buffers(self.module).items():
            buffer.copy_(values[name])
