"""The projection head of EsViT (as DINO's): an MLP to a unit bottleneck, and prototypes to compare it with."""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from esvit_scale.models.distributions import Initializer, constant, uniform

Result = TypeVar("Result")

ROWS_AT_ONCE = 4096  # prototypes; in fp32 at D = 256 4 MB


class ProjectionHead(nn.Module):
    """Linear GELU Linear GELU Linear → unit vector, and the prototypes.

    Args:
        dim: C, width of the trunk's features.
        hidden, bottleneck: widths of the MLP and of its output D.
        prototypes: K.
        norm_last_layer: keep the prototypes' gains at 1.
    """

    def __init__(self, dim: int, hidden: int, bottleneck: int, prototypes: int, norm_last_layer: bool = False) -> None:
        super().__init__()
        self.dim, self.hidden, self.bottleneck, self.prototypes = dim, hidden, bottleneck, prototypes
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        self.last_layer = Prototypes(bottleneck, prototypes, norm_last_layer)

    def forward(self, features: Tensor) -> Tensor:
        """Map features [n, C] to the bottleneck [n, D], unit rows."""
        return _unit(self.mlp(features))


class Prototypes(nn.Module):
    """K rows w_k = g_k · v_k / ‖v_k‖ (weight normalisation, Salimans and Kingma 2016)."""

    def __init__(self, bottleneck: int, prototypes: int, norm_last_layer: bool) -> None:
        super().__init__()
        self.bottleneck = bottleneck
        bound = bottleneck**-0.5
        self.weight_g = nn.Parameter(torch.ones(prototypes, 1), requires_grad=not norm_last_layer)
        self.weight_v = nn.Parameter(torch.empty(prototypes, bottleneck).uniform_(-bound, bound))

    def initial_values(self) -> dict[str, Initializer]:
        """Return the initialisers of directions (torch's default for a linear layer) and gains."""
        return {"weight_v": uniform(self.bottleneck**-0.5), "weight_g": constant(1.0)}

    def forward(self, z: Tensor, use: Callable[[Tensor, Tensor], Result]) -> Result:
        """Return `use(z, rows)` with the rows [K, D] in z's precision (bf16 for fp16, whose range ends at 1/K).

        The rows' user runs inside this call because under ZeRO-3 the parameters are whole only here.
        """
        dtype = torch.bfloat16 if z.dtype == torch.float16 else z.dtype
        return use(z, _WeightNorm.apply(self.weight_v, self.weight_g, dtype))


class _WeightNorm(torch.autograd.Function):
    """w_k = g_k · v_k / ‖v_k‖ in fp32 or wider, handed out in another precision.

    A block of rows at a time: the intermediate products stay in the cache, and of size K × D only the result exists.
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
