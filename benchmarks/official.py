"""The official EsViT modules from a clone, for timing beside ours: loaded where they lie, nothing of them is kept here.

Only three pieces are taken: the Swin trunk, the DINO head and the V+R loss; a full import of the official trainer needs
packages of its time.
"""

import ast
import types
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from esvit_scale.config import Config
from esvit_scale.models.swin_variants import swin_shape

Namespace = dict[str, Any]


def swin_arguments(config: Config) -> dict[str, Any]:
    """Return the sizes of the config's Swin by their names in the official code, which are timm's too."""
    shape = swin_shape(config)
    return {
        "img_size": config.data.global_crops.size,
        "embed_dim": shape.embed_dim,
        "depths": list(shape.depths),
        "num_heads": list(shape.heads),
        "window_size": config.model.window,
        "drop_path_rate": config.model.drop_path,
        "num_classes": 0,
    }


class OfficialStep:
    """Teacher, student, loss and optimizer of the official trainer; call it with the crops for one optimizer step.

    In bf16 and fp16 it runs under autocast with fp32 weights, as the official trainer does.
    """

    def __init__(self, clone: Path, config: Config, device: torch.device, precision: str) -> None:
        self._student, self._teacher, self._loss = self.modules(clone, config, device)
        self._teacher.load_state_dict(self._student.state_dict())
        self._teacher.requires_grad_(False)
        self._optimizer = torch.optim.AdamW(self._student.parameters(), lr=1e-4, weight_decay=0.04)
        self._device, self._precision = device, precision
        self._scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    @staticmethod
    def modules(clone: Path, config: Config, device: torch.device) -> tuple[Any, Any, Any]:
        """Return student, teacher and loss of the official `clone`, built for `config` and moved to `device`."""
        swin = _swin(clone)
        head = _definitions(clone / "models/vision_transformer.py", {"DINOHead"}, {"trunc_normal_": trunc_normal_})
        loss = _definitions(clone / "main_esvit.py", {"DDINOLoss"}, {"np": np, "F": F, "dist": dist})
        objective = config.objective
        sizes = {"hidden_dim": objective.head_hidden, "bottleneck_dim": objective.bottleneck, "norm_last_layer": False}

        def network() -> Any:
            trunk = swin.SwinTransformer(
                **swin_arguments(config), norm_layer=partial(nn.LayerNorm, eps=1e-6), use_dense_prediction=True
            )
            for name in ("head", "head_dense"):
                setattr(trunk, name, head["DINOHead"](trunk.num_features, objective.prototypes, **sizes))
            return trunk.to(device)

        views = len(config.crop_sizes)
        warmup = objective.teacher_temp_warmup_epochs
        temps = (objective.teacher_temp, objective.teacher_temp_end, warmup, max(config.train.epochs, warmup + 1))
        criterion = loss["DDINOLoss"](objective.prototypes, views, *temps, objective.student_temp).to(device)
        return network(), network(), criterion

    def __call__(self, crops: list[Tensor]) -> None:
        """Make one optimizer step on `crops`: one tensor [B, 3, S, S] per view, as the official loader gives them."""
        with self._autocast():
            targets = self._teacher(crops[:2])
            loss = self._loss(self._student(crops), targets, 0, None)
        self._optimizer.zero_grad()
        self._scaler.scale(loss).backward()
        self._scaler.unscale_(self._optimizer)
        for p in self._student.parameters():
            factor = 3.0 / (p.grad.norm(2).item() + 1e-6)  # the official clip reads every norm on the host
            if factor < 1:
                p.grad.mul_(factor)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        with torch.no_grad():
            for s, t in zip(self._student.parameters(), self._teacher.parameters(), strict=True):
                t.mul_(0.996).add_(0.004 * s)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._precision == "fp32":
            return nullcontext()
        return torch.autocast(self._device.type, torch.bfloat16 if self._precision == "bf16" else torch.float16)


def _swin(clone: Path) -> types.ModuleType:
    """models/swin_transformer.py as a module of its own, with timm's layers where they are today."""
    source = (clone / "models/swin_transformer.py").read_text()
    source = source.replace("from timm.models.layers import", "from timm.layers import")
    source = source.replace("from .registry import register_model", "register_model = lambda f: f")
    module = types.ModuleType("official_swin")
    exec(compile(source, str(clone / "models/swin_transformer.py"), "exec"), module.__dict__)
    return module


def _definitions(path: Path, wanted: set[str], given: Namespace) -> Namespace:
    """Some top-level classes of a file, without running the rest of it."""
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name in wanted]
    namespace: Namespace = {"torch": torch, "nn": nn, **given}
    exec(compile(tree, str(path), "exec"), namespace)
    return namespace
