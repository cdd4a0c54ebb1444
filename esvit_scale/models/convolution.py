"""2-D convolution that sums the gradient of its weight in fp32, on every CPU.

On a CPU without AVX-512 oneDNN has no convolutions in bf16, and torch's own take the images one after the other and add
up their gradients in bf16: at 400 images a weight's gradient is 2 % off, and the error grows with the batch.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

ONEDNN_HAS_BF16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()


class Conv2d(nn.Conv2d):
    """Drop-in replacement for torch's Conv2d; it differs in bf16 on a CPU without AVX-512 alone, and computes in fp32."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Convolve maps [N, C, H, W], as torch's method of this name, which its `forward` calls."""
        autocast = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if autocast else input.dtype
        if input.device.type != "cpu" or dtype != torch.bfloat16 or ONEDNN_HAS_BF16:
            return super()._conv_forward(input, weight, bias)
        if self.padding_mode != "zeros" or isinstance(self.padding, str):
            input = F.pad(input, self._reversed_padding_repeated_twice, _pad_mode(self.padding_mode))
            padding = [0, 0]
        else:
            padding = list(self.padding)
        bias = None if bias is None else bias.to(dtype)
        geometry = (list(self.stride), padding, list(self.dilation), False, [0, 0], self.groups)
        with torch.autocast("cpu", enabled=False):
            return _Convolution.apply(input.to(dtype), weight.to(dtype), bias, geometry)


def replace(network: nn.Module) -> None:
    """Turn every torch Conv2d in a network into this module's `Conv2d`, in place."""
    for module in network.modules():
        if type(module) is nn.Conv2d:
            module.__class__ = Conv2d


def _pad_mode(padding_mode: str) -> str:
    """Return the name that F.pad has for a padding mode of Conv2d."""
    return "constant" if padding_mode == "zeros" else padding_mode


class _Convolution(torch.autograd.Function):
    """A convolution in fp32 that keeps bf16 tensors for its backward, as torch's does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry, ctx.has_bias = geometry, bias is not None
        wide = None if bias is None else bias.float()
        return torch.ops.aten.convolution(x.float(), weight.float(), wide, *geometry).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        sizes, wanted = [weight.shape[0]] if ctx.has_bias else None, list(ctx.needs_input_grad[:3])
        wide = (grad.float(), x.float(), weight.float())
        grads = torch.ops.aten.convolution_backward(*wide, sizes, *ctx.geometry, wanted)
        return *(None if g is None else g.to(x.dtype) for g in grads), None
