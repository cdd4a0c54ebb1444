"""Reading a config off the tensors of an official checkpoint: what its families of trunks have in common."""

import math
import re
from typing import Any

import torch
from torch import Tensor

from esvit_scale.models.swin import PATCH
from esvit_scale.models.windows import relative_position_index

Tensors = dict[str, Tensor]  # of a trunk, by names without a prefix
ConfigValues = dict[str, Any]  # a part of the config

CPU = torch.device("cpu")
SIZES = (224, *range(PATCH, 1025, PATCH))  # of global crops, the likely one first


def group_by_stage(tensors: Tensors, pattern: str) -> list[list[Tensor]]:
    """The tensors whose names fit, grouped by the number in them, in order."""
    found: dict[int, list[Tensor]] = {}
    for name, tensor in tensors.items():
        if match := re.fullmatch(pattern, name):
            found.setdefault(int(match[1]), []).append(tensor)
    return [found[stage] for stage in sorted(found)]


def model_values(trunk: str, shape: tuple[Any, ...], known: tuple[Any, ...]) -> ConfigValues:
    """The trunk by its name alone, or with its own width, depths and (if they are told) heads."""
    if shape == known:
        return {"trunk": trunk}
    values = (list(x) if isinstance(x, tuple) else x for x in shape)
    return {"trunk": trunk} | dict(zip(("embed_dim", "depths", "heads"), values, strict=False))


def table_side(table: Tensor) -> int:
    """w, from a table of (2w − 1)² rows"""
    return (math.isqrt(len(table)) + 1) // 2


def position_index(side: int) -> Tensor:
    """int64 [side², side²], as the official code saves it"""
    return relative_position_index(side, CPU).view(side**2, side**2).clone()
