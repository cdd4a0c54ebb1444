"""The trunk families of the official EsViT code: tensor names, and deriving a config from the tensors' shapes.

| family | our tensor names | assumed, because the shapes do not determine it |
|---|---|---|
| Swin | official (timm's and transformers' can be read too) | crop size: 224 if that gives the same windows |
| CvT | official | heads 1, 3, 6, 12; window 7; crop size 224 |
| ViL | see official_vil.py | crop size: 224 if that gives the same maps |
| DeiT | official | heads of 64 channels |
| ResNet | torchvision's | |

Official files also hold tensors that can be computed: relative position indices, attention masks and batch norm's
num_batches_tracked. They are dropped when a file is read and computed again when one is written.
"""

import difflib
import logging
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from esvit_scale.checkpoint import official_vil
from esvit_scale.checkpoint.official_shapes import (
    SIZES,
    ConfigValues,
    Tensors,
    group_by_stage,
    model_values,
    position_index,
    table_side,
)
from esvit_scale.checkpoint.positions import bicubic
from esvit_scale.errors import UserError
from esvit_scale.models import swin_forms
from esvit_scale.models.cvt import S1
from esvit_scale.models.swin import PATCH
from esvit_scale.models.swin_variants import SHAPES
from esvit_scale.models.vit import SIDE, with_class_position

log = logging.getLogger(__name__)

DERIVED = ("relative_position_index", "attn_mask", "num_batches_tracked")


class Family(NamedTuple):
    """A family of official trunks, such as Swin, with the functions that recognise and convert its tensors."""

    name: str
    signature: str  # name of an official tensor that no other family has
    trunks: tuple[str, ...]  # names in models/registry.py
    to_config: Callable[
        [Tensors], ConfigValues
    ]  # our tensors → the config's `model` section, and `data` if the shapes determine the crop size
    from_official: Callable[[Tensors], Tensors] = lambda official: (
        official
    )  # tensors by official name, without those that can be computed → by our name
    to_official_name: Callable[[str], str] = lambda name: name  # our name → the official one
    derived: Callable[[str, Tensor], Tensors] = lambda name, tensor: {}  # a tensor → tensors that are computed from it
    wrapper: str = ""  # prefix of all names of the trunk in a file


def identify(path: Path, official: Tensors) -> tuple[Family, Tensors]:
    """Return the family of a trunk whose tensors have official names, or those of transformers' Swin, and these tensors
    under our names.

    Raises:
        UserError: the trunk is of no known family; the message names the most similar one.
    """
    if swin_forms.is_huggingface(official):
        official = swin_forms.from_huggingface(official)
    found = next((family for family in FAMILIES if family.signature in official), None)
    if found is not None:
        return found, found.from_official(official)
    likeness = lambda f: max((difflib.SequenceMatcher(None, f.signature, n).ratio() for n in official), default=0.0)  # noqa: E731
    near = max(FAMILIES, key=likeness)
    raise UserError(
        f"{path}: no trunk of the official code (Swin, CvT, ViL, DeiT, ResNet); nearest: {near.name}, but it lacks "
        f"{near.signature}; it has {', '.join(list(official)[:3]) or 'none'} and {max(len(official) - 3, 0)} more tensors"
    )


def config_values(path: Path, family: Family, ours: Tensors) -> ConfigValues:
    """Return the config sections (`model`, sometimes `data`) that are derived from the shapes of a trunk's tensors.

    Raises:
        UserError: a tensor that is needed for this is missing.
    """
    try:
        return family.to_config(ours)
    except (KeyError, IndexError, TypeError) as error:
        missing = error.args[0] if isinstance(error, KeyError) else "whole stages"
        raise UserError(f"{path}: a {family.name} of the official code, but it lacks {missing}") from None


def family_of(trunk: str) -> Family | None:
    """Return the family of a trunk by its name in models/registry.py; None if the official code lacks the trunk."""
    return next((family for family in FAMILIES if trunk in family.trunks), None)


def to_official(family: Family, ours: Tensors) -> Tensors:
    """Return a trunk's tensors under official names, with the computed tensors that the official code also saves."""
    saved: Tensors = {}
    for our_name, tensor in ours.items():
        name = family.to_official_name(our_name)
        saved |= {family.wrapper + key: t for key, t in ({name: tensor} | family.derived(name, tensor)).items()}
    return saved


# --- Swin ------------------------------------------------------------------------------------------------------------


def _swin_config(tensors: Tensors) -> ConfigValues:
    tables = group_by_stage(tensors, r"layers\.(\d+)\.blocks\.\d+\.attn\.relative_position_bias_table")
    windows = [table_side(of_stage[0]) for of_stage in tables]
    heads = [of_stage[0].shape[-1] for of_stage in tables]
    found = swin_model(len(tensors["patch_embed.proj.weight"]), [len(x) for x in tables], heads, windows[0])
    return {"model": found, "data": {"global_crops": {"size": swin_size(windows)}}}


