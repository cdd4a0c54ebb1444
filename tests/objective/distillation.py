"""Teachers, configs and runs of distillation, shared by its tests."""

from pathlib import Path
from typing import Any

import torch

from esvit_scale import config as configs
from esvit_scale.checkpoint import safetensors_file
from esvit_scale.checkpoint.weights import Weights
from esvit_scale.config import Config
from esvit_scale.models.initialize import initialize
from esvit_scale.objective.network import build_network
from esvit_scale.train import pretraining
from tests import tiny

BOTH = ("prototypes", "cosine")  # kinds of targets
TEMP = 0.05
LARGE: dict[str, Any] = {"model__embed_dim": 24}


def write_teacher(path: Path, heads: bool = True, seed: int = 5, **changes: Any) -> Path:
    """A safetensors file of a trunk with heads and centres, wider than the tiny student; values are random."""
    config = tiny.config(path.parent / "unused", path.parent, **{**LARGE, **changes})
    network = build_network(config)
    initialize(network, seed)
    tensors = {name: t.detach() for name, t in network.state_dict().items()}
    centers = {f"{part}.values": 0.1 * torch.randn(64) for part in ("view", "region")}
    if not heads:
        tensors, centers = {name: t for name, t in tensors.items() if name.startswith("trunk.")}, {}
    safetensors_file.write(path, Weights(config, {"teacher": tensors}, centers), "teacher")
    return path


def config_of(folder: Path, data: Path, teacher: Path, **overrides: Any) -> Config:
    values = {"train__steps": 6, "train__checkpoint_every": 3, "train__keep_checkpoints": 9, **overrides}
    own = {"objective__name": "distill", "objective__teacher": str(teacher), "objective__regions": True}
    return tiny.config(folder, data, **{**own, **values})


def run(folder: Path, data: Path, teacher: Path, **overrides: Any) -> list[dict[str, Any]]:
    assert pretraining.pretrain(config_of(folder, data, teacher, **overrides)) == 0
    return tiny.rows(folder)


Straight = dict[str, tuple[Path, list[dict[str, Any]]]]


def planned(**objective: Any) -> Config:
    """Swin-T taught by Swin-B, at their published sizes."""
    description = {
        "checksum": "none",
        "data": {"global_crops": {"size": 224}},
        "model": {"trunk": "swin_b"},
        "objective": {"prototypes": 65536, "head_hidden": 2048, "bottleneck": 256, "regions": False},
    }
    values = {"name": "distill", "teacher": "swin_b.pth", "teacher_config": description, "regions": True, **objective}
    return configs.validate({"objective": values}, where="test")
