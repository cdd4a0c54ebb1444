"""Deriving a config from the shapes in an official checkpoint: helpers that several families of trunks share."""

import math
import re
from typing import Any

import torch
from torch import Tensor

from esvit_scale.models.swin import PATCH
from esvit_scale.models.windows import relative_position_index

Tensors = dict[str, Tensor]  # a trunk's tensors, by names without a prefix
ConfigValues = dict[str, Any]  # a part of the config

CPU = torch.device("cpu")
SIZES = (224, *range(PATCH, 1025, PATCH))  # pixels of global crops to try, the most likely first


def group_by_stage(tensors: Tensors, pattern: str) -> list[list[Tensor]]:
    """Return the tensors whose whole name matches `pattern`, grouped by the number that its first group captures."""
    found: dict[int, list[Tensor]] = {}
    for name, tensor in tensors.items():
        if match := re.fullmatch(pattern, name):
            found.setdefault(int(match[1]), []).append(tensor)
    return [found[stage] for stage in sorted(found)]


def model_values(trunk: str, shape: tuple[Any, ...], known: tuple[Any, ...]) -> ConfigValues:
    """Return the config's `model` section for a trunk: its name, and its width, depths and heads if they are not `known`."""
    if shape == known:
        return {"trunk": trunk}
    values = (list(x) if isinstance(x, tuple) else x for x in shape)
    return {"trunk": trunk} | dict(zip(("embed_dim", "depths", "heads"), values, strict=False))


def table_side(table: Tensor) -> int:
    """Return the window side w of a table of (2w − 1)² rows."""
    return (math.isqrt(len(table)) + 1) // 2


def position_index(side: int) -> Tensor:
    """Return the relative position index as the official code saves it: int64 [side², side²]."""
    return relative_position_index(side, CPU).view(side**2, side**2).clone()
