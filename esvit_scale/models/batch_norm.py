"""Batch normalisation with statistics over all ranks, on CPUs and GPUs, and in fp32.

In training, a batch is normalised by its own mean and variance over all ranks (torch's SyncBatchNorm runs on GPUs
only); trunks call the layer once per resolution. Each call also updates the running statistics, which evaluation uses,
but not when activation checkpointing recomputes the call, and not with a batch whose statistics are not finite. The
running statistics stay fp32 when the engine casts the parameters.
"""

import torch
from torch import Tensor, nn

from esvit_scale.models.recomputation import is_recomputing
from esvit_scale.parallel import collectives


def moves_without_gradient(module: nn.Module) -> None:
    """Make a module's batch norms update their running statistics in calls without gradient instead of calls with it.

    Reentrant activation checkpointing needs this: its first pass runs without gradient, its recomputation with it.
    """
    for child in module.modules():
        if isinstance(child, BatchNorm):
            child.first_pass_has_gradient = False


class BatchNorm(nn.Module):
    """Batch norm over all ranks: y = (x − mean)/√(var + eps) · weight + bias, with a mean and a variance per channel.

    Parameters and buffers have the names and shapes of torch's BatchNorm, so its weights load by name; only torch's
    `num_batches_tracked` is missing.

    Args:
        channels: C, the size of dimension 1 of the input [n, C] or [n, C, h, w].
        momentum: weight of a batch's statistics in the update of the running ones, as in torch.
        affine: whether there are weight and bias.
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
        """Normalise x [n, C] or [n, C, h, w], in training by the statistics of all ranks' batches together, in
        evaluation by the running statistics."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.training and collectives.world_size() == 1:
            return self._normalise_alone(wide).to(x.dtype)
        mean, var = self._batch_statistics(wide) if self.training else (self.running_mean, self.running_var)
        shape = (1, -1, *[1] * (x.dim() - 2))
        scale = torch.rsqrt(var + self.eps)
        if self.weight is not None and self.bias is not None:
            scale = scale * self.weight
            return torch.addcmul((self.bias - mean * scale).view(shape), wide, scale.view(shape)).to(x.dtype)
        return ((wide - mean.view(shape)) * scale.view(shape)).to(x.dtype)

    def _normalise_alone(self, x: Tensor) -> Tensor:
        """Normalise x by torch's fused kernel, which is several times as fast and needs the whole batch on one rank."""
        weight, bias = (None if p is None else p.to(x.dtype) for p in (self.weight, self.bias))
        y, mean, inverse_std = torch.native_batch_norm(x, weight, bias, None, None, True, self.momentum, self.eps)
        if not self._is_repeated():
            count = x.numel() // x.shape[1]
            # The kernel returns 1/√(var + eps) alone; where var is 0, rounding must not make it negative.
            var = (inverse_std.detach() ** -2 - self.eps).clamp_min(0)
            self._move(mean.detach(), var * (count / max(count - 1, 1)))
        return y

    def _is_repeated(self) -> bool:
        """Return whether activation checkpointing makes this call a second time, or will."""
        return is_recomputing() or (torch.is_grad_enabled() and not self.first_pass_has_gradient)

    def _batch_statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and biased variance [C] over all ranks; update the running statistics unless this recomputes.

        The variance is computed from centred values in a second pass, because E[x²] − E[x]² loses precision in fp32.
        """
        dims = [0, *range(2, x.dim())]
        count = x.numel() // x.shape[1] * collectives.world_size()
        mean = collectives.all_reduce_sum(x.sum(dims)) / count
        centred = x - mean.view(1, -1, *[1] * (x.dim() - 2))
        var = collectives.all_reduce_sum(centred.square().sum(dims)) / count
        if not self._is_repeated():
            self._move(mean.detach(), var.detach() * (count / max(count - 1, 1)))
        return mean, var

    @torch.no_grad()
    def _move(self, mean: Tensor, var: Tensor) -> None:
        finite = torch.isfinite(mean).all() & torch.isfinite(var).all()
        for running, batch in ((self.running_mean, mean), (self.running_var, var)):
            moved = torch.lerp(running, batch.to(running.dtype), self.momentum)
            running.copy_(torch.where(finite, moved, running))
