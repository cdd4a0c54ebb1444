"""1×1 convolutions that have the parameters of torch's Conv2d and take rows [N, C] instead of maps."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from esvit_scale.models.distributions import Initializer, constant, normal
from esvit_scale.models.products import linear

QUICK = 1.702  # factor of "quick GELU", x·σ(1.702 x), which approximates GELU


class PointConv(nn.Conv2d):
    """A 1×1 convolution on rows, with CvT's initial values."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__(channels, dim, 1)

    def initial_values(self) -> dict[str, Initializer]:
        """Return the initialisers of the module's own parameters, by name (models/initialize.py)."""
        return {"weight": normal(0.02), "bias": constant(0.0)}

    def forward(self, rows: Tensor) -> Tensor:  # [N, C] → [N, C']
        """Map rows [N, C] to [N, C']."""
        return linear(rows, self.weight.flatten(1), self.bias)


class QuickGeluConv(PointConv):
    """Quick GELU x·σ(1.702 x) followed by a 1×1 convolution, on rows.

    Only x is saved for the backward, which recomputes the quick GELU.
    """

    def forward(self, rows: Tensor) -> Tensor:  # [N, C] → [N, C']
        """Map rows [N, C] to [N, C']."""
        return _QuickGeluLinear.apply(rows, self.weight.flatten(1), self.bias)


class _QuickGeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x * torch.sigmoid(QUICK * x), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        gate = torch.sigmoid(QUICK * x)
        # In autocast, the gradient is bf16 while weights, and perhaps x, are fp32.
        grad_x = (grad @ weight.to(grad.dtype)).to(x.dtype) * (gate + QUICK * x * gate * (1 - gate))
        grad_weight = (grad.t() @ (x * gate).to(grad.dtype)).to(weight.dtype)
        return grad_x, grad_weight, grad.sum(0).to(weight.dtype)
