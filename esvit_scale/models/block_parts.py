"""Parts of blocks that several trunks share: the MLP, and the sum of a residual branch with what it branches from."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class GeluMlp(nn.Module):
    """The MLP of a block: to four times the width, GELU, and back."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = GeluLinear(4 * dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens [N, C] to [N, C]."""
        return self.fc2(self.fc1(tokens))


class GeluLinear(nn.Linear):
    """A linear layer of GELU(x) that keeps x alone for its backward.

    What the layer reads, GELU(x), would be a quarter of a block's activations; the backward computes it again, which
    takes 1 % of a step.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map x […, 4C] to […, C]."""
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
    """Add a residual branch [N, C] to its tokens, scaled by `keep` [N, 1] (0: dropped); None keeps it whole."""
    return tokens + branch if keep is None else torch.addcmul(tokens, branch, keep)
