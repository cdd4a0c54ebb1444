"""Distributions from which initial values of parameters are drawn, each a function of a shape and a generator."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Generator, Tensor


class OfSeed(NamedTuple):
    """The initial value of a parameter whose library (timm) draws all parameters of a network in one sequence.

    `draw` therefore maps the run's seed to the value, and takes no generator.
    """

    draw: Callable[[int], Tensor]


Initializer = Callable[[Sequence[int], Generator], Tensor] | OfSeed  # (shape, generator) → float32 on the CPU


CUT = 2.0  # `normal` is truncated at ±2, not at ±2σ, as in timm and the official code


def normal(std: float) -> Initializer:
    """Return the normal distribution around 0, truncated at ±CUT by redrawing the values outside.

    With every torch version, a seed gives the numbers that torch 2.13's and 2.14's `trunc_normal_` draw; torch 2.7's
    draws others.
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
    """Return the distribution that fills a tensor with `value`."""
    return lambda shape, generator: torch.full(tuple(shape), value, dtype=torch.float32, device="cpu")
