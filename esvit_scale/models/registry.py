"""Trunks by name: one line each. The run config gives the window and may override widths, depths and heads.

A builder takes the whole config, checks that the trunk fits it (crop sizes, overrides) and returns a `Trunk`.
"""

from collections.abc import Callable
from functools import partial

from esvit_scale.config import Config
from esvit_scale.errors import UserError, nearest
from esvit_scale.models import cvt, focal, layer_norm, resnet, vil, vit
from esvit_scale.models.channels import take_channels
from esvit_scale.models.shape import Shape, overridden
from esvit_scale.models.swin import PATCH, Swin
from esvit_scale.models.swin_v2 import SwinV2
from esvit_scale.models.trunk import Trunk
from esvit_scale.models.vit import MoCoViT, ViT

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
    """The shape of the config's Swin.

    Raises:
        UserError: another trunk, or overrides that do not fit together.
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


def _swin(config: Config) -> Trunk:
    shape = trunk_shape(config)
    size, window, drop_path = config.data.global_crops.size, config.model.window, config.model.drop_path
    common = (shape.embed_dim, shape.depths, shape.heads, window, size, drop_path)
    return SwinV2(*common, extra_norm_every=shape.extra_norm_every) if shape.version == 2 else Swin(*common)


TRUNKS: dict[str, Callable[[Config], Trunk]] = {
    **dict.fromkeys(SHAPES, _swin),
    "deit_s": partial(vit.build, ViT, Shape(384, (12,), (6,), (1,))),
    "deit_b": partial(vit.build, ViT, Shape(768, (12,), (12,), (1,))),
    "vit_s_moco": partial(vit.build, MoCoViT, Shape(384, (12,), (12,), (1,))),
    "vit_b_moco": partial(vit.build, MoCoViT, Shape(768, (12,), (12,), (1,))),
    "resnet50": partial(resnet.build, Shape(64, (3, 4, 6, 3), ())),
    "cvt_s1": cvt.build,
    "vil_2262": vil.build,
    **dict.fromkeys(focal.SHAPES, focal.build),
}


def build_trunk(config: Config) -> Trunk:
    """The trunk that `config.model` names.

    Raises:
        UserError: unknown name, or a trunk that does not fit the config; one line.
    """
    name = config.model.trunk
    if name.startswith("timm:"):
        from esvit_scale.models import timm_trunk  # the library takes a second to import

        return timm_trunk.build(config)
    if name not in TRUNKS:
        raise UserError(f"model.trunk: unknown trunk {name!r}{nearest(name, TRUNKS)}")
    trunk = take_channels(TRUNKS[name](config), config.data.channels)
    layer_norm.replace(trunk)
    return trunk
