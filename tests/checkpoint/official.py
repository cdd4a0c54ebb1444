"""Checkpoints as the official trainer writes them: names and shapes of its own state dicts, values by rule."""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from esvit_scale.models.windows import relative_position_index
from tests.models.rule import by_hash

NAMES: dict[str, dict[str, list[int]]] = json.loads(
    (Path(__file__).parent / "fixtures" / "official_names.json").read_text()
)


def content() -> dict[str, Any]:
    """A W14 model with both heads; beside the weights what the trainer saves: its arguments, and an optimizer state
    whose rates are numpy numbers (they come from numpy tables)."""
    student = {name: _value("student " + name, shape) for name, shape in NAMES["student"].items()}
    teacher = {
        name.removeprefix("module."): _value("teacher " + name, shape) for name, shape in NAMES["student"].items()
    }
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter])
    optimizer.param_groups[0]["lr"] = np.linspace(0, 1e-3, 3)[1]
    optimizer.param_groups[0]["weight_decay"] = np.float32(0.04)
    return {
        "student": student,
        "teacher": teacher,
        "optimizer": optimizer.state_dict(),
        "epoch": 300,
        "args": argparse.Namespace(arch="swin_tiny", local_crops_number=(8,), norm_last_layer=False),
        "dino_loss": {name: _value(name, shape) for name, shape in NAMES["dino_loss"].items()},
        "fp16_scaler": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 17},
    }


def save(path: Path, without: tuple[str, ...] = (), **changes: Any) -> Path:
    """`without`: parts of tensor names that are left out of both networks."""
    values = content() | changes
    for network in ("student", "teacher"):
        values[network] = {n: t for n, t in values[network].items() if not any(part in n for part in without)}
    torch.save(values, path)
    return path


def _value(name: str, shape: list[int]) -> Tensor:
    if name.endswith("relative_position_index"):
        window = round(shape[0] ** 0.5)
        return relative_position_index(window, torch.device("cpu")).view(shape).clone()
    return by_hash(name, tuple(shape)).float()
