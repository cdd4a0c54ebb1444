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

    It is computed for a block of rows at a time, so that intermediate values stay in the cache and the result is the
    only tensor of size K × D that is allocated.
    """

    @staticmethod
    def forward(ctx: Any, v: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
        rows = torch.empty_like(v, dtype=dtype)
        for out, v_block, g_block in _blocks(rows, v, g):
            v_block = _wide(v_block)
            out.copy_(v_block * (_wide(g_block) / torch.linalg.vector_norm(v_block, dim=1, keepdim=True)))
        ctx.save_for_backward(v, g)
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor | None, ...]:
        v, g = ctx.saved_tensors
        grad_v, grad_g = torch.empty_like(v), torch.empty_like(g)
        for out_v, out_g, v_block, g_block, grad in _blocks(grad_v, grad_g, v, g, grad_rows):
            v_block, grad = _wide(v_block), _wide(grad)
            norm = torch.linalg.vector_norm(v_block, dim=1, keepdim=True)
            unit = v_block / norm
            along = (unit * grad).sum(1, keepdim=True)  # dL/dg
            out_g.copy_(along)
            out_v.copy_((grad - unit.mul_(along)).mul_(_wide(g_block) / norm))
        return grad_v if ctx.needs_input_grad[0] else None, grad_g if ctx.needs_input_grad[1] else None, None


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(x.split(ROWS_AT_ONCE) for x in tensors), strict=True)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _unit(x: Tensor) -> Tensor:
    return F.normalize(_wide(x), dim=-1).to(x.dtype)
