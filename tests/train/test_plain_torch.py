"""The trainer against an independent plain-torch loop that follows the order of the official code."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from esvit_scale.config import Config
from esvit_scale.data import manifest as manifests
from esvit_scale.data import photometric, stream
from esvit_scale.models.drop_path import drop_keys
from esvit_scale.models.initialize import initialize
from esvit_scale.objective.network import build_student, build_teacher
from esvit_scale.objective.schedules import Schedules
from esvit_scale.train import pretraining
from tests import tiny

# Exponent of `optim.layer_decay` for the parts of the tiny trunk of 1, 1 and 2 blocks, and for the heads.
EXPONENTS = {"trunk.patch_embed.proj": 5, "trunk.patch_embed.norm": 5, "trunk.norm": 0, "objective": 0}
EXPONENTS |= {"trunk.layers.0.blocks.0": 4, "trunk.layers.0.downsample": 4, "trunk.layers.1.blocks.0": 3}
EXPONENTS |= {"trunk.layers.1.downsample": 3, "trunk.layers.2.blocks.0": 2, "trunk.layers.2.blocks.1": 1}


def plain_losses(config: Config) -> list[float]:
    """Train two modules with torch.optim.AdamW, clipping per parameter, no last-layer gradients in epoch 0, and EMA."""
    data = manifests.load(Path(config.data.train))
    schedules = Schedules(config, stream.steps_per_epoch(config, data))
    student, teacher = build_student(config), build_teacher(config)
    initialize(student, config.seed)
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    optimizer = torch.optim.AdamW(
        [{"params": [p], "name": name} for name, p in student.named_parameters()], betas=config.optim.betas
    )
    losses = []
    for step, batch in enumerate(stream.batches(config, data, 0, 1, 0, schedules.total_steps)):
        crops = [group.flatten(0, 1) for group in batch.crops]
        views = [group.shape[0] for group in batch.crops]
        parameters = [batch.photometric.crops(0, 2), batch.photometric.crops(2, sum(views))]
        crops = [photometric.apply(pixels, p) for pixels, p in zip(crops, parameters, strict=True)]
        for group in optimizer.param_groups:
            below = EXPONENTS[re.sub(r"(downsample|proj|norm|objective)\b.*|(?<=blocks\.\d)\..*", r"\1", group["name"])]
            risen = step - config.optim.freeze_trunk_steps  # a warm-up of two steps, the last of them at the peak
            waits = config.optim.freeze_trunk_steps and "trunk" in group["name"] and risen < 1
            group["lr"] = (0 if waits else schedules.lr(step)) * config.optim.layer_decay**below
            group["weight_decay"] = schedules.weight_decay(step) if group["params"][0].ndim > 1 else 0.0
        with torch.no_grad():
            targets = teacher(crops[:1])
        keys = drop_keys(config.seed, step, batch.positions, sum(views))
        loss, *_ = student(crops, targets, keys, schedules.teacher_temp(step))
        optimizer.zero_grad()
        loss.backward()
        for name, p in student.named_parameters():
            p.grad.mul_((config.optim.clip / (p.grad.norm() + 1e-6)).clamp(max=1))
            if step < schedules.steps_per_epoch and "last_layer" in name:
                p.grad = None
            if step < config.optim.freeze_trunk_steps and name.startswith("trunk."):
                p.grad = None
        optimizer.step()
        m = schedules.ema_momentum(step)
        with torch.no_grad():
            for e, s in zip(teacher.parameters(), student.parameters(), strict=True):
                e.mul_(m).add_((1 - m) * s)
        student.objective.commit()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    "overrides",
    [{}, pytest.param({"optim__layer_decay": 0.6, "optim__freeze_trunk_steps": 5}, marks=pytest.mark.slow)],
)
def test_run_matches_plain_torch_loop(tmp_path: Path, overrides: dict[str, Any]) -> None:
    config = tiny.config(tmp_path / "run", tiny.shards(tmp_path / "shards"), **overrides)
    assert pretraining.pretrain(config) == 0
    losses = [row["loss"] for row in tiny.rows(tmp_path / "run")]
    # The same fp32 operations, in flat buffers there and per tensor here.
    assert losses == pytest.approx(plain_losses(config), abs=1e-5)
