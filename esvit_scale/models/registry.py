"""Trunks by name. The run config gives the window and may override widths, depths and heads."""

from typing import Literal, NamedTuple

from esvit_scale.config import Config
from esvit_scale.errors import UserError, nearest
from esvit_scale.models.swin import PATCH, Swin
from esvit_scale.models.swin_v2 import SwinV2


class Shape(NamedTuple):
    embed_dim: int
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    version: Literal[1, 2] = 1  # of Swin
    extra_norm_every: int | None = None  # see models/swin_v2.py


SHAPES = {
    "swin_t": Shape(96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "swin_s": Shape(96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "swin_b": Shape(128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "swin_l": Shape(192, (2, 2, 18, 2), (6, 12, 24, 48)),
    "swinv2_t": Shape(96, (2, 2, 6, 2), (3, 6, 12, 24), version=2),
    "swinv2_s": Shape(96, (2, 2, 18, 2), (3, 6, 12, 24), version=2),
    "swinv2_b": Shape(128, (2, 2, 18, 2), (4, 8, 16, 32), version=2),
    "swinv2_l": Shape(192, (2, 2, 18, 2), (6, 12, 24, 48), version=2),
    "swinv2_h": Shape(352, (2, 2, 18, 2), (11, 22, 44, 88), version=2, extra_norm_every=6),
    "swinv2_1b": Shape(448, (2, 2, 18, 2), (14, 28, 56, 112), version=2),
    "swinv2_g": Shape(512, (2, 2, 42, 4), (16, 32, 64, 128), version=2, extra_norm_every=6),
}


def trunk_shape(config: Config) -> Shape:
    """The shape of the config's trunk.

    Raises:
        UserError: unknown name, or overrides that do not fit together.
    """
    model = config.model
    if model.trunk not in SHAPES:
        raise UserError(f"model.trunk: unknown trunk {model.trunk!r}{nearest(model.trunk, SHAPES)}")
    named = SHAPES[model.trunk]
    shape = named._replace(
        embed_dim=model.embed_dim or named.embed_dim,
        depths=tuple(model.depths or named.depths),
        heads=tuple(model.heads or named.heads),
    )
    if len(shape.depths) != len(shape.heads):
        raise UserError(
            f"model.depths has {len(shape.depths)} stages and model.heads {len(shape.heads)} (of {model.trunk}); "
            "give both with one number a stage"
        )
    for i, heads in enumerate(shape.heads):
        width = shape.embed_dim * 2**i
        if width % heads:
            divisors = [d for d in range(1, width + 1) if width % d == 0]
            near = min(divisors, key=lambda d: abs(d - heads))
            raise UserError(
                f"model.heads.{i}: {heads} heads do not divide the stage's {width} channels; nearest: {near}"
            )
    smallest = PATCH * 2 ** (len(shape.depths) - 1)
    if config.data.global_crops.size < smallest:
        raise UserError(
            f"data.global_crops.size: {config.data.global_crops.size} pixels leave nothing for stage "
            f"{len(shape.depths)}; at least {smallest}"
        )
    return shape


def build_trunk(config: Config) -> Swin:
    """The trunk that `config.model` names, with `dim` and `forward(crops, drop_keys) -> Features`.

    Raises:
        UserError: as `trunk_shape`.
    """
    shape = trunk_shape(config)
    size, window, drop_path = config.data.global_crops.size, config.model.window, config.model.drop_path
    common = (shape.embed_dim, shape.depths, shape.heads, window, size, drop_path)
    return SwinV2(*common, extra_norm_every=shape.extra_norm_every) if shape.version == 2 else Swin(*common)
