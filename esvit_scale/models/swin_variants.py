"""The named Swin variants: their sizes, and the function that builds one from the run config."""

from esvit_scale.config import Config
from esvit_scale.errors import UserError, nearest
from esvit_scale.models.shape import Shape, overridden
from esvit_scale.models.swin import PATCH, Swin
from esvit_scale.models.swin_v2 import SwinV2

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


def swin_shape(config: Config) -> Shape:
    """Return the shape of the Swin that `config.model.trunk` names, with the overrides of `config.model`.

    Raises:
        UserError: the trunk is no Swin, its overrides do not fit together, or the global crops are too small to leave
            a token in the last stage.
    """
    name = config.model.trunk
    if name not in SHAPES:
        raise UserError(f"model.trunk: {name!r} is no Swin{nearest(name, SHAPES)}")
    shape = overridden(config, SHAPES[name])
    smallest = PATCH * 2 ** (len(shape.depths) - 1)
    if config.data.global_crops.size < smallest:
        raise UserError(
            f"data.global_crops.size: {config.data.global_crops.size} pixels leave nothing for stage "
            f"{len(shape.depths)}; at least {smallest}"
        )
    return shape


def build(config: Config) -> Swin:
    """Build the Swin (V1 or V2) that the config describes; raises UserError in the same cases as `swin_shape`."""
    shape = swin_shape(config)
    size, window, drop_path = config.data.global_crops.size, config.model.window, config.model.drop_path
    common = (shape.embed_dim, shape.depths, shape.heads, window, size, drop_path)
    if shape.version == 1:
        return Swin(*common)
    before = config.model.pretrained_windows
    if before is not None and len(before) != len(shape.depths):
        raise UserError(
            f"model.pretrained_windows: {len(before)} stages, but {config.model.trunk} has {len(shape.depths)}"
        )
    return SwinV2(*common, extra_norm_every=shape.extra_norm_every, pretrained_windows=before)
