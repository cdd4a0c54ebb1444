"""The widths, depths and attention heads of a trunk: those of a named variant, with the run config's overrides."""

from typing import Literal, NamedTuple

from esvit_scale.config import Config
from esvit_scale.errors import UserError


class Shape(NamedTuple):
    """The widths, depths and attention heads of a trunk."""

    embed_dim: int  # C of the first stage
    depths: tuple[int, ...]  # blocks per stage
    heads: tuple[int, ...]  # attention heads per stage; empty: a trunk without attention
    growth: tuple[int, ...] = ()  # each stage's width as a multiple of embed_dim; empty: 1, 2, 4, …
    version: Literal[1, 2] = 1  # Swin V1 or V2; other trunks do not use it
    extra_norm_every: int | None = None  # see models/swin_v2.py

    @property
    def widths(self) -> tuple[int, ...]:
        """The width C (number of channels) of every stage."""
        return tuple(self.embed_dim * g for g in self.growth or (2**i for i in range(len(self.depths))))


def overridden(config: Config, named: Shape) -> Shape:
    """Return the shape `named` with every value replaced that `model.embed_dim`, `.depths` or `.heads` sets.

    Raises:
        UserError: the resulting values do not fit together, for example heads that do not divide a stage's width.
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
