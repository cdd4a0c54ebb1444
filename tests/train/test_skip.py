"""A NaN costs one step and nothing else: weights, moments, teacher and centres stay as they were."""

from pathlib import Path
from typing import Any

import pytest
import torch

from esvit_scale.data import manifest, stream
from esvit_scale.errors import Diverged
from esvit_scale.objective.schedules import Schedules
from esvit_scale.parallel import world as world_module
from esvit_scale.train import loop
from esvit_scale.train.step import open_session, train_step
from tests import tiny


def snapshot(session: Any) -> list[torch.Tensor]:
    e = session.engines
    moments = [v for p in e.partitions for k, v in sorted(e.optimizer.state[p.flat].items())]
    centers = list(session.objective.centers_state().values())
    return [t.clone() for t in [*(p.master for p in e.partitions), *e.teacher.values, *moments, *centers]]


@pytest.mark.parametrize("ds_config", ["zero0", "zero1", "zero2", "zero3"])
def test_a_step_with_nan_moves_nothing(tmp_path: Path, ds_config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny.config(tmp_path / "run", tiny.shards(tmp_path / "shards"), train__ds_config=ds_config)
    world = world_module.start()
    try:
        data = manifest.load(Path(config.data.train))
        session = open_session(config, world, Schedules(config, stream.steps_per_epoch(config, data)))
        batches = list(stream.batches(config, data, 0, 1, 0, 8))
        for step in range(6):
            assert train_step(session, batches[step], step).applied
        before = snapshot(session)
        real = session.objective.forward
        with monkeypatch.context() as patch:
            patch.setattr(session.objective, "forward", lambda *a: (real(*a)[0] * float("nan"), real(*a)[1]))
            assert not train_step(session, batches[6], 6).applied
        assert all(torch.equal(a, b) for a, b in zip(before, snapshot(session), strict=True))
        assert train_step(session, batches[7], 7).applied
        assert not all(torch.equal(a, b) for a, b in zip(before, snapshot(session), strict=True))
    finally:
        world_module.stop()


def test_nan_at_every_step_ends_the_run_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from esvit_scale.objective.esvit import EsViT

    real = EsViT.forward
    monkeypatch.setattr(EsViT, "forward", lambda self, *a: (real(self, *a)[0] * float("nan"), real(self, *a)[1]))
    config = tiny.config(tmp_path / "run", tiny.shards(tmp_path / "shards"), train__steps=40)
    with pytest.raises(Diverged, match=r"20 steps in a row, up to step 20.*lower optim\.lr"):
        loop.pretrain(config)
