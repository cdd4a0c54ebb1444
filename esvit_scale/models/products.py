"""Linear layers in bf16, whose products a CPU computes in fp32 where that is faster.

CPUs with AMX, and AMD's with AVX512-BF16, multiply bf16 faster than fp32. Others do not: Intel's AVX512-BF16 without
AMX reaches 0.6 of the rate of fp32 (benchmarks/README.md), and CPUs without bf16 instructions less. There, a linear
layer widens its operands to fp32, multiplies, and rounds the result once to bf16. It does so for ROWS_AT_ONCE rows at a
time, so that the fp32 numbers stay in the caches; GELU before the layer, the sum of the bias's gradient and the rounding
are done on the same rows, without further passes over memory.

The environment variable ESVIT_PRODUCTS (bf16 or fp32) overrides the choice.
"""

import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

KEY = "ESVIT_PRODUCTS"  # environment variable; `bf16` or `fp32`
CPUINFO = Path("/proc/cpuinfo")
ROWS_AT_ONCE = 1024  # rows widened at a time, few enough to stay in the caches

_library = torch.library.Library("esvit_scale", "DEF")
_library.define("wide_linear(Tensor x, Tensor weight, Tensor? bias, bool gelu) -> Tensor")


class Linear(nn.Linear):
    """Drop-in replacement for torch's Linear; only bf16 on a CPU differs, see this module's description."""

    def forward(self, x: Tensor) -> Tensor:
        """Map x […, inner] to […, outer]."""
        return linear(x, self.weight, self.bias)


def replace(network: nn.Module) -> None:
    """Turn every torch Linear in a network into this module's `Linear`, in place."""
    for module in network.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x Wᵀ + bias for x […, inner], weight [outer, inner] and bias [outer], as F.linear does."""
    if is_wide(x, weight):
        return _WideLinear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


def is_wide(x: Tensor, weight: Tensor) -> bool:
    """Return whether products of these two tensors are computed in fp32: both are bf16, on a CPU where fp32 is faster."""
    in_bf16 = x.dtype == weight.dtype == torch.bfloat16 and x.device.type == "cpu"
    # While compiling, fp32_is_faster must not be called: it would be traced down to the reading of /proc/cpuinfo.
    return in_bf16 and not torch.compiler.is_compiling() and fp32_is_faster()


@cache
def fp32_is_faster() -> bool:
    """Return whether this CPU multiplies matrices faster in fp32 than in bf16, as its flags tell; False if unknown."""
    asked = os.environ.get(KEY)
    if asked in ("bf16", "fp32"):
        return asked == "fp32"
    text = CPUINFO.read_text(errors="replace") if CPUINFO.exists() else ""
    flags = next((line.split() for line in text.splitlines() if line.startswith("flags")), [])
    fast_bf16 = "amx_bf16" in flags or ("avx512_bf16" in flags and "GenuineIntel" not in text)
    return "avx2" in flags and not fast_bf16


class _WideLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return wide_linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return wide_linear_backward(grad, x, weight, ctx.needs_input_grad[:3])


def wide_linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    """Return x Wᵀ + bias in x's precision, computed in fp32; with `gelu`, of GELU(x) in place of x.

    It is an operator of its own, so that selective checkpointing sees one product (models/recomputation.py).
    """
    return torch.ops.esvit_scale.wide_linear(x, weight, bias, gelu)


@torch.library.impl(_library, "wide_linear", "CPU")
def _wide_linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    out = x.new_empty(*x.shape[:-1], len(weight))
    wide, wide_bias = weight.float(), None if bias is None else bias.float()
    for rows, result in _row_blocks(x, out):
        rows = rows.float()
        result.copy_(F.linear(F.gelu(rows) if gelu else rows, wide, wide_bias))
    return out


def wide_linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, ...], gelu: bool = False
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x, weight and bias of `wide_linear`, each rounded once, and None for those not needed.

    Args:
        grad: the gradient of the result […, outer].
        needs: whether the gradients of x, weight and bias are needed.
    """
    wide = weight.float()
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if needs[0] else None
    grad_weight = torch.zeros_like(wide) if needs[1] else None
    grad_bias = wide.new_zeros(len(wide)) if needs[2] else None
    for g, rows, result in _row_blocks(grad, x, x if grad_x is None else grad_x):
        g, rows = g.float(), rows.float()
        if grad_weight is not None:
            grad_weight.addmm_(g.t(), F.gelu(rows) if gelu else rows)
        if grad_bias is not None:
            grad_bias += g.sum(0)
        if grad_x is not None:
            product = g @ wide
            result.copy_(torch.ops.aten.gelu_backward(product, rows) if gelu else product)
    narrow = [None if sums is None else sums.to(weight.dtype) for sums in (grad_weight, grad_bias)]
    return grad_x, narrow[0], narrow[1]


def _row_blocks(*tensors: Tensor) -> Any:
    """Yield blocks of ROWS_AT_ONCE rows of each tensor, seen as a matrix [rows, last dimension]."""
    return zip(*(x.reshape(-1, x.shape[-1]).split(ROWS_AT_ONCE) for x in tensors), strict=True)
