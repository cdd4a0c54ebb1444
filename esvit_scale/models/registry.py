"""Trunks by name: one line each. The run config gives the window and may override widths, depths and heads.

A builder takes the whole config, checks that the trunk fits it (crop sizes, overrides) and returns a `Trunk`.
"""

from collections.abc import Callable
from importlib import import_module

from esvit_scale.config import Config
from esvit_scale.errors import UserError, nearest
from esvit_scale.models import cvt, focal, layer_norm, resnet, swin_variants, vil, vit
from esvit_scale.models.channels import take_channels
from esvit_scale.models.trunk import Trunk

TRUNKS: dict[str, Callable[[Config], Trunk]] = {
    **dict.fromkeys(swin_variants.SHAPES, swin_variants.build),
    **dict.fromkeys(vit.VARIANTS, vit.build),
    **dict.fromkeys(resnet.SHAPES, resnet.build),
    "cvt_s1": cvt.build,
    "vil_2262": vil.build,
    **dict.fromkeys(focal.SHAPES, focal.build),
}


LIBRARIES = {"timm": "esvit_scale.models.timm_trunk"}  # `model.trunk: timm:NAME` → the module that builds it


def build_trunk(config: Config) -> Trunk:
    """Return the trunk that `config.model` names.

    Raises:
        UserError: unknown name, or a trunk that does not fit the config; one line.
    """
    name = config.model.trunk
    library, colon, _ = name.partition(":")
    if colon and library in LIBRARIES:
        trunk: Trunk = import_module(LIBRARIES[library]).build(config)  # a library takes a second to import
    elif name in TRUNKS:
        trunk = take_channels(TRUNKS[name](config), config.data.channels)
        layer_norm.replace(trunk)
    else:
        raise UserError(f"model.trunk: unknown trunk {name!r}{nearest(name, TRUNKS)}")
    trunk.name = name
    return trunk
