"""Weights and inputs that a fixture needs not store: a value from a name and an index."""

import math
from collections.abc import Callable
from zlib import crc32

import torch
from torch import Tensor, nn


def by_rule(name: str, shape: tuple[int, ...], scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """float64; spread like a random draw, the same on every machine and in every torch."""
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    phase = crc32(name.encode()) % 10007 / 7.0
    return (scale * torch.sin(phase + 12.9898 * i + 0.37 * torch.sin(78.233 * i)) + shift).reshape(shape)


def by_hash(name: str, shape: tuple[int, ...], scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """As `by_rule`, but uniform and without its regularity: matrices by that rule are nearly of low rank, and the
    region features behind them so alike that the matching has near-ties."""
    mask = 0xFFFFFFFF
    h = (torch.arange(math.prod(shape)) + crc32(name.encode())) * 0x9E3779B1 & mask
    for shift_by, factor in ((15, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        h = (h ^ h >> shift_by) * factor & mask
    return (scale * (h.double() / 2**31 - 1) + shift).reshape(shape)


@torch.no_grad()
def fill(module: nn.Module, by_rule: Callable[..., Tensor] = by_rule) -> None:
    for name, p in module.named_parameters():
        if name.endswith("weight_g") or (p.ndim == 1 and "norm" in name and name.endswith("weight")):
            value = by_rule(name, tuple(p.shape), 0.3, 1.0)
        elif p.ndim == 1:
            value = by_rule(name, tuple(p.shape), 0.1)
        else:
            value = by_rule(name, tuple(p.shape), 2.0 / math.sqrt(p[0].numel()) if "table" not in name else 1.0)
        p.copy_(value)
