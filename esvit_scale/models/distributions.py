"""Distributions of initial values, each a function of a shape and a generator."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Generator, Tensor


class OfSeed(NamedTuple):
    """A value that a library draws together with others: a function of the run's seed, not of a generator of its own."""

    draw: Callable[[int], Tensor]


Initializer = Callable[[Sequence[int], Generator], Tensor] | OfSeed  # (shape, generator) → float32 on the CPU


CUT = 2.0  # where `normal` is truncated: at ±2, not at 2σ, as timm and the official code have it


def normal(std: float) -> Initializer:
    """Return a normal distribution around 0 that is truncated at ±CUT, by drawing again what lies outside.

    torch's `trunc_normal_` draws other numbers from the same generator in 2.7 than in 2.13 and 2.14; this gives the latter's
    in all of them, so that a seed means the same weights.
    """

    def draw(shape: Sequence[int], generator: Generator) -> Tensor:
        values = torch.empty(*shape, dtype=torch.float32, device="cpu").normal_(0, std, generator=generator)
        while (outside := values.abs() > CUT).any():
            again = torch.empty_like(values).normal_(0, std, generator=generator)
            values = torch.where(outside, again, values)
        return values

    return draw


def uniform(bound: float) -> Initializer:
    """Return the uniform distribution on [−bound, bound]."""
    return lambda shape, generator: torch.empty(*shape, dtype=torch.float32, device="cpu").uniform_(
        -bound, bound, generator=generator
    )


def constant(value: float) -> Initializer:
    """Return the distribution that is always `value`."""
    return lambda shape, generator: torch.full(tuple(shape), value, dtype=torch.float32, device="cpu")
