"""Converting ViL's tensor names from and to those in checkpoints of the official EsViT code.

Official checkpoints store a stage as a flat list: `layer2.0` is the patch embedding, `layer2.1` the attention of the
first block, `layer2.2` the MLP of the first block, `layer2.3` the attention of the second block, and so on. Layers that
global and local tokens share are saved under two names.
"""

import math
import re

import torch
from torch import Tensor

from esvit_scale.checkpoint.official_shapes import (
    CPU,
    SIZES,
    ConfigValues,
    Tensors,
    group_by_stage,
    model_values,
    position_index,
    table_side,
)
from esvit_scale.models.vil import PATCHES, VIL_2262
from esvit_scale.models.vil_attention import AROUND, around_index

SIGNATURE = "layer1.1.attn.local_relative_position_bias_table"
_TABLE = "attn.local_relative_position_bias_table"
_THEIRS = re.compile(r"layer(\d+)\.(\d+)\.(norm\.)?")
_OURS = re.compile(r"layers\.(\d+)\.(?:patch_embed\.|blocks\.(\d+)\.(?:norm(\d)\.|(?=(attn|mlp)\.)))")
_LONG = r"^layer[12]\."  # stages 1 and 2, whose windows also attend to their neighbours
_SHARED = re.compile(_LONG + r"\d+\.attn\.(query|kv|proj)(?=\.)")


def to_config(tensors: Tensors) -> ConfigValues:
    """Return the `model` and `data` sections of the config, derived from the shapes of a ViL's tensors."""
    tables = group_by_stage(tensors, rf"layers\.(\d+)\.blocks\.\d+\.{re.escape(_TABLE)}")
    heads = tuple(of_stage[0].shape[-1] for of_stage in tables)
    shape = (len(tensors["layers.0.patch_embed.proj.weight"]), tuple(map(len, tables)), heads)
    sides = [table_side(of_stage[0]) for of_stage in tables[2:]]
    fits = (size for size in SIZES if [size // math.prod(PATCHES[:s]) for s in (3, 4)] == sides)
    return {
        "model": model_values("vil_2262", shape, VIL_2262[:3]) | {"window": _window(tables[0][0])},
        "data": {"global_crops": {"size": next(fits, SIZES[0])}},
    }


def from_official(official: Tensors) -> Tensors:
    """Return the tensors under our names; a shared layer that was saved twice with equal values is returned once."""
    found = {}
    for name, tensor in official.items():
        shared = official.get(name.replace("_global.", "."))
        if "_global." in name and shared is not None and torch.equal(shared, tensor):
            continue
        found[_THEIRS.sub(_our_name, name)] = tensor
    return found


def to_official_name(name: str) -> str:
    """Return the official name of the tensor with our name `name`."""
    return _OURS.sub(_their_name, name)


def derived(name: str, tensor: Tensor) -> Tensors:
    """Return what the official code also saves for a tensor with this official name, by name; {} for most tensors.

    A layer that global and local tokens share is saved again under its second name. A position bias table is saved with
    the relative position index computed from it.
    """
    if shared := _SHARED.match(name):
        return {f"{shared[0]}_global{name[shared.end() :]}": tensor}
    if not name.endswith(_TABLE):
        return {}
    key = name.replace("local_relative_position_bias_table", "relative_position_index")
    if not re.match(_LONG, name):
        return {key: position_index(table_side(tensor))}
    window = _window(tensor)
    return {key: around_index(window, CPU).view(window**2, AROUND * window**2).clone()}


def _our_name(match: re.Match[str]) -> str:
    stage, place = int(match[1]) - 1, int(match[2]) - 1
    if place < 0:
        return f"layers.{stage}.patch_embed.{match[3] or ''}"
    return f"layers.{stage}.blocks.{place // 2}." + (f"norm{place % 2 + 1}." if match[3] else "")


def _their_name(match: re.Match[str]) -> str:
    stage, block, norm, branch = match.groups()
    if block is None:
        return f"layer{int(stage) + 1}.0."
    second = norm == "2" or branch == "mlp"
    return f"layer{int(stage) + 1}.{2 * int(block) + 1 + second}." + ("norm." if norm else "")


def _window(table: Tensor) -> int:
    """Return the window side w of a bias table of (4w − 1)² rows, which covers a window and those around it."""
    return (math.isqrt(len(table)) + 1) // 4
