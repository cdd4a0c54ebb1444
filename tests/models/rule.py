"""Weights and inputs that a fixture needs not store: a value from a name and an index."""

import math
from zlib import crc32

import torch
from torch import Tensor, nn


def by_rule(name: str, shape: tuple[int, ...], scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """float64; spread like a random draw, the same on every machine and in every torch."""
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    phase = crc32(name.encode()) % 10007 / 7.0
    return (scale * torch.sin(phase + 12.9898 * i + 0.37 * torch.sin(78.233 * i)) + shift).reshape(shape)


@torch.no_grad()
def fill(module: nn.Module) -> None:
    for name, p in module.named_parameters():
        if name.endswith("weight_g") or (p.ndim == 1 and "norm" in name and name.endswith("weight")):
            value = by_rule(name, tuple(p.shape), 0.3, 1.0)
        elif p.ndim == 1:
            value = by_rule(name, tuple(p.shape), 0.1)
        else:
            value = by_rule(name, tuple(p.shape), 2.0 / math.sqrt(p[0].numel()) if "table" not in name else 1.0)
        p.copy_(value)
