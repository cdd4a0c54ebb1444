"""The projection head of DINO and EsViT: an MLP to a unit vector, and prototypes that this vector is compared with."""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from esvit_scale.models.distributions import Initializer, constant, uniform

Result = TypeVar("Result")

ROWS_AT_ONCE = 4096  # prototypes per block: 4 MB in fp32 at D = 256


class ProjectionHead(nn.Module):
    """An MLP (Linear GELU Linear GELU Linear) whose output is scaled to unit norm, and a layer of prototypes.

    `forward` runs the MLP only; the loss calls the prototypes, `last_layer`.

    Args:
        dim: C, width of the trunk's features.
        hidden: width of the MLP's hidden layers.
        bottleneck: D, width of the MLP's output.
        prototypes: K, number of prototypes.
        norm_last_layer: whether the prototypes' norms are fixed at 1.
    """

    def __init__(self, dim: int, hidden: int, bottleneck: int, prototypes: int, norm_last_layer: bool = False) -> None:
        super().__init__()
        self.dim, self.hidden, self.bottleneck, self.prototypes = dim, hidden, bottleneck, prototypes
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        self.last_layer = Prototypes(bottleneck, prototypes, norm_last_layer)

    def forward(self, features: Tensor) -> Tensor:
        """Map features [n, C] to bottleneck vectors of unit norm, [n, D]."""
        return _unit(self.mlp(features))


class Prototypes(nn.Module):
    """K prototypes w_k = g_k · v_k / ‖v_k‖ of D numbers (weight normalisation, Salimans and Kingma 2016).

    The parameters are the directions v, `weight_v` [K, D], and the gains g, `weight_g` [K, 1].
    """

    def __init__(self, bottleneck: int, prototypes: int, norm_last_layer: bool) -> None:
        super().__init__()
        self.bottleneck = bottleneck
        bound = bottleneck**-0.5
        self.weight_g = nn.Parameter(torch.ones(prototypes, 1), requires_grad=not norm_last_layer)
        self.weight_v = nn.Parameter(torch.empty(prototypes, bottleneck).uniform_(-bound, bound))

    def initial_values(self) -> dict[str, Initializer]:
        """Return the initialisers of the directions (torch's default for a linear layer: uniform) and the gains (1)."""
        return {"weight_v": uniform(self.bottleneck**-0.5), "weight_g": constant(1.0)}

    def forward(self, z: Tensor, use: Callable[[Tensor, Tensor], Result]) -> Result:
        """Return `use(z, prototypes)`, with the prototypes [K, D] in z's precision.

        For z in fp16 they are bf16, because fp16 cannot represent probabilities of about 1/K well. `use` is called in
        here because under ZeRO-3 the parameters are gathered only during this call.
        """
        dtype = torch.bfloat16 if z.dtype == torch.float16 else z.dtype
        return use(z, _WeightNorm.apply(self.weight_v, self.weight_g, dtype))


class _WeightNorm(torch.autograd.Function):
    """Weight normalisation w_k = g_k · v_k / ‖v_k‖, computed in fp32 or wider and returned in a given precision.

    torch's fused operator reads and writes every number once. Where the result has another precision than the
    parameters, it runs on a block of rows at a time, so that only the result is a new tensor of size K × D.
    """

    @staticmethod
    def forward(ctx: Any, v: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
        if v.dtype == g.dtype == dtype:
            rows, norms = _normalise(v, g, 0)
        else:
            wide = torch.promote_types(v.dtype, torch.float32)
            rows, norms = torch.empty_like(v, dtype=dtype), torch.empty_like(g, dtype=wide)
            for out, out_norms, v_block, g_block in _blocks(rows, norms, v, g):
                block, block_norms = _normalise(v_block.to(wide), g_block.to(wide), 0)
                out.copy_(block)
                out_norms.copy_(block_norms)
        ctx.save_for_backward(v, g, norms)
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor | None, ...]:
        v, g, norms = ctx.saved_tensors
        if v.dtype == g.dtype == grad_rows.dtype:
            grad_v, grad_g = _normalise_backward(grad_rows.contiguous(), v, g, norms, 0)
        else:
            grad_v, grad_g = torch.empty_like(v), torch.empty_like(g)
            for out_v, out_g, grad, v_block, g_block, of_block in _blocks(grad_v, grad_g, grad_rows, v, g, norms):
                wide = (x.to(norms.dtype) for x in (grad, v_block, g_block))
                for out, block in zip((out_v, out_g), _normalise_backward(*wide, of_block, 0), strict=True):
                    out.copy_(block)
        return grad_v if ctx.needs_input_grad[0] else None, grad_g if ctx.needs_input_grad[1] else None, None


# Both compute in fp32 or wider, and take the dimension that is kept as their last argument.
_normalise = torch.ops.aten._weight_norm_interface  # v, g → w, ‖v‖
_normalise_backward = torch.ops.aten._weight_norm_interface_backward  # dL/dw, v, g, ‖v‖ → dL/dv, dL/dg


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(x.split(ROWS_AT_ONCE) for x in tensors), strict=True)


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1).to(x.dtype)
