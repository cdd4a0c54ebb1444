"""Layer norm that sums the gradients of weight and bias in fp32, on CPUs too.

torch's CPU kernel sums these gradients over tokens in the precision of its input: in bf16 a sum stops growing at 256
times its terms, and at 10⁵ tokens 90 % of a bias's gradient is lost. GPU kernels and compiled code sum in fp32.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

ROWS_AT_ONCE = 1024  # rows cast to fp32 at a time, few enough to stay in the cache


class LayerNorm(nn.LayerNorm):
    """Drop-in replacement for torch's LayerNorm; only the gradients of weight and bias differ, in bf16 on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of x […, C]."""
        return layer_norm(x, self.weight, self.bias, self.eps)


def replace(network: nn.Module) -> None:
    """Turn every torch LayerNorm that has parameters in a network into this module's `LayerNorm`, in place."""
    for module in network.modules():
        if type(module) is nn.LayerNorm and module.elementwise_affine:
            module.__class__ = LayerNorm


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Normalise the last dimension of x […, C]; weight and bias are [C]."""
    on_cpu = x.device.type == "cpu" and x.dtype == torch.bfloat16 and not torch.compiler.is_compiling()
    trained = torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad))
    if on_cpu and trained and weight.dim() == 1:
        return _LayerNorm.apply(x, weight, bias, eps)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        # Given fp32 parameters, the kernel returns the same output as with bf16 ones, and mean and rstd in fp32.
        wide = None if bias is None else bias.float()
        out, mean, rstd = torch.native_layer_norm(x, weight.shape, weight.float(), wide, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        grad, wide = grad.contiguous(), weight.float()
        backward = torch.ops.aten.native_layer_norm_backward
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = backward(grad, x, weight.shape, mean, rstd, wide, wide, [True, False, False])[0]
        grad_weight, grad_bias = torch.zeros_like(wide), torch.zeros_like(wide)
        rows = (t.flatten(0, -2).split(ROWS_AT_ONCE) for t in (grad, x, mean, rstd))
        for g, part, of_mean, of_rstd in zip(*rows, strict=True):
            sums = backward(g.float(), part.float(), weight.shape, of_mean, of_rstd, wide, wide, [False, True, True])
            grad_weight += sums[1]
            grad_bias += sums[2]
        of_bias = None if ctx.bias_dtype is None else grad_bias.to(ctx.bias_dtype)
        return grad_x, grad_weight.to(weight.dtype), of_bias, None
