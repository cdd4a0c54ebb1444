"""Parts of transformer blocks that several trunks share: the MLP and the residual addition."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from esvit_scale.models.products import is_wide, wide_linear, wide_linear_backward
from esvit_scale.models.recomputation import last_of_block


class GeluMlp(nn.Module):
    """The MLP of a block: a linear layer from C to 4C, GELU, and a linear layer from 4C to C.

    Args:
        ends_block: whether the block only adds the output to its residual stream, without a norm or a learned scale.
    """

    def __init__(self, dim: int, ends_block: bool = False) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = GeluLinear(4 * dim, dim)
        self.fc2.ends_block = ends_block

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens [N, C] to [N, C]."""
        return self.fc2(self.fc1(tokens))


class GeluLinear(nn.Linear):
    """GELU followed by a linear layer, which saves only x, and not GELU(x), for the backward.

    GELU(x) would be a quarter of a block's saved activations; recomputing it in the backward takes 1 % of a step.
    """

    ends_block = False

    def forward(self, x: Tensor) -> Tensor:
        """Map x […, 4C] to linear(GELU(x)) […, C]; a backward needs x to be [N, 4C]."""
        return _GeluLinear.apply(x, self.weight, self.bias, self.ends_block)


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, ends_block: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.wide = is_wide(x, weight)
        if ctx.wide:
            product = lambda: wide_linear(x, weight, bias, gelu=True)  # noqa: E731
        else:
            product = lambda: F.linear(F.gelu(x), weight, bias)  # noqa: E731
        if not ends_block or torch.compiler.is_compiling():
            return product()
        return last_of_block(product, (*x.shape[:-1], len(weight)), x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if ctx.wide:
            return *wide_linear_backward(grad, x, weight, ctx.needs_input_grad[:3], gelu=True), None
        hidden = F.gelu(x) if ctx.needs_input_grad[1] else None
        grad_weight = (grad.t() @ hidden.to(grad.dtype)).to(weight.dtype) if hidden is not None else None
        grad_bias = grad.sum(0).to(weight.dtype) if ctx.needs_input_grad[2] else None
        del hidden  # the largest temporary of a block: freed before the next of its size
        grad_x = (grad @ weight.to(grad.dtype)).to(x.dtype)
        torch.ops.aten.gelu_backward(grad_x, x, grad_input=grad_x)
        return grad_x, grad_weight, grad_bias, None


def add_branch(tokens: Tensor, branch: Tensor, keep: Tensor | None) -> Tensor:
    """Return tokens + keep · branch, both [N, C]; `keep` [N, 1] is the drop-path factor (0: dropped), None is 1."""
    return tokens + branch if keep is None else torch.addcmul(tokens, branch, keep)
