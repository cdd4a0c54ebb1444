"""The projection head of EsViT (as DINO's): an MLP to a unit bottleneck, and prototypes to compare it with."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Result = TypeVar("Result")


class Head(nn.Module):
    """Linear GELU Linear GELU Linear → unit vector, and the prototypes.

    Args:
        dim: C, width of the trunk's features.
        hidden, bottleneck: widths of the MLP and of its output D.
        prototypes: K.
        norm_last_layer: keep the prototypes' gains at 1.
    """

    def __init__(self, dim: int, hidden: int, bottleneck: int, prototypes: int, norm_last_layer: bool = False) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        self.last_layer = Prototypes(bottleneck, prototypes, norm_last_layer)

    def forward(self, features: Tensor) -> Tensor:  # [n, C] → [n, D], unit norm
        return _unit(self.mlp(features))


class Prototypes(nn.Module):
    """K rows w_k = g_k · v_k / ‖v_k‖ (weight normalisation, Salimans and Kingma 2016)."""

    def __init__(self, bottleneck: int, prototypes: int, norm_last_layer: bool) -> None:
        super().__init__()
        bound = bottleneck**-0.5
        self.weight_g = nn.Parameter(torch.ones(prototypes, 1), requires_grad=not norm_last_layer)
        self.weight_v = nn.Parameter(torch.empty(prototypes, bottleneck).uniform_(-bound, bound))

    def forward(self, z: Tensor, use: Callable[[Tensor, Tensor], Result]) -> Result:
        """`use(z, rows)` with the rows [K, D] in fp32 (fp64 for fp64), whatever the parameters' precision.

        The rows' user runs inside this call because under ZeRO-3 the parameters are whole only here.
        """
        dtype = torch.promote_types(self.weight_v.dtype, torch.float32)
        v, g = self.weight_v.to(dtype), self.weight_g.to(dtype)
        return use(z, v * (g / torch.linalg.vector_norm(v, dim=1, keepdim=True)))


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1).to(x.dtype)
