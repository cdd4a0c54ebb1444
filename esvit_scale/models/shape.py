"""Widths, depths and heads of a trunk: the named ones, with what the run config replaces."""

from typing import Literal, NamedTuple

from esvit_scale.config import Config
from esvit_scale.errors import UserError


class Shape(NamedTuple):
    """The widths, depths and heads of a trunk."""

    embed_dim: int  # C of the first stage
    depths: tuple[int, ...]  # blocks per stage
    heads: tuple[int, ...]  # per stage; empty: no attention
    growth: tuple[int, ...] = ()  # each stage's width in embed_dims; empty: it doubles at each stage
    version: Literal[1, 2] = 1  # of Swin
    extra_norm_every: int | None = None  # see models/swin_v2.py

    @property
    def widths(self) -> tuple[int, ...]:
        """C of every stage."""
        return tuple(self.embed_dim * g for g in self.growth or (2**i for i in range(len(self.depths))))


def overridden(config: Config, named: Shape) -> Shape:
    """Return `named` with the `model.embed_dim`, `depths` and `heads` that the config gives.

    Raises:
        UserError: they do not fit together.
    """
    model = config.model
    shape = named._replace(
        embed_dim=model.embed_dim or named.embed_dim,
        depths=tuple(model.depths or named.depths),
        heads=tuple(model.heads or named.heads),
    )
    if model.heads and not named.heads:
        raise UserError(f"model.heads: {model.trunk} has no attention; leave it out")
    if shape.heads and len(shape.depths) != len(shape.heads):
        raise UserError(
            f"model.depths has {len(shape.depths)} stages and model.heads {len(shape.heads)} (of {model.trunk}); "
            "give both with one number a stage"
        )
    if shape.growth and len(shape.depths) != len(shape.growth):
        raise UserError(f"model.depths: {model.trunk} has {len(shape.growth)} stages, got {len(shape.depths)}")
    for i, (width, heads) in enumerate(zip(shape.widths, shape.heads, strict=False)):
        if width % heads:
            divisors = [d for d in range(1, width + 1) if width % d == 0]
            near = min(divisors, key=lambda d: abs(d - heads))
            raise UserError(
                f"model.heads.{i}: {heads} heads do not divide the stage's {width} channels; nearest: {near}"
            )
    return shape
