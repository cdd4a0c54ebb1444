"""Helpers to derive a config from the tensor shapes in an official checkpoint, for several families of trunks."""

import math
import re
from typing import Any

import torch
from torch import Tensor

from esvit_scale.models.swin import PATCH
from esvit_scale.models.windows import relative_position_index

Tensors = dict[str, Tensor]  # a trunk's tensors by name, without the prefix "trunk."
ConfigValues = dict[str, Any]  # some sections of the config, or the values of one section

CPU = torch.device("cpu")
SIZES = (224, *range(PATCH, 1025, PATCH))  # candidate sizes of global crops in pixels, the most likely first


def group_by_stage(tensors: Tensors, pattern: str) -> list[list[Tensor]]:
    """Return a list of tensors for each stage, in order: those whose full name matches `pattern`.

    The first group of the pattern captures the stage's number.
    """
    found: dict[int, list[Tensor]] = {}
    for name, tensor in tensors.items():
        if match := re.fullmatch(pattern, name):
            found.setdefault(int(match[1]), []).append(tensor)
    return [found[stage] for stage in sorted(found)]


def model_values(trunk: str, shape: tuple[Any, ...], known: tuple[Any, ...]) -> ConfigValues:
    """Return the `model` section for a trunk: its name, and embed_dim, depths and heads if they differ from the preset.

    Args:
        shape: (embed_dim, depths) or (embed_dim, depths, heads) in the checkpoint.
        known: the same values of the preset named `trunk`.
    """
    if shape == known:
        return {"trunk": trunk}
    values = (list(x) if isinstance(x, tuple) else x for x in shape)
    return {"trunk": trunk} | dict(zip(("embed_dim", "depths", "heads"), values, strict=False))


def table_side(table: Tensor) -> int:
    """Return the window side w of a relative position bias table of (2w − 1)² rows."""
    return (math.isqrt(len(table)) + 1) // 2


def position_index(side: int) -> Tensor:
    """Return the relative position index of a window as the official code saves it: int64 [side², side²]."""
    return relative_position_index(side, CPU).view(side**2, side**2).clone()
