"""Distributions of initial values, each a function of a shape and a generator."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn


class OfSeed(NamedTuple):
    """A value that a library draws together with others: a function of the run's seed, not of a generator of its own."""

    draw: Callable[[int], Tensor]


Initializer = Callable[[Sequence[int], Generator], Tensor] | OfSeed  # (shape, generator) → float32 on the CPU


def normal(std: float) -> Initializer:
    """Truncated at 2 (not at 2σ), as timm and the official code have it."""
    return lambda shape, generator: nn.init.trunc_normal_(
        torch.empty(*shape, dtype=torch.float32, device="cpu"), std=std, generator=generator
    )


def uniform(bound: float) -> Initializer:
    return lambda shape, generator: torch.empty(*shape, dtype=torch.float32, device="cpu").uniform_(
        -bound, bound, generator=generator
    )


def constant(value: float) -> Initializer:
    return lambda shape, generator: torch.full(tuple(shape), value, dtype=torch.float32, device="cpu")
