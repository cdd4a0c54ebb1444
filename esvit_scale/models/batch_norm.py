"""Batch normalisation as self-distillation needs it: over all ranks, per resolution, in fp32, and once per forward.

A batch of one resolution is normalised by its own mean and variance over all ranks' images (torch's SyncBatchNorm runs
on GPUs only). The running statistics, which evaluation uses, move once a call in training mode, not again when
activation checkpointing recomputes it, and not by a batch that was not finite. They stay fp32 whatever the engine casts.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from esvit_scale.parallel import collectives

_state = threading.local()


@contextmanager
def recomputing() -> Iterator[None]:
    """Leave running statistics where the first pass left them, within the context."""
    before = getattr(_state, "recomputing", False)
    _state.recomputing = True
    try:
        yield
    finally:
        _state.recomputing = before


def moves_without_gradient(module: nn.Module) -> None:
    """For reentrant checkpointing, whose first pass runs without gradient and whose recomputation runs with it."""
    for child in module.modules():
        if isinstance(child, BatchNorm):
            child.first_pass_has_gradient = False


class BatchNorm(nn.Module):
    """y = (x − mean)/√(var + eps) · weight + bias over all dimensions but the channels.

    Parameters and buffers have the names and shapes of torch's (but `num_batches_tracked`), so weights map by name.

    Args:
        channels: C; dimension 1 of the input, [n, C] or [B, C, H, W].
        momentum: the running statistics' step towards a batch's.
        affine: False: no weight and bias.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1, affine: bool = True) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.first_pass_has_gradient = True
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [n, C] or [n, C, h, w] by the statistics of all ranks' rows in training, by the running ones in
        evaluation."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean, var = self._batch_statistics(wide) if self.training else (self.running_mean, self.running_var)
        shape = (1, -1, *[1] * (x.dim() - 2))
        scale = torch.rsqrt(var + self.eps)
        if self.weight is not None and self.bias is not None:
            scale = scale * self.weight
            return torch.addcmul((self.bias - mean * scale).view(shape), wide, scale.view(shape)).to(x.dtype)
        return ((wide - mean.view(shape)) * scale.view(shape)).to(x.dtype)

    def _batch_statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance [C] over all ranks. Two passes: E[x²] − E[x]² cancels in fp32."""
        dims = [0, *range(2, x.dim())]
        count = x.numel() // x.shape[1] * collectives.world_size()
        mean = collectives.all_reduce_sum(x.sum(dims)) / count
        centred = x - mean.view(1, -1, *[1] * (x.dim() - 2))
        var = collectives.all_reduce_sum(centred.square().sum(dims)) / count
        again = getattr(_state, "recomputing", False) or (torch.is_grad_enabled() and not self.first_pass_has_gradient)
        if not again:
            self._move(mean.detach(), var.detach() * (count / max(count - 1, 1)))
        return mean, var

    @torch.no_grad()
    def _move(self, mean: Tensor, var: Tensor) -> None:
        finite = torch.isfinite(mean).all() & torch.isfinite(var).all()
        for running, batch in ((self.running_mean, mean), (self.running_var, var)):
            moved = torch.lerp(running, batch.to(running.dtype), self.momentum)
            running.copy_(torch.where(finite, moved, running))
