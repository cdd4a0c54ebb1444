"""The registry of trunks: their names, as in `model.trunk`, and the functions that build them.

A builder takes the whole run config, in which `model` has the window and may override widths, depths and heads. It
checks that the trunk fits the config (crop sizes, overrides) and returns a `Trunk`.
"""

from collections.abc import Callable
from importlib import import_module

from esvit_scale.config import Config
from esvit_scale.errors import UserError, nearest
from esvit_scale.models import convolution, cvt, focal, layer_norm, modal, resnet, swin_variants, vil, vit
from esvit_scale.models.channels import take_channels
from esvit_scale.models.trunk import Trunk

TRUNKS: dict[str, Callable[[Config], Trunk]] = {
    **dict.fromkeys(swin_variants.SHAPES, swin_variants.build),
    **dict.fromkeys(vit.VARIANTS, vit.build),
    **dict.fromkeys(resnet.SHAPES, resnet.build),
    "cvt_s1": cvt.build,
    "vil_2262": vil.build,
    **dict.fromkeys(focal.SHAPES, focal.build),
    **dict.fromkeys(modal.SHAPES, modal.build),
}


LIBRARIES = {  # prefix of `model.trunk` ("timm:NAME") → module with `build`
    "sparse": "esvit_scale.models.sparse",
    "timm": "esvit_scale.models.timm_trunk",
}
SPARSE = "sparse:"  # prefix of trunks that prune tokens


def build_trunk(config: Config) -> Trunk:
    """Return the trunk that `config.model` names.

    Raises:
        UserError: the name is unknown, or the trunk does not fit the config.
    """
    name = config.model.trunk
    library, colon, _ = name.partition(":")
    if colon and library in LIBRARIES:
        trunk: Trunk = import_module(LIBRARIES[library]).build(config)  # a library takes a second to import
    elif name in TRUNKS:
        trunk = take_channels(TRUNKS[name](config), config.data.channels)
        layer_norm.replace(trunk)
        convolution.replace(trunk)
    else:
        raise UserError(f"model.trunk: unknown trunk {name!r}{nearest(name, TRUNKS)}")
    if trunk.registers != config.model.registers:
        raise UserError(
            f"model.registers: {name} takes none; set model.registers=0, or take one of {', '.join(vit.VARIANTS)}"
        )
    if config.model.pretrained_windows is not None and trunk.distance_windows is None:
        raise UserError(f"model.pretrained_windows: is for Swin V2, and {name} is none; leave it out")
    trunk.name = name
    return trunk
