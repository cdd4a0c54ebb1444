"""A trunk that stands still while the heads learn: bit for bit, in student and teacher, and over a resume."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from esvit_scale.data.stream import MicroBatch
from esvit_scale.objective.schedules import Schedules
from esvit_scale.parallel import world as worlds
from esvit_scale.train import pretraining
from esvit_scale.train.trainer import Trainer
from tests import tiny

FROZEN = 3
SETTINGS = {"optim__freeze_trunk_steps": FROZEN, "optim__layer_decay": 0.8, "optim__weight_decay": 0.3}


def values_of(trainer: Trainer) -> dict[str, Tensor]:
    """Return copies of the fp32 values of student and teacher, and of the weights that their forwards use."""
    engines, found = trainer.engines, {}
    for p, ema in zip(engines.partitions, engines.teacher.values, strict=True):
        found |= {f"student/{p.name}": p.master.clone(), f"teacher/{p.name}": ema.clone()}
    for role, module in (("student", engines.student.module), ("teacher", engines.teacher.module)):
        found |= {f"{role} forward/{name}": p.detach().clone() for name, p in module.named_parameters()}
    return found


@pytest.mark.parametrize(
    ("stage", "precision", "optimizer"),
    [
        ("zero0", "fp32", "sgd"),
        pytest.param("zero1", "bf16", "adamw", marks=pytest.mark.slow),
        ("zero2", "fp32", "muon"),
        pytest.param("zero3", "fp32", "lamb", marks=pytest.mark.slow),
    ],
)
def test_trunk_stands_still_with_its_optimizer_state_and_then_moves(
    tmp_path: Path, stage: str, precision: str, optimizer: str
) -> None:
    overrides = {"train__ds_config": stage, "train__precision": precision, "optim__name": optimizer}
    config = tiny.config(tmp_path, tmp_path, **SETTINGS, **overrides, optim__freeze_last_layer_epochs=0)
    world = worlds.start()
    try:
        trainer = Trainer(config, world, Schedules(config, steps_per_epoch=4))
        begin = values_of(trainer)
        for step in range(FROZEN + 3):  # the trunk's warm-up is of two steps, the first of them at a rate of 0
            crops = [torch.randn(16, 3, 32, 32), torch.randn(32, 3, 16, 16)]
            micro_batch = MicroBatch([c.to(trainer.engines.dtype) for c in crops], torch.arange(8))
            assert trainer.train_step([micro_batch]).applied
            moved = {name for name, value in values_of(trainer).items() if not torch.equal(value, begin[name])}
            of_trunk = {name for name in moved if "/trunk." in name}
            states = {p.name for p in trainer.engines.partitions if trainer.engines.optimizer.state.get(p.flat)}
            if step < FROZEN:
                assert not of_trunk
                assert not any(name.startswith("trunk.") for name in states)
        assert {f"{role}/objective.view_head.mlp.0.weight" for role in ("student", "teacher")} <= moved
        assert {f"{role}/trunk.patch_embed.proj.weight" for role in ("student", "teacher")} <= moved
        assert states == set(trainer.engines.group_of)
    finally:
        worlds.stop()


@pytest.mark.slow
def test_resume_is_bit_exact_within_and_after_the_time_in_which_the_trunk_waits(tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = SETTINGS | {"train__steps": 6, "train__checkpoint_every": 2, "train__keep_checkpoints": 9}
    config = tiny.config(run, tiny.shards(tmp_path / "shards"), **settings)
    assert pretraining.pretrain(config) == 0
    whole = tiny.rows(run)
    assert whole[1]["update_ratio_stage1"] == 0 < whole[5]["update_ratio_stage1"]
    for step in (4, 2):
        (run / "summary.json").unlink()
        for later in range(step + 2, 7, 2):
            (run / "checkpoints" / f"step-{later:08d}").rename(tmp_path / f"{step}-{later}")
        (run / "checkpoints" / "latest").write_text(f"step-{step:08d}\n")
        assert pretraining.pretrain(config) == 0
        assert tiny.rows(run) == whole
