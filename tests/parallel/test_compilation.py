"""Tests of torch.compile on the trunk's blocks (`train.compile`)."""

import shutil
from pathlib import Path

import pytest
import torch

from esvit_scale.parallel import compilation
from esvit_scale.parallel import world as worlds
from esvit_scale.train import pretraining
from tests import tiny
from tests.train.test_not_finite import one_step, trainer_of


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_blocks_have_the_losses_of_eager_ones(tmp_path: Path) -> None:
    shards, few = tiny.shards(tmp_path / "shards"), {"train__steps": 5, "model__depths": [1, 2], "model__heads": [1, 2]}
    for name, compiled in (("eager", False), ("compiled", True)):
        assert pretraining.pretrain(tiny.config(tmp_path / name, shards, train__compile=compiled, **few)) == 0
    frames = torch._dynamo.utils.counters["frames"]
    assert frames["ok"] > 0
    assert not torch._dynamo.utils.counters["graph_break"]
    for row, expected in zip(tiny.rows(tmp_path / "compiled"), tiny.rows(tmp_path / "eager"), strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], abs=1e-5)
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)


@pytest.mark.slow
def test_blocks_are_compiled_at_zero_3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As without compilation, to rounding: with the backend that only traces, so that no compiler is needed."""
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    monkeypatch.setattr(shutil, "which", lambda name: name)
    small = {"model__depths": [1, 2], "model__heads": [1, 2], "train__ds_config": "zero3"}
    found = []
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for compiled in (False, True):
        trainer = trainer_of(tmp_path, train__compile=compiled, **small)
        try:
            results = [one_step(trainer, step) for step in range(4)]
            assert all(
                p.numel() == 0 for p in trainer.engines.student.module.trunk.parameters()
            )  # nothing stays gathered
        finally:
            worlds.stop()
        found.append([(r.logs["loss"].item(), r.grad_squares.sum().sqrt().item()) for r in results])
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    assert not torch._dynamo.utils.counters["graph_break"]
    for (loss, norm), (expected_loss, expected_norm) in zip(*found, strict=True):
        assert loss == pytest.approx(expected_loss, abs=1e-5)
        assert norm == pytest.approx(expected_norm, rel=1e-4)
