"""The centre of the teacher's logits, which keeps images from all choosing the same prototypes (Caron et al. 2021).

c ← momentum·c + (1 − momentum)·mean of the teacher's logits over the global batch, once per applied optimizer step.
With the bottleneck z [n, D] and the prototypes W [K, D], mean(z Wᵀ) = mean(z) Wᵀ, so ranks exchange D numbers, not K.
"""

import torch
from torch import Tensor

from esvit_scale.models.heads import ROWS_AT_ONCE
from esvit_scale.parallel import collectives


class Center:
    """One head's centre, fp32 [K].

    A plain tensor on purpose: a buffer would be cast to the module's precision by the engine. It is made at first
    use, when device and K are known, because a tensor made while a partitioned module is built is cast as well.
    """

    def __init__(self, momentum: float) -> None:
        self.momentum = momentum
        self._values: Tensor | None = None  # fp32 [K]
        self._sum: Tensor | None = None  # [D] sum of the micro-batches' mean bottlenecks since the last commit
        self._rows: Tensor | None = None  # [K, D] the teacher's prototypes, the same for all micro-batches
        self._count = 0

    def values(self, rows: Tensor) -> Tensor:
        """Return the centre [K], fp32 (fp64 for fp64), on the device of the teacher's prototypes `rows` [K, D].

        It is zero before the first commit.
        """
        if self._values is None:
            self._values = rows.new_zeros(len(rows), dtype=torch.promote_types(rows.dtype, torch.float32))
        self._values = self._values.to(rows.device)
        return self._values

    @torch.no_grad()
    def observe(self, mean_z: Tensor, rows: Tensor) -> None:
        """Accumulate the statistics of a micro-batch for the next `commit`.

        Args:
            mean_z: [D], the mean over the micro-batch of the teacher's bottleneck.
            rows: [K, D], the teacher's prototypes.
        """
        mean_z = mean_z.detach().to(torch.promote_types(mean_z.dtype, torch.float32))
        self._sum = mean_z.clone() if self._sum is None else self._sum + mean_z
        self._rows = rows.detach()
        self._count += 1

    @torch.no_grad()
    def commit(self) -> None:
        """Update the centre from the observed micro-batches, after an applied optimizer step. All ranks call it."""
        if self._sum is None or self._rows is None:
            raise RuntimeError("Center.commit: nothing was observed since the last commit or discard")
        mean_z = collectives.all_reduce_mean_(self._sum / self._count)
        mean_logits = torch.cat([block.to(mean_z.dtype) @ mean_z for block in self._rows.split(ROWS_AT_ONCE)])
        self._values = self.values(self._rows) * self.momentum + mean_logits * (1 - self.momentum)
        self.discard()

    def discard(self) -> None:
        """Forget the observed micro-batches, after a skipped optimizer step."""
        self._sum = self._rows = None
        self._count = 0

    def state_dict(self) -> dict[str, Tensor]:
        """Return the centre for a checkpoint; empty before the first commit or forward."""
        return {} if self._values is None else {"values": self._values}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the centre from a checkpoint and forget the observed micro-batches."""
        self._values = state["values"].detach().clone() if "values" in state else None
        self.discard()
