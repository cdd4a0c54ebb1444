"""Sparse trunks, `model.trunk: sparse:NAME`: a trunk of this package that prunes tokens (docs/sparsify.md).

`model.keep` is the fraction of tokens that is kept.
"""

from esvit_scale.config import Config
from esvit_scale.errors import UserError
from esvit_scale.models import convolution, layer_norm, swin_variants, vit
from esvit_scale.models.channels import take_channels
from esvit_scale.models.registry import SPARSE
from esvit_scale.models.shape import overridden
from esvit_scale.models.sparse_swin import SparseSwin
from esvit_scale.models.sparse_vit import SparseMoCoViT, SparseViT, places
from esvit_scale.models.trunk import Trunk

DEFAULT_KEEP = 0.7
NAMES = (*vit.VARIANTS, *(name for name, shape in swin_variants.SHAPES.items() if shape.version == 1))


def build(config: Config) -> Trunk:
    """Return the sparse trunk that `config.model` describes.

    Raises:
        UserError: there is no sparse form of the trunk, or it has too few blocks, or the trunk itself cannot be built.
    """
    name = config.model.trunk.removeprefix(SPARSE)
    if name not in NAMES:
        raise UserError(f"model.trunk: no sparse form of {name!r}; there are {', '.join(NAMES)}")
    dense = config.model_copy(update={"model": config.model.model_copy(update={"trunk": name})})
    build_sparse = _swin if name in swin_variants.SHAPES else _vit
    trunk = take_channels(build_sparse(dense, config.model.keep or DEFAULT_KEEP), config.data.channels)
    layer_norm.replace(trunk)
    convolution.replace(trunk)
    return trunk


def _vit(config: Config, keep: float) -> Trunk:
    variant = vit.VARIANTS[config.model.trunk]
    vit.build(config)  # checks the overrides
    shape, model = overridden(config, variant.shape), config.model
    if not places(shape.depths[0]):
        raise UserError(
            f"model.depths: {model.depths} leaves no block after a first one, before which tokens are pruned"
        )
    kind = SparseViT if variant.kind.learns_positions else SparseMoCoViT
    return kind(shape.embed_dim, shape.depths[0], shape.heads[0], model.drop_path, model.registers, keep)


def _swin(config: Config, keep: float) -> Trunk:
    shape, model = swin_variants.swin_shape(config), config.model
    return SparseSwin(
        *(shape.embed_dim, shape.depths, shape.heads, model.window, config.data.global_crops.size, model.drop_path),
        keep=keep,
    )
