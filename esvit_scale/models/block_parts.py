"""Parts of transformer blocks that several trunks share: the MLP and the residual addition."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class GeluMlp(nn.Module):
    """The MLP of a block: a linear layer from C to 4C, GELU, and a linear layer from 4C to C."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = GeluLinear(4 * dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens [N, C] to [N, C]."""
        return self.fc2(self.fc1(tokens))


class GeluLinear(nn.Linear):
    """GELU followed by a linear layer, which saves only x, and not GELU(x), for the backward.

    GELU(x) would be a quarter of a block's saved activations; recomputing it in the backward takes 1 % of a step.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map x […, 4C] to linear(GELU(x)) […, C]; a backward needs x to be [N, 4C]."""
        return _GeluLinear.apply(x, self.weight, self.bias)


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(F.gelu(x), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        hidden = F.gelu(x) if ctx.needs_input_grad[1] else None
        grad_weight = (grad.t() @ hidden.to(grad.dtype)).to(weight.dtype) if hidden is not None else None
        grad_bias = grad.sum(0).to(weight.dtype) if ctx.needs_input_grad[2] else None
        grad_x = torch.ops.aten.gelu_backward((grad @ weight.to(grad.dtype)).to(x.dtype), x)
        return grad_x, grad_weight, grad_bias


def add_branch(tokens: Tensor, branch: Tensor, keep: Tensor | None) -> Tensor:
    """Return tokens + keep · branch, both [N, C]; `keep` [N, 1] is the drop-path factor (0: dropped), None is 1."""
    return tokens + branch if keep is None else torch.addcmul(tokens, branch, keep)
