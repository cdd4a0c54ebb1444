"""2-D convolution that sums the gradient of its weight in fp32, on every CPU.

On a CPU without AVX-512 oneDNN has no convolutions in bf16, and torch's own take the images one after the other and add
up their gradients in bf16: at 400 images a weight's gradient is 2 % off, and the error grows with the batch.
"""

import torch
from torch import Tensor, nn

ONEDNN_HAS_BF16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()


class Conv2d(nn.Conv2d):
    """Drop-in replacement for torch's Conv2d; it differs in bf16 on a CPU without AVX-512 alone, and computes in fp32."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Convolve maps [N, C, H, W], as torch's method of this name, which its `forward` calls."""
        autocast = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if autocast else input.dtype
        if input.device.type != "cpu" or dtype != torch.bfloat16 or ONEDNN_HAS_BF16:
            return super()._conv_forward(input, weight, bias)
        with torch.autocast("cpu", enabled=False):
            wide = None if bias is None else bias.float()
            return super()._conv_forward(input.float(), weight.float(), wide).to(dtype)


def replace(network: nn.Module) -> None:
    """Turn every torch Conv2d in a network into this module's `Conv2d`, in place."""
    for module in network.modules():
        if type(module) is nn.Conv2d:
            module.__class__ = Conv2d