def swin_model(embed_dim: int, depths: list[int], heads: list[int], window: int) -> ConfigValues:
    """Return the `model` section for a Swin of this shape: a preset's name if one fits, else swin_t with overrides."""
    shape = (embed_dim, tuple(depths), tuple(heads))
    names = [name for name, known in SHAPES.items() if known[:3] == shape]  # a V1 comes before the V2 of the same shape
    return model_values(names[0] if names else "swin_t", shape, shape if names else ()) | {"window": window}


def swin_size(windows: list[int]) -> int:
    """Return a size of global crops, in pixels, at which the stages have these window sides.

    It is 224 if that size or no size fits, otherwise the smallest size that fits.
    """
    fits = (s for s in SIZES if [min(s // PATCH // 2**i, windows[0]) for i in range(len(windows))] == windows)
    return next(fits, SIZES[0])


def _swin_from_official(official: Tensors) -> Tensors:
    """Rename tensors with timm's names to official ones: timm counts patch merging as part of the next stage."""
    if any(name.startswith("layers.0.downsample.") for name in official):
        return official
    move = lambda match: f"layers.{int(match[1]) - 1}.downsample."  # noqa: E731
    return {re.sub(r"^layers\.(\d+)\.downsample\.", move, name): tensor for name, tensor in official.items()}


def _index_of_table(name: str, tensor: Tensor) -> Tensors:
    if not name.endswith("relative_position_bias_table"):
        return {}
    return {name.replace("bias_table", "index"): position_index(table_side(tensor))}


# --- other trunks ----------------------------------------------------------------------------------------------------


def _cvt_config(tensors: Tensors) -> ConfigValues:
    depths = tuple(map(len, group_by_stage(tensors, r"stage(\d+)\.1\.layers\.\d+\.0\.fn\.qkv\.dw\.weight")))
    return {"model": model_values("cvt_s1", (len(tensors["stage0.0.proj.weight"]), depths), S1[:2])}


def deit_config(tensors: Tensors) -> ConfigValues:
    """Return the `model` section that is derived from the shapes of a DeiT's tensors."""
    width, blocks = tensors["pos_embed"].shape[-1], group_by_stage(tensors, r"blocks\.(\d+)\.attn\.qkv\.weight")
    trunk, heads = ("deit_b", 12) if width == 768 else ("deit_s", 6)
    shape, registers = (width, (len(blocks),), (max(width // 64, 1),)), tensors.get("reg_token")
    found = model_values(trunk, shape, (heads * 64, (12,), (heads,)))
    return {"model": found | ({} if registers is None else {"registers": registers.shape[1]})}


def _deit_from_official(official: Tensors) -> Tensors:
    """Resize position embeddings of a map other than 14×14 (DeiT at 384 pixels) to 14×14; keep all other tensors."""
    official = with_class_position(official)
    positions = official["pos_embed"]  # [1, 1 + side², C]
    side = math.isqrt(max(positions.shape[1] - 1, 0))
    if side in (0, SIDE) or side**2 + 1 != positions.shape[1]:
        return official
    resized = bicubic(positions[0, 1:].T.unflatten(1, (side, side)), SIDE).flatten(1).T
    log.warning("position embeddings of a %d×%d map are resized to %d×%d", side, side, SIDE, SIDE)
    return official | {"pos_embed": torch.cat([positions[0, :1], resized])[None]}


def _resnet_config(tensors: Tensors) -> ConfigValues:
    depths = tuple(map(len, group_by_stage(tensors, r"layer(\d+)\.\d+\.conv1\.weight")))
    return {"model": model_values("resnet50", (len(tensors["conv1.weight"]), depths), (64, (3, 4, 6, 3)))}


def _count_of_batches(name: str, tensor: Tensor) -> Tensors:
    return {name.replace("running_var", "num_batches_tracked"): torch.tensor(0)} if "running_var" in name else {}


FAMILIES = (
    Family(
        "Swin",
        "layers.0.blocks.0.attn.relative_position_bias_table",
        tuple(name for name, shape in SHAPES.items() if shape.version == 1),
        _swin_config,
        _swin_from_official,
        derived=_index_of_table,
    ),
    Family("CvT", "stage0.1.layers.0.0.fn.qkv.dw.weight", ("cvt_s1",), _cvt_config, derived=_count_of_batches),
    Family(
        "ViL",
        official_vil.SIGNATURE,
        ("vil_2262",),
        official_vil.to_config,
        official_vil.from_official,
        official_vil.to_official_name,
        official_vil.derived,
    ),
    Family("DeiT", "pos_embed", ("deit_s", "deit_b"), deit_config, _deit_from_official),
    Family(
        "ResNet",
        "layer1.0.conv1.weight",
        ("resnet50",),
        _resnet_config,
        derived=_count_of_batches,
        wrapper="backbone.backbone.",
    ),
)
